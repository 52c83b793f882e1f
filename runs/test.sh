#!/bin/bash
# Sets up the environment and checks everything: ruff, mypy, pytest.
#
#   bash runs/test.sh           the fast tests, some 6 minutes on 2 old cores
#   bash runs/test.sh --slow    all tests, and the golden and property tests once more as another CPU would round
set -euo pipefail
case "${1:-}" in
    "") selection="not slow" ;;
    --slow) selection="" ;;
    *) echo "test: unknown argument $1; the only one is --slow" >&2; exit 2 ;;
esac
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" --dev

python -m ruff check .
python -m mypy
pytest=(python -m pytest -q -n auto --maxprocesses=4 --dist=worksteal)
"${pytest[@]}" --durations=20 -m "$selection"
if [ -z "$selection" ]; then
    # the oldest instructions that PyTorch and its two matrix libraries can do with; five golden files have no floating point
    export MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2
    "${pytest[@]}" tests/golden --ignore=tests/golden/test_{sandbox,tool_machine,tasks,tokenizer,calculator}.py
    # shellcheck disable=SC2046
    "${pytest[@]}" -m hypothesis $(grep -l "@given" tests/test_*.py)
fi
