#!/bin/bash
# A model of GPT-2's strength on one node with 8 H100 GPUs, from nothing to a chat. It writes to NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.
#
#   bash runs/speedrun.sh
#   WANDB_RUN=speedrun bash runs/speedrun.sh    with curves on wandb under that name (log in first)
#   NPROC_PER_NODE=4 bash runs/speedrun.sh      on 4 GPUs: the same model in about twice the time
#
# All sizes are variables, with their defaults below. A variable named like a script holds its flags: BASE_TRAIN replaces those of
# scripts.base_train (GPUs before Hopper and Ada have no FP8: leave out --fp8), DATASET those of nanochat.dataset, and so on.
# Without GPUs the recipe ends at once; DEVICE_TYPE=cpu tries it out, with toy sizes as in tests/test_recipes.py.
# shellcheck disable=SC2086  # the flags in a variable are words
set -euo pipefail
FIRST_DATA="${DATASET--n 8}"
: "${NPROC_PER_NODE=8}" "${DEVICE_TYPE=cuda}" "${DEPTH=24}" "${QUESTION=Why is the sky blue?}"
: "${DATASET=-n 170}" "${TOK_TRAIN=}" "${BASE_TRAIN=--target-param-data-ratio=8 --device-batch-size=16 --fp8}" "${BASE_EVAL=--device-batch-size=16}"
: "${CHAT_SFT=}" "${CHAT_EVAL=}"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
begin_recipe

python -m nanochat.report reset

# The tokenizer needs 8 shards; the rest of what pretraining reads arrives meanwhile.
python -m nanochat.dataset $FIRST_DATA
python -m nanochat.dataset $DATASET &
DOWNLOAD=$!
trap 'kill $DOWNLOAD 2>/dev/null || true' EXIT
python -m scripts.tok_train $TOK_TRAIN
python -m scripts.tok_eval
wait $DOWNLOAD

torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.base_train --device-type="$DEVICE_TYPE" --depth="$DEPTH" --model-tag="d$DEPTH" $BASE_TRAIN
torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.base_eval --device-type="$DEVICE_TYPE" --model-tag="d$DEPTH" $BASE_EVAL
torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.chat_sft --device-type="$DEVICE_TYPE" --model-tag="d$DEPTH" $CHAT_SFT
torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.chat_eval --device-type="$DEVICE_TYPE" -i sft -g "d$DEPTH" $CHAT_EVAL

printf '\n=== %s\n\n' "$QUESTION"
python -m scripts.chat_cli --device-type="$DEVICE_TYPE" -i sft -g "d$DEPTH" -p "$QUESTION"
printf '\n=== report\n'
python -m nanochat.report generate --model-tag="d$DEPTH"
cat <<END

Look at report.html. Ask it yourself, in the page that this serves:

    NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR" $PWD/.venv/bin/python -m scripts.chat_web -i sft -g d$DEPTH
END
