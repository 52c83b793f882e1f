#!/bin/bash
# The quickstart's model learns to spell words and to count their letters, and is asked about words that it has never seen.
# 2 CPU cores are enough, and no network is needed: the words are those of the text that the model was trained on.
#
#   bash runs/quickstart.sh
#   bash runs/chat.sh
#
# A second run keeps what exists; to fine-tune again, delete report/chat-sft.md in the quickstart's folder.
set -euo pipefail
SECONDS=0
# shellcheck source=runs/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
# shellcheck source=runs/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/quickstart"
if [[ ! -e $NANOCHAT_BASE_DIR/report/base-model-training.md ]]; then
    echo "chat: no finished model in $NANOCHAT_BASE_DIR; first: bash runs/quickstart.sh" >&2
    exit 1
fi

stage "fine-tuning" report/chat-sft.md python -m scripts.chat_sft --mixture=spelling \
    --max-seq-len=512 --device-batch-size=8 --total-batch-size=4096 --num-iterations=1500 \
    --init-lr-frac=1 --matrix-lr=0.03 --embedding-lr=0.45 --unembedding-lr=0.012 --warmdown-ratio=1 \
    --eval-every=375 --eval-tokens=16384 --chatcore-every=-1
stage "evaluation" report/chat-evaluation-sft.md python -m scripts.chat_eval -i sft -a "SpellingBee|SpellingBee-Long|SimpleSpelling" -b 64
printf '\n=== report\n'
python -m nanochat.report generate

question="How many r are in strawberry?"
printf '\n=== %s\n\n' "$question"
python -m scripts.chat_cli -i sft -t 0 -p "$question"
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at report.html. Ask it yourself, in the page that this serves:

    NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR" $PWD/.venv/bin/python -m scripts.chat_web -i sft -t 0
END
