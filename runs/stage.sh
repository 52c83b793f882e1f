#!/bin/bash
# For recipes to source: commands that each make a file, and are not run again while it is there.
set -euo pipefail

REDO=""
stage() {  # NAME PRODUCT COMMAND...: runs the command unless its product exists and no earlier stage had to run
    local name=$1 product=$NANOCHAT_BASE_DIR/$2 recipe=${0##*/}
    shift 2
    if [[ -z $REDO && -e $product ]]; then
        printf '\n=== %s: done before (%s)\n' "$name" "$product"
        return
    fi
    REDO=yes
    printf '\n=== %s: %s\n' "$name" "$*"
    if ! "$@"; then
        printf '\n%s: stage "%s" failed, see above; the next run starts with it\n' "${recipe%.sh}" "$name" >&2
        exit 1
    fi
}
