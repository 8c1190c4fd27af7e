#!/usr/bin/env bash
# Make the environment where it is missing, check the style, run the tests:
#     bash scripts/test.sh                 # everything that is not slow
#     bash scripts/test.sh --slow          # everything
#     bash scripts/test.sh tests/data -x   # what remains goes to pytest
# --cpu and --gpu choose the build of Paddle (scripts/environment.sh says how, without them).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
build="" pytest=(-m "not slow") rest=()
for argument in "$@"; do
    case "$argument" in
        --cpu | --gpu) build="$argument" ;;
        --slow) pytest=() ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' scripts/test.sh && exit ;;
        *) rest+=("$argument") ;;
    esac
done

bash scripts/environment.sh $build
bin="${PADDLE_DIT_VENV:-.venv}/bin"
"$bin/python" -m ruff check .
"$bin/python" -m ruff format --check .
exec "$bin/python" -m pytest ${pytest[@]+"${pytest[@]}"} ${rest[@]+"${rest[@]}"}
