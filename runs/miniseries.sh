#!/bin/bash
# One model of each depth, each trained to the same number of tokens per parameter: how loss and CORE fall with size.
# The table is <series>_miniseries_results/results.csv in NANOCHAT_BASE_DIR, by default ~/.cache/nanochat; analysis/scaling.py writes it.
#
#   bash runs/miniseries.sh [SERIES]            SERIES (default: mini) names the runs; with that of an earlier call, finished ones are skipped
#   SKIP_SETUP=1 bash runs/miniseries.sh        with the text and the tokenizer that are there
#
# All sizes are variables, with their defaults below; a variable named like a script holds its flags.
# Without GPUs the recipe ends at once; DEVICE_TYPE=cpu tries it out.
# shellcheck disable=SC2086  # the flags in a variable are words
set -euo pipefail
SERIES_NAME="${1:-${SERIES_NAME:-mini}}"
set --  # setup.sh has arguments of its own
: "${NPROC_PER_NODE=8}" "${DEVICE_TYPE=cuda}" "${DEPTHS=12 14 16 18 20 22 24 26}" "${DATASET=-n 1000}" "${TOK_TRAIN=--vocab-size=32768}"
: "${BASE_TRAIN=--core-metric-every=999999 --core-metric-max-per-task=-1 --sample-every=-1 --save-every=-1}"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
begin_recipe
get_text
BATCHES=""
for DEPTH in $DEPTHS; do BATCHES+="$((DEPTH >= 28 ? 8 : DEPTH >= 20 ? 16 : 32)), "; done
results() { python -m analysis.scaling miniseries "$SERIES_NAME"; }
trap results EXIT  # what is finished is in the table, whatever happens
python -m analysis.sweep - --flags="$BASE_TRAIN" <<END
name = "${SERIES_NAME}_miniseries"
tag = "${SERIES_NAME}_miniseries_d{depth}"
ranks = $NPROC_PER_NODE
[fixed]
device-type = "$DEVICE_TYPE"
[[together]]
depth = [$(printf "%s, " $DEPTHS)]
device-batch-size = [$BATCHES]
END
