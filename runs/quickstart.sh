#!/bin/bash
# From nothing to a small trained model and its report, on any machine: 2 CPU cores are enough, no GPU, no account, and no
# network but for the packages. The text is the Python standard library's own source.
#
#   bash runs/quickstart.sh
#
# Everything lies in a folder of its own, `quickstart` in NANOCHAT_BASE_DIR (default ~/.cache/nanochat), apart from real runs.
# A second run keeps what exists; to start over, delete that folder.
set -euo pipefail
SECONDS=0
# shellcheck source=runs/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/quickstart"

stage "report header" report/header.md python -m nanochat.report reset
stage "text" base_data_climbmix/source.json python -m nanochat.dataset --source=stdlib
stage "tokenizer" tokenizer/token_bytes.pt python -m scripts.tok_train --vocab-size=4096
# two layers of width 128 grow to three of 192 and four of 256; the FLOPs are those of 240 steps of the last. The default learning
# rates are meant for far longer runs with far larger batches
stage "pretraining" report/base-model-training.md python -m scripts.base_train \
    --depth=4 --grow-from=2 --grow-stages=2 --kappa=0.4 --head-dim=64 --max-seq-len=512 --window-pattern=L \
    --device-batch-size=16 --total-batch-size=8192 --num-iterations=240 \
    --matrix-lr=0.16 --unembedding-lr=0.03 --eval-every=20 --eval-tokens=32768 --sample-every=160 --core-metric-every=-1
stage "evaluation" report/base-model-evaluation.md python -m scripts.base_eval --eval=bpb,sample --split-tokens=65536
printf '\n=== report\n'
python -m nanochat.report generate

cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at report.html. Let the model continue a text:

    NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR" $PWD/.venv/bin/python -m scripts.chat_cli -i base -p "import os"

Teach it to count letters (10 minutes):

    bash runs/chat.sh
END
