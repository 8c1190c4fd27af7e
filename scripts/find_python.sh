#!/usr/bin/env bash
# Print the first Python that runs and can make virtual environments:
#     bash scripts/find_python.sh [VERSION...]      # by default 3.11 3.12 3.10, after the one that PYTHON names
# Each candidate is really run: pyenv leaves stubs on PATH that do not, and keeps Pythons off it that do.
set -euo pipefail

candidates() {
    local version python
    if [[ -n "${PYTHON:-}" ]]; then type -P "$PYTHON" || echo "PYTHON=$PYTHON is not a command; trying others" >&2; fi
    for version in "$@"; do
        type -aP "python$version" || true
        for python in "${HOME:-}/.pyenv/versions/$version".*/bin/python; do
            if [[ -x "$python" ]]; then echo "$python"; fi
        done
    done
    type -aP python3 python || true
}

[[ $# -gt 0 ]] || set -- 3.11 3.12 3.10
bare=""
while read -r python; do
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)"
    [[ -n "$version" && " $* " == *" $version "* ]] || continue
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$python"
        exit
    fi
    bare="$version"
done < <(candidates "$@")

if [[ -n "$bare" ]]; then
    echo "Python $bare cannot make virtual environments; on Debian or Ubuntu: apt install python$bare-venv" >&2
else
    echo "no Python $* found: install one of them, or name it: PYTHON=/path/to/python" >&2
fi
exit 1
