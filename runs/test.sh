#!/bin/bash
# Sets up the environment and checks everything: ruff, mypy, pytest.
#
#   bash runs/test.sh           the fast tests, at most 5 minutes on 2 cores
#   bash runs/test.sh --slow    all tests
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
python -m pytest -q -n auto --maxprocesses=4 -m "$selection"
