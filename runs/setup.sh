#!/bin/bash
# Makes the Python environment .venv in the project folder, with uv where it is installed, else with venv and pip.
# Run it, or source it from a recipe: then the environment comes first in PATH, and the current folder is the project's.
#
#   bash runs/setup.sh          what training needs
#   bash runs/setup.sh --dev    also what the tests need
#
# With uv PyTorch is the build for the hardware that is here, with pip the one of PyPI (on Linux for CUDA). PIP_FIND_LINKS is honoured.
# A second run has nothing to do and takes no time; after a change of pyproject.toml it installs what changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_fail() { echo "setup: $*" >&2; exit 1; }

usable_python() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

setup_venv() {
    local dev="" gpu="" stamp=.venv/nanochat.stamp sum have python="" candidate extras link links=""
    case "${1:-}" in
        "") ;;
        --dev) dev=yes ;;
        *) setup_fail "unknown argument $1; the only one is --dev" ;;
    esac
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then gpu=yes; fi

    # The stamp says what is installed. It is written last, so a half-made environment has none.
    sum=$(cksum < pyproject.toml)
    have=$(cat "$stamp" 2>/dev/null || true)
    if ! usable_python .venv/bin/python || [[ -n $gpu && -n $have && $have != *" gpu"* ]]; then
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
            if usable_python "$candidate"; then python=$candidate; break; fi
        done
        rm -rf .venv
        if command -v uv >/dev/null; then
            uv venv --quiet --python "${python:-3.12}" .venv || setup_fail "uv could not make .venv"  # uv fetches a Python where there is none
        elif [ -n "$python" ]; then
            "$python" -m venv .venv || setup_fail "cannot make .venv; on Debian and Ubuntu: apt install python3-venv"
        else
            setup_fail "no Python 3.10 or newer found; install one, or install uv, which brings its own"
        fi
    elif [[ $have == "$sum "* && ( -z $dev || $have == *" dev"* ) && ( -z $gpu || $have == *" gpu"* ) ]]; then
        return
    fi

    rm -f "$stamp"
    extras="${dev:+dev}${dev:+${gpu:+,}}${gpu:+gpu}"
    echo "setup: installing the packages into .venv (the first time that is a download of some hundred MB, with CUDA some GB)"
    if command -v uv >/dev/null; then
        for link in ${PIP_FIND_LINKS:-}; do links="$links --find-links $link"; done
        if [ -z "$links" ]; then export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-auto}"; fi  # with wheels at hand PyTorch's index is not asked
        # shellcheck disable=SC2086
        uv pip install --python .venv/bin/python $links -e ".${extras:+[$extras]}" || setup_fail "uv could not install the packages"
    else
        .venv/bin/python -m pip install -e ".${extras:+[$extras]}" || setup_fail "pip could not install the packages"
    fi
    echo "$sum ${dev:+ dev}${gpu:+ gpu}" > "$stamp"
    if [ -z "$gpu" ] && ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
        echo "setup: no C++ compiler found, so torch.compile is off and training slower; on Debian and Ubuntu: apt install g++"
    fi
}

# Ends a recipe before its first download where PyTorch cannot use so many GPUs; training would land on the CPU, or end in an hour.
require_gpus() {
    python - "$1" "${0##*/}" <<'END'
import sys, warnings
import torch
wanted, recipe = int(sys.argv[1]), sys.argv[2].removesuffix(".sh")
warnings.simplefilter("ignore")
found = torch.cuda.device_count() if torch.cuda.is_available() else 0
why = ""
if not found:
    try:
        torch.cuda.init()  # raises what is_available() swallows: a driver that is too old, say
    except Exception as error:
        why = f" ({str(error).splitlines()[0].rstrip('.')})"
if found < wanted:
    sys.exit(f"{recipe}: {wanted} GPUs are asked for and PyTorch {torch.__version__} can use {found}{why}; "
             "set NPROC_PER_NODE to what nvidia-smi lists, or DEVICE_TYPE=cpu to try the recipe out")
END
}

# Of a recipe: ends it without the GPUs that it asks for, and settles where everything goes.
begin_recipe() {
    if [[ $DEVICE_TYPE == cuda ]]; then require_gpus "$NPROC_PER_NODE"; fi
    export OMP_NUM_THREADS=1
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
}

# The recipe's text and tokenizer, unless SKIP_SETUP says that they are there.
# shellcheck disable=SC2086  # the flags in a variable are words
get_text() {
    if [[ -z ${SKIP_SETUP-} ]]; then
        python -m nanochat.dataset $DATASET
        python -m scripts.tok_train $TOK_TRAIN
    fi
}

setup_venv "$@"
export PATH="$PWD/.venv/bin:$PATH"
