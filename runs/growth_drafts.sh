#!/bin/bash
# The drafts' study of growth at 64 million parameters on one or more GPUs, from nothing to its table and picture (analysis/growth_drafts.py).
# It writes to NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. SNLI and MNLI are measured if the folder `nli` is there (docs/evaluation.md).
#
#   bash runs/growth_drafts.sh
#   SKIP_SETUP=1 bash runs/growth_drafts.sh     with the text and the tokenizer that are there; goes on where it was stopped
#
# All sizes are variables, with their defaults below; a variable named like a script holds its flags.
# Without GPUs the recipe ends at once; DEVICE_TYPE=cpu tries it out, with GROWTH_DRAFTS=--size=cpu and TOK_TRAIN=--vocab-size=2048.
# shellcheck disable=SC2086  # the flags in a variable are words
set -euo pipefail
: "${NPROC_PER_NODE=1}" "${DEVICE_TYPE=cuda}" "${DATASET=-n 40}" "${TOK_TRAIN=--vocab-size=12288}" "${GROWTH_DRAFTS=--size=64m --seeds=3}"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
begin_recipe
get_text
python -m analysis.growth_drafts --jobs="$NPROC_PER_NODE" --out="$NANOCHAT_BASE_DIR/growth_drafts.json" --plot="$NANOCHAT_BASE_DIR/growth_drafts.png" $GROWTH_DRAFTS
