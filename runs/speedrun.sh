#!/bin/bash
# A model of GPT-2's strength on one node with 8 H100 GPUs. It writes to NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.
#
#   bash runs/speedrun.sh
#   WANDB_RUN=speedrun bash runs/speedrun.sh    with curves on wandb under that name (log in first)
#   NPROC_PER_NODE=4 bash runs/speedrun.sh      on 4 GPUs: the same model in about twice the time
set -euo pipefail
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=1
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"

python -m nanochat.report reset

# The tokenizer needs 8 shards; the rest of what pretraining reads arrives meanwhile.
python -m nanochat.dataset -n 8
python -m nanochat.dataset -n 170 &
DOWNLOAD=$!
trap 'kill $DOWNLOAD 2>/dev/null || true' EXIT
python -m scripts.tok_train
python -m scripts.tok_eval
wait $DOWNLOAD

torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.base_train \
    --depth=24 --target-param-data-ratio=8 --device-batch-size=16 --fp8
torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.base_eval --device-batch-size=16
# supervised fine-tuning comes here
python -m nanochat.report generate
