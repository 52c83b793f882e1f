#!/bin/bash
# Models of several depths, each trained for the same FLOPs, at several budgets: which size is best for a budget.
# The table is scaling_laws_results_<label>/results.csv in NANOCHAT_BASE_DIR, by default ~/.cache/nanochat; analysis/scaling.py writes it,
# fits the best size and the best number of tokens for a budget, and draws both beside the table.
#
#   bash runs/scaling_laws.sh
#   LABEL=mine FLOPS="1e17 1e18" DEPTHS="6 8 10 12" bash runs/scaling_laws.sh    LABEL names the runs; those that are finished are skipped
#   SKIP_SETUP=1 bash runs/scaling_laws.sh                                      with the text and the tokenizer that are there
#
# All sizes are variables, with their defaults below; a variable named like a script holds its flags.
# Without GPUs the recipe ends at once; DEVICE_TYPE=cpu tries it out.
# shellcheck disable=SC2086  # the flags in a variable are words
set -euo pipefail
: "${NPROC_PER_NODE=8}" "${DEVICE_TYPE=cuda}" "${LABEL=jan26}" "${FLOPS=1e18 2.15e18 4.64e18 1e19}" "${DEPTHS=10 12 14 16 18 20}"
: "${DATASET=-n 1000}" "${TOK_TRAIN=--vocab-size=32768}"
: "${BASE_TRAIN=--eval-tokens=52428800 --core-metric-every=999999 --core-metric-max-per-task=-1 --sample-every=-1 --save-every=-1}"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
begin_recipe
get_text
results() { python -m analysis.scaling scaling_laws "$LABEL"; }
trap results EXIT  # what is finished is in the table, whatever happens
python -m analysis.sweep - --flags="$BASE_TRAIN" <<END
name = "${LABEL}_scaling"
tag = "${LABEL}_scaling_{target-flops}_d{depth}"
ranks = $NPROC_PER_NODE
[fixed]
device-type = "$DEVICE_TYPE"
target-param-data-ratio = -1
[grid]
target-flops = [$(printf '"%s", ' $FLOPS)]
depth = [$(printf "%s, " $DEPTHS)]
END
