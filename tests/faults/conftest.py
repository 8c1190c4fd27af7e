"""What tests of interrupted runs share."""

import os
import shutil
import subprocess

import pytest

from paddle_dit.evaluation.launch import write_random_latents


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write 64 random latents of ten classes, once for a module, and return the packed store's folder."""
    return write_random_latents(tmp_path_factory.mktemp("store") / "latents")


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of some MiB, and the same read-only; unmounted at the end."""
    folder = tmp_path / "disk"

    def mount(mib, *options):
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={mib}m", *options]), "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can be mounted by root alone")
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
