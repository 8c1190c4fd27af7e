#!/usr/bin/env bash
# Make the project's Python environment, or find it ready in under a second:
#     bash scripts/environment.sh [--cpu | --gpu]
# By default it keeps the build that is there, else takes the GPU build where nvidia-smi lists a GPU, else the CPU build.
# PYTHON names a Python 3.10-3.12 to use, PADDLE_DIT_VENV another folder than .venv, PADDLE_GPU_INDEX another of
# Paddle's package indexes (for another CUDA version).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${PADDLE_DIT_VENV:-$root/.venv}"
gpu_index="${PADDLE_GPU_INDEX:-https://www.paddlepaddle.org.cn/packages/stable/cu126/}"
# An installation that was cut off leaves the second mark instead of the first; it is then started anew.
stamp="$venv/paddle-dit.ready" unfinished="$venv/paddle-dit.unfinished" log="$venv/paddle-dit.log"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
unset PYTHONPATH PYTHONHOME

say() { echo "[environment] $*"; }
die() { say "$*" >&2; exit 1; }
trap 'die "stopped; the same command starts anew"' INT TERM
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
has() { compgen -G "$venv/lib/python*/site-packages/$1.dist-info" >/dev/null; }
pip() {
    "$venv/bin/python" -m pip "$@" >>"$log" 2>&1 && return
    grep -vE '^(WARNING: Location|Requirement already)' "$log" | tail -20 >&2
    die "the installation failed, see above (all of it: $log); the same command tries again"
}

make_venv() {
    local python old
    python="$(bash "$root/scripts/find_python.sh")"
    say "making $venv with Python $(version_of "$python")"
    rm -rf "$venv" && mkdir -p "$venv" && touch "$unfinished"
    "$python" -m venv "$venv" || die "$python could not make $venv, see above"
    old="$("$python" -c 'from importlib.metadata import version; print(version("paddlepaddle-gpu"))' 2>/dev/null || true)"
    [[ "$old" != 2.* ]] || say "leaving aside the paddlepaddle-gpu $old of $python: Paddle 2 is not supported"
}

remove_other_build() { # the CPU and the GPU build own the same files: where the wrong one is, both have to go
    local wrong="paddlepaddle_gpu-*"
    [[ $build == cpu ]] || wrong="paddlepaddle-*"
    if has "paddlepaddle_gpu-2.*"; then
        say "taking out the old paddlepaddle-gpu 2 (the newest on PyPI): only Paddle 3 is supported"
        wrong="*"
    fi
    if has "$wrong"; then pip uninstall -y paddlepaddle paddlepaddle-gpu; fi
}

choose_build() { # without a reachable index, an asked-for GPU build is an error and leaves what is there as it is
    [[ $build == gpu ]] || return 0
    "$venv/bin/python" -m pip index versions --retries 1 -i "$gpu_index" paddlepaddle-gpu 2>>"$log" | grep -qF "$1" && return
    local missing="paddlepaddle-gpu $1 for this Python cannot be had from $gpu_index (see $log)"
    [[ "$asked" != gpu ]] || die "$missing; --cpu takes the CPU build"
    say "$missing: taking the CPU build" && build=cpu
}

install() { # install LOCK VERSION
    local paddle others="$venv/paddle-dit.lock"
    paddle="$(sed -n 's/^paddlepaddle==//p' "$1")"
    rm -f "$log" && choose_build "$paddle"
    if [[ -e "$stamp" ]]; then mv "$stamp" "$unfinished"; fi
    say "installing $(grep -c == "$1") packages for Python $2 ($build build), a few minutes..."
    remove_other_build
    grep -v '^paddlepaddle==' "$1" >"$others"
    pip install --no-deps --no-compile --use-pep517 -r "$others"
    if [[ $build == gpu ]]; then # with its dependencies: Paddle's index holds the CUDA libraries too
        say "and Paddle for GPUs, some gigabytes, from $gpu_index"
        pip install --no-compile -c "$others" -i "$gpu_index" "paddlepaddle-gpu==$paddle"
    else
        pip install --no-deps --no-compile "paddlepaddle==$paddle"
    fi
    pip install --no-deps --no-build-isolation -e "$root"
    "$venv/bin/python" -W ignore -c 'import paddle' >>"$log" 2>&1 ||
        die "Paddle does not start: $(tail -1 "$log") (for libgomp.so.1 on Debian or Ubuntu: apt install libgomp1)"
}

case "${1:-}" in
    --cpu | --gpu) asked="${1#--}" ;;
    -h | --help) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" && exit ;;
    "") asked="" ;;
    *) die "unknown option '$1'; there are --cpu and --gpu" ;;
esac
if type -P flock >/dev/null; then exec 9<"${BASH_SOURCE[0]}" && flock 9; fi # one at a time

build="$asked"
if [[ -z "$build" && -e "$stamp" ]]; then read -r build _ <"$stamp"; fi
if [[ -z "$build" ]]; then if nvidia-smi -L 2>/dev/null | grep -q GPU; then build=gpu; else build=cpu; fi; fi
expected() { echo "$build $version $(cksum <"$root/requirements/lock-py$version.txt") $root"; }

version="$(version_of "$venv/bin/python")"
if [[ -e "$unfinished" || ! -e "$venv" || ! "$version" =~ ^3\.1[0-2]$ ]]; then
    [[ -e "$unfinished" || -e "$stamp" || -z "$(ls -A "$venv" 2>/dev/null)" ]] ||
        die "$venv has no Python 3.10 to 3.12 and was not made here: remove it, or name another in PADDLE_DIT_VENV"
    make_venv
    version="$(version_of "$venv/bin/python")"
elif [[ -e "$stamp" && "$(<"$stamp")" == "$(expected)" ]]; then
    exit 0
fi
install "$root/requirements/lock-py$version.txt" "$version"
expected >"$stamp" && rm -f "$unfinished"
say "ready after $SECONDS s"
