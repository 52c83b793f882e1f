#!/bin/bash
# A larger model than quickstart's on real text, for a laptop, from nothing to a chat: some hours on a CPU, less on an Apple GPU.
# It writes to NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.
#
#   bash runs/runcpu.sh
#
# All sizes are variables, with their defaults below. A variable named like a script holds its flags: BASE_TRAIN replaces those of
# scripts.base_train, DATASET those of nanochat.dataset, and so on.
# shellcheck disable=SC2086  # the flags in a variable are words
set -euo pipefail
: "${DEPTH=6}" "${QUESTION=Why is the sky blue?}" "${DATASET=-n 8}" "${TOK_TRAIN=--max-chars=2000000000}"
: "${BASE_TRAIN=--head-dim=64 --window-pattern=L --max-seq-len=512 --device-batch-size=32 --total-batch-size=16384 --num-iterations=5000 \
--eval-every=100 --eval-tokens=524288 --core-metric-every=-1 --sample-every=100}"
: "${BASE_EVAL=--device-batch-size=1 --split-tokens=16384 --max-per-task=16}"
: "${CHAT_SFT=--eval-every=200 --eval-tokens=524288 --num-iterations=1500 --chatcore-every=-1}" "${CHAT_EVAL=-x 100}"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

python -m nanochat.report reset
python -m nanochat.dataset $DATASET
python -m scripts.tok_train $TOK_TRAIN
python -m scripts.tok_eval
python -m scripts.base_train --depth="$DEPTH" --model-tag="d$DEPTH" $BASE_TRAIN
python -m scripts.base_eval --model-tag="d$DEPTH" $BASE_EVAL
python -m scripts.chat_sft --model-tag="d$DEPTH" $CHAT_SFT
python -m scripts.chat_eval -i sft -g "d$DEPTH" $CHAT_EVAL

printf '\n=== %s\n\n' "$QUESTION"
python -m scripts.chat_cli -i sft -g "d$DEPTH" -p "$QUESTION"
printf '\n=== report\n'
python -m nanochat.report generate --model-tag="d$DEPTH"
cat <<END

Look at report.html. Ask it yourself, in the page that this serves:

    NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR" $PWD/.venv/bin/python -m scripts.chat_web -i sft -g d$DEPTH
END
