#!/usr/bin/env bash
# Remake requirements/lock-py3.*.txt from requirements.txt and requirements/test.txt:
#     bash scripts/make_locks.sh                # every Python that is found
#     bash scripts/make_locks.sh 3.11           # one of them
# Each lock is what pip chose in a fresh environment whose imports were then tried. Run it on Linux x86-64.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

failed() {
    grep -v '^WARNING: Location' "$work/log" | tail -20 >&2
    exit 1
}

make_lock() { # make_lock 3.11 /usr/bin/python3.11
    local venv="$work/$1" lock="$root/requirements/lock-py$1.txt"
    echo "[locks] resolving for Python $1, some minutes"
    "$2" -m venv "$venv"
    "$venv/bin/pip" install --use-pep517 -r "$root/requirements.txt" -r "$root/requirements/test.txt" >"$work/log" 2>&1 ||
        failed
    {
        echo "# Python $1: every package of requirements.txt and requirements/test.txt, with all that they need."
        echo "# Remade by: bash scripts/make_locks.sh $1"
        echo "# Left out: ligo-segments, which ppdiffusers asks for and never imports (it needs a C compiler)."
        echo "# opencv-python-headless replaces opencv-python: the same module, without the need of libGL."
        "$venv/bin/pip" freeze --all | grep -vE '^(pip|wheel|ligo-segments)==' |
            sed 's/^opencv-python==/opencv-python-headless==/'
    } >"$work/lock"
    if grep -nE '@|file:|://|^torch==' "$work/lock"; then
        echo "[locks] the line above must not be in a lock" >&2
        exit 1
    fi
    "$2" -m venv --clear "$venv"
    "$venv/bin/pip" install --no-deps --use-pep517 -r "$work/lock" >"$work/log" 2>&1 || failed
    (cd "$work" && "$venv/bin/python" -W ignore -c "
import paddle, paddlenlp.trainer, ppdiffusers, visualdl, onnxruntime, paddle2onnx, sklearn, matplotlib, tyro
from ppdiffusers import AutoencoderKL, DiTPipeline")
    cp "$work/lock" "$lock"
    echo "[locks] ${lock#"$root/"}: $(grep -c == "$lock") packages"
    rm -rf "$venv"
}

for version in ${@:-3.10 3.11 3.12}; do
    if python="$(bash "$root/scripts/find_python.sh" "$version")"; then
        make_lock "$version" "$python"
    else
        echo "[locks] requirements/lock-py$version.txt stays as it is" >&2
    fi
done
