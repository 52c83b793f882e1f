#!/bin/bash
# A larger model than quickstart's on real text, for a laptop: some hours on a CPU, less on an Apple GPU.
# It writes to NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.
#
#   bash runs/runcpu.sh
set -euo pipefail
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

python -m nanochat.report reset
python -m nanochat.dataset -n 8
python -m scripts.tok_train --max-chars=2000000000
python -m scripts.tok_eval
python -m scripts.base_train \
    --depth=6 --head-dim=64 --window-pattern=L --max-seq-len=512 \
    --device-batch-size=32 --total-batch-size=16384 --num-iterations=5000 \
    --eval-every=100 --eval-tokens=524288 --core-metric-every=-1 --sample-every=100
python -m scripts.base_eval --device-batch-size=1 --split-tokens=16384 --max-per-task=16
# supervised fine-tuning comes here
python -m nanochat.report generate
