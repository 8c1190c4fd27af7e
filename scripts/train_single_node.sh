#!/usr/bin/env bash
# Train with PaddleNLP's Trainer on the cards of this machine:
#     bash scripts/train_single_node.sh [-n CARDS] [-s SCRIPT] [FLAGS...]
# -n  processes, one per card; by default as many as nvidia-smi lists, else 1
# -s  train_image_generation_dit_trainer.py (the default) or train.py
# FLAGS go to the script, whose --help explains them; the defaults are the DiT paper's recipe:
#     bash scripts/train_single_node.sh -n 8 --feature_path data/fastdit_imagenet256 --output_dir results --bf16
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cards="" script="train_image_generation_dit_trainer.py"
while getopts ":n:s:h" option; do
    case "$option" in
        n) cards="$OPTARG" ;;
        s) script="$OPTARG" ;;
        h) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        *) break ;; # the first of FLAGS
    esac
    shift $((OPTIND - 1)) && OPTIND=1
done
[[ -n "$cards" ]] || cards="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"
[[ "$cards" != 0 ]] || cards=1
[[ "$script" != *trainer.py ]] || set -- "$@" --do_train # a recipe stands first
python="${PADDLE_DIT_VENV:-$root/.venv}/bin/python"
[[ -x "$python" ]] || python=python

echo "[train] $cards process(es) of $script; their logs are in $PWD/log" >&2
exec "$python" -m paddle.distributed.launch ${LAUNCH_FLAGS:-} --nproc_per_node "$cards" "$root/$script" "$@"
