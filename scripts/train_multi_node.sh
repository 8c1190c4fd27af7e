#!/usr/bin/env bash
# Train with PaddleNLP's Trainer on several machines. Run the same command on each of them:
#     bash scripts/train_multi_node.sh -N NODES -m HOST:PORT [-n CARDS] [-s SCRIPT] [FLAGS...]
# -N  number of machines
# -m  address of one of them, the same everywhere, and a free port there
# The rest is as for scripts/train_single_node.sh, -n being the cards of each machine.
# Two machines with eight cards each, 16 samples at once on a card, 256 in all; both must see the data and the output:
#     bash scripts/train_multi_node.sh -N 2 -m 10.0.0.1:6170 -n 8 --feature_path /shared/imagenet256 \
#         --output_dir /shared/run --per_device_train_batch_size 16 --bf16
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
nodes="" master=""
while getopts ":N:m:h" option; do
    case "$option" in
        N) nodes="$OPTARG" ;;
        m) master="$OPTARG" ;;
        h) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        *) break ;; # the first of the rest
    esac
    shift $((OPTIND - 1)) && OPTIND=1
done
if [[ -z "$nodes" || -z "$master" ]]; then
    echo "error: begin with -N NODES -m HOST:PORT; -h explains them" >&2
    exit 2
fi
LAUNCH_FLAGS="--nnodes $nodes --master $master" exec bash "$here/train_single_node.sh" "$@"
