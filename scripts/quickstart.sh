#!/usr/bin/env bash
# Make the environment where it is missing, then train a small DiT on handwritten digits and judge what it draws:
#     bash scripts/quickstart.sh
#     bash scripts/quickstart.sh --output outputs/other --seed 1
# --cpu and --gpu choose the build of Paddle (scripts/environment.sh says how, without them). What remains goes to
# scripts/quickstart.py; -h lists it once the environment is there. Paths are relative to the project's folder.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PADDLE_DIT_VENV:-.venv}/bin/python" build="" help="" rest=()
for argument in "$@"; do
    case "$argument" in
        --cpu | --gpu) build="$argument" ;;
        -h | --help) help="yes" ;;
        *) rest+=("$argument") ;;
    esac
done

if [[ -n "$help" ]]; then
    sed -n '2,6s/^# \{0,1\}//p' scripts/quickstart.sh
    if [[ -x "$python" ]]; then exec "$python" scripts/quickstart.py --help; fi
    exit
fi
bash scripts/environment.sh $build
exec "$python" scripts/quickstart.py ${rest[@]+"${rest[@]}"}
