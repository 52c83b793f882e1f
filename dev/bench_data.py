"""Speed of the data path, as ratios, in one call:

    python -m dev.bench_data --model-tok-per-sec=30000

* The loader, tokenization included, against what a model consumes.
* Tokenizer training and encoding against the `tokenizers` library: same text, vocabulary size, split pattern and threads.

Uses the text in the data directory, or else the standard library's in a temporary one. Times are the best of three.
"""
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from nanochat import dataset
from nanochat.cli import ArgumentParser, UsageError, command, positive_float, positive_int
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

Measurement = tuple[float, float, int]  # seconds to train, seconds to encode, tokens


def train_ours(texts: list[str], vocab_size: int) -> RustBPETokenizer:
    logging.getLogger("rustbpe").setLevel(logging.WARNING)
    return RustBPETokenizer.train_from_iterator(iter(texts), vocab_size)


def measure_ours(texts: list[str], vocab_size: int, threads: int) -> Measurement:
    start = time.perf_counter()
    tokenizer = train_ours(texts, vocab_size)
    trained = time.perf_counter()
    rows = tokenizer.encode(texts, num_threads=threads)
    return trained - start, time.perf_counter() - trained, sum(len(row) for row in rows)


def measure_tokenizers(texts: list[str], vocab_size: int, threads: int) -> Measurement:
    """The same with the `tokenizers` library, whose threads the environment sets."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    start = time.perf_counter()
    tokenizer.train_from_iterator(iter(texts), trainer)
    trained = time.perf_counter()
    rows = tokenizer.encode_batch_fast(texts)  # without offsets, which tiktoken does not compute either
    return trained - start, time.perf_counter() - trained, sum(len(row) for row in rows)


def best_of_three(measure: Callable[..., Measurement], texts: list[str], vocab_size: int, threads: int) -> Measurement:
    """In a fresh process, where the libraries take their number of threads from the environment."""
    os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true" if threads > 1 else "false")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        train, encode, tokens = zip(*(pool.submit(measure, texts, vocab_size, threads).result() for _ in range(3)), strict=True)
    return min(train), min(encode), tokens[0]


def loader_speed(texts: list[str], vocab_size: int, threads: int, seconds: float) -> float:
    """Tokens per second of training batches."""
    tokenizer = train_ours(texts, vocab_size)
    loader = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, 32, 512, "train", tokenizer_threads=threads, device="cpu")
    next(loader)  # fills the buffer
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(loader)
        batches += 1
    return batches * 32 * 512 / (time.perf_counter() - start)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Speed of the data path")
    parser.add_argument("--model-tok-per-sec", type=positive_float, default=30000,
                        help="what the model trains on; 30000 is a d4 on two CPU cores")
    parser.add_argument("--threads", type=positive_int, default=min(2, os.cpu_count() or 1),
                        help="threads of the multi-threaded measurements")
    parser.add_argument("--vocab-size", type=positive_int, default=32768)
    parser.add_argument("--max-chars", type=positive_int, default=20_000_000, help="text to train the tokenizers on")
    args = parser.parse_args(argv)
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UsageError("the comparison needs the tokenizers library: pip install tokenizers") from error

    with tempfile.TemporaryDirectory() as temporary:
        if not dataset.list_parquet_files():
            os.environ["NANOCHAT_BASE_DIR"] = temporary
            dataset.get_local("stdlib", force=False)
        texts: list[str] = []
        characters = 0
        for documents in dataset.parquets_iter_batched("train"):
            texts += documents
            characters += sum(map(len, documents))
            if characters > args.max_chars:
                break
        size = sum(len(text.encode()) for text in texts)
        speed = loader_speed(texts, args.vocab_size, args.threads, seconds=5)
        print(f"loader with tokenization, {args.threads} threads: {speed:,.0f} tokens/s = "
              f"{speed / args.model_tok_per_sec:.1f} x the model's {args.model_tok_per_sec:,.0f} tokens/s")
        print(f"tokenizers, {size / 1e6:.1f} MB of {dataset.data_source()}, {args.vocab_size:,} tokens:")
        for threads in sorted({1, args.threads}):
            ours, theirs = (best_of_three(measure, texts, args.vocab_size, threads) for measure in (measure_ours, measure_tokenizers))
            print(f"  {threads} thread(s): training {ours[0]:.2f} s against {theirs[0]:.2f} s = {theirs[0] / ours[0]:.1f} x as fast; "
                  f"encoding {size / ours[1] / 1e6:.1f} against {size / theirs[1] / 1e6:.1f} MB/s = {theirs[1] / ours[1]:.1f} x as fast")
        print(f"  bytes per token: {size / ours[2]:.4f} against {size / theirs[2]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
