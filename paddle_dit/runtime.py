"""Process settings that must be in place before Paddle is imported, and the device that Paddle then has.

Entry points call :func:`prepare` first.
"""

import ctypes
import os
import platform
import re
import resource
import sys
import warnings
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare() -> None:
    """Apply the settings that make Paddle's CPU kernels two to three times faster.

    - strided views off: every matmul or reshape that follows one would copy slowly;
    - one thread per core, shared among the ranks of this machine (Paddle starts with one); a value already in
      ``OMP_NUM_THREADS`` stands;
    - on AMD processors, the AVX2 matrix kernels of the old MKL inside Paddle, which by itself takes slow ones there;
    - glibc keeps large blocks instead of returning them to the system after every operation.
    """
    warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's, about compiling custom operators
    if "paddle" in sys.modules:
        if os.environ.get("FLAGS_use_stride_kernel") != "0":
            warnings.warn(
                "Paddle was imported before paddle_dit.runtime.prepare(): CPU training will be about 3 times slower. "
                "Call it first, or set FLAGS_use_stride_kernel=0 in the environment.",
                stacklevel=2,
            )
        return
    ranks = max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", "1")))
    os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("GLOG_minloglevel", "2")
    if sys.platform == "linux":
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if "AuthenticAMD" in cpu and " avx2 " in cpu:
            os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def sees_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, told without Paddle."""
    return Path("/proc/driver/nvidia/version").exists()


def has_gpu() -> bool:
    """Whether this Paddle is a GPU build that sees a GPU."""
    import paddle

    return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


def choose_device() -> str:
    """Take this process's GPU, if there is one, and return "gpu" or "cpu"."""
    if not has_gpu():
        return "cpu"
    import paddle

    paddle.set_device(f"gpu:{os.environ.get('FLAGS_selected_gpus', '0').split(',')[0]}")
    return "gpu"


def peak_rss() -> int:
    """Return the most bytes of main memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # rusage counts on Linux what the process was before it became this program, too
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child_environment() -> dict[str, str]:
    """Return this process's variables with which another Python imports this very package."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def environment() -> dict[str, str | None]:
    """Return the threads and versions on which the last bits of a result depend."""
    import numpy as np
    import paddle

    from paddle_dit import __version__

    return {
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "mkl_kernels": os.environ.get("MKL_DEBUG_CPU_TYPE"),  # other kernels round otherwise
        "paddle_dit": __version__,
        "paddle": paddle.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
