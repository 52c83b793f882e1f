"""Trains the tokenizer on the training split and saves it in `base_dir/tokenizer`:

    python -m scripts.tok_train --max-chars=2000000000 --vocab-size=32768

Writes `tokenizer.pkl` and `token_bytes.pt` (int32 (V,): bytes of each token, 0 for specials), with which losses
turn into bits per byte, the unit that can be compared across vocabularies.
"""
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from nanochat.cli import UsageError, command, flag, parse_settings, positive_int
from nanochat.common import get_base_dir
from nanochat.dataset import parquets_iter_batched
from nanochat.files import atomic_path, check_writable, locked
from nanochat.report import get_report
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

ROUND_TRIP = """Mixed text: 1, 22, 333 and 4,444.5; it's, we'll, DON'T; tabs\tand  spaces \r\n\n
<|bos|> is plain text here, and so is <|user_end|>. 你好，世界 — 안녕하세요 — Здравствуйте 🌱👩‍🔬 naïve ½ \u00a0"""


def documents(max_chars: int, doc_cap: int) -> Iterator[str]:
    """Training documents cut to `doc_cap` characters, up to the one that brings their sum above `max_chars`."""
    total, report_at = 0, 100_000_000
    for batch in parquets_iter_batched("train"):
        for text in batch:
            text = text[:doc_cap]
            total += len(text)
            yield text
            if total > max_chars:
                return
        if total >= report_at:
            print(f"Read {total / 1e6:,.0f} of at most {max_chars / 1e6:,.0f} million characters", flush=True)
            report_at += 100_000_000


def sparse_progress(record: logging.LogRecord) -> bool:
    """Log filter: of the trainer's lines for each percent, every twentieth."""
    percent = re.match(r"Progress: (\d+)%", record.getMessage())
    return percent is None or int(percent[1]) % 20 == 0


@dataclass
class Settings:
    max_chars: int = flag(2_000_000_000, "Characters to train on", type=positive_int)
    doc_cap: int = flag(10_000, "Characters to take from each document at most", type=positive_int)
    vocab_size: int = flag(32768, "Tokens of the vocabulary, counting the special ones", type=positive_int)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, "Train the tokenizer")
    smallest = 256 + len(SPECIAL_TOKENS)
    if settings.vocab_size < smallest:
        raise UsageError(f"--vocab-size={settings.vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens take {smallest}")
    if settings.vocab_size >= 2 ** 31:
        raise UsageError(f"--vocab-size={settings.vocab_size} is too large; use some ten thousand")
    directory, report = os.path.join(get_base_dir(), "tokenizer"), get_report()
    check_writable(directory)
    for name, value in asdict(settings).items():
        print(f"{name}: {value:,}")

    logging.getLogger("rustbpe").addFilter(sparse_progress)
    start = time.monotonic()
    tokenizer = RustBPETokenizer.train_from_iterator(documents(settings.max_chars, settings.doc_cap), settings.vocab_size)
    seconds = time.monotonic() - start
    print(f"Training time: {seconds:.2f}s")
    size = tokenizer.get_vocab_size()
    if size < settings.vocab_size:
        print(f"Warning: only {size:,} tokens instead of {settings.vocab_size:,}, for lack of different text; more text would give more")
    assert tokenizer.decode(tokenizer.encode(ROUND_TRIP)) == ROUND_TRIP

    token_bytes = tokenizer.token_bytes()
    bytes_file = os.path.join(directory, "token_bytes.pt")
    with locked(directory):  # the two files belong together: while the first is new, there is no second
        with contextlib.suppress(FileNotFoundError):
            os.unlink(bytes_file)
        tokenizer.save(directory)
        with atomic_path(bytes_file) as temporary:
            torch.save(token_bytes, temporary)

    lengths = token_bytes[token_bytes > 0].double()
    report.log(section="Tokenizer training", data=[
        asdict(settings),
        {"train_time": seconds, "num_special_tokens": len(tokenizer.get_special_tokens())},
        {f"token_bytes_{name}": getattr(lengths, name)().item() for name in ("min", "max", "mean", "std")},
    ])


if __name__ == "__main__":
    sys.exit(main())
