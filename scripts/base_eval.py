"""Evaluates a base model: sample texts, bits per byte on the pretraining data, and the CORE benchmark.

    python -m scripts.base_eval --model-tag=d12
    torchrun --nproc_per_node=8 -m scripts.base_eval --eval=core,bpb

Samples and scores are printed and noted in the report; CORE goes to base_dir/base_eval/base_model_<step>.csv. The CORE data is
the folder base_dir/eval_bundle, downloaded if it is not there.
"""
import argparse
import os
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from nanochat.checkpoint_manager import build_model, checkpoints_dir_of, find_checkpoint
from nanochat.cli import ArgumentParser, UsageError, command, int_or_off, non_negative_int, positive_int
from nanochat.common import (
    PROGRESS_SECONDS,
    autodetect_device_type,
    compute_cleanup,
    compute_init,
    download_file_with_lock,
    get_base_dir,
    print0,
    with_progress,
)
from nanochat.core_eval import CORE_TASKS, evaluate_task, load_bundle
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
from nanochat.engine import Engine, check_causal
from nanochat.files import check_writable, write_text_atomic
from nanochat.loss_eval import evaluate_bpb
from nanochat.mlm import pseudo_perplexity
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MODES = ("core", "bpb", "sample", "pll")

PROMPTS = [
    "The city that serves as the capital of Italy is",
    "Chemists write silver with the symbol",
    "The day of the week that follows Monday is",
    "A word that means the opposite of big is",
    "Counted outward from the Sun, the planets are",
    "On a clear day the colour of the sky is",
    "Solving 2x + 1 = 7 for x gives x =",
]

# -----------------------------------------------------------------------------
# Samples


def sample_prompts(engine: Engine, tokenizer) -> list[str]:
    """Each of `PROMPTS` with the model's greedy continuation of 16 tokens."""
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, prepend=tokenizer.get_bos_token_id())
        (sample,), _ = engine.generate_batch(tokens, max_tokens=16, temperature=0.0)
        texts.append(tokenizer.decode(sample[1:]))
    return texts


def sample_unconditioned(engine: Engine, tokenizer, num_samples: int = 8) -> list[str]:
    """Texts of up to 128 tokens that the model writes from nothing, at temperature 1."""
    samples, _ = engine.generate_batch([tokenizer.get_bos_token_id()], num_samples=num_samples, max_tokens=128, temperature=1.0)
    return [tokenizer.decode(sample[1:]) for sample in samples]


# -----------------------------------------------------------------------------
# CORE


def place_eval_bundle(file_path: str | os.PathLike) -> None:
    """Unpacks the zip's folder `eval_bundle` into the base directory, as a whole or not at all. Raises UsageError for a bad zip."""
    base_dir = Path(get_base_dir()).resolve()
    with tempfile.TemporaryDirectory(dir=base_dir, prefix=".eval_bundle.") as temporary:
        try:
            with zipfile.ZipFile(file_path) as archive:
                for name in archive.namelist():
                    if not Path(temporary, name).resolve().is_relative_to(temporary):
                        raise UsageError(f"{file_path} would write outside its folder ({name!r}): delete it, it is not the CORE bundle")
                archive.extractall(temporary)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UsageError(f"{file_path} is not an intact zip file ({error}): delete it, so that it is downloaded again") from error
        bundle = Path(temporary, "eval_bundle")
        if not bundle.is_dir():
            raise UsageError(f"{file_path} has no folder eval_bundle: delete it, it is not the CORE bundle")
        bundle.rename(base_dir / "eval_bundle")


def find_eval_bundle() -> Path:
    """The CORE data in the base directory, downloaded if need be. Raises UsageError without data and network."""
    bundle = Path(get_base_dir(), "eval_bundle")
    if not bundle.is_dir():
        try:
            archive = download_file_with_lock(EVAL_BUNDLE_URL, "eval_bundle.zip")
        except UsageError as error:
            raise UsageError(f"{error}, or its unpacked content at {bundle}") from error
        with FileLock(f"{archive}.lock"):
            if not bundle.is_dir():
                place_eval_bundle(archive)
    return bundle


def evaluate_core(model, tokenizer, device, max_per_task: int = -1) -> dict:
    """{"results": accuracy by task, "centered_results", "core_metric": the mean of the centered results}.

    All ranks call it and get the same. `max_per_task` above 0 takes that many rows of each task. A bundle may lack tasks; the
    output says so. Raises UsageError for data that cannot be evaluated, before anything is.
    """
    tasks, missing = load_bundle(find_eval_bundle(), max_per_task)
    total_work, done_work = sum(task.work for task in tasks), 0
    started = shown = time.perf_counter()

    def progress(fraction: float) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            done = (done_work + fraction * task.work) / total_work
            print0(f"{fraction:.0%} (all of CORE: {done:.0%}, eta {(now - started) * (1 - done) / done / 60:.1f}m) ", end="", flush=True)

    results, centered_results = {}, {}
    for task in tasks:
        task_started = time.perf_counter()
        print0(f"Evaluating: {task.label} ({task.meta['num_fewshot']}-shot, type: {task.meta['task_type']})... ", end="", flush=True)
        accuracy = evaluate_task(model, tokenizer, task.data, device, task.meta, progress)
        results[task.label], centered_results[task.label] = accuracy, task.centered(accuracy)
        done_work += task.work
        print0(f"accuracy: {accuracy:.4f} | centered: {task.centered(accuracy):.4f} | time: {time.perf_counter() - task_started:.2f}s", flush=True)
    if len(tasks) != CORE_TASKS:
        print0(f"The CORE metric is the mean of {len(tasks)} of {CORE_TASKS} tasks, not comparable with published numbers"
               + (f"; no data for {', '.join(missing)}" if missing else ""))
    return {"results": results, "centered_results": centered_results, "core_metric": sum(centered_results.values()) / len(tasks)}


def core_csv(core: dict) -> str:
    """What `evaluate_core` returns as a table of three padded columns."""
    def line(name: str, accuracy: str, centered: str) -> str:
        return f"{name:<35}, {accuracy:<10}, {centered:<10}\n"
    rows = [line(label, f"{accuracy:.6f}", f"{core['centered_results'][label]:.6f}") for label, accuracy in core["results"].items()]
    return line("Task", "Accuracy", "Centered") + "".join(rows) + line("CORE", "", f"{core['core_metric']:.6f}")


# -----------------------------------------------------------------------------


def evaluation_modes(text: str) -> list[str]:
    modes = [mode.strip() for mode in text.split(",")]
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"unknown evaluation {mode!r}: use any of {', '.join(MODES)}, joined by commas")
    return modes


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description="Evaluate a base model")
    parser.add_argument("--eval", type=evaluation_modes, default=None,
                        help=f"what to do, joined by commas: {', '.join(MODES)} (default: pll for a model of hidden tokens, the others for all others)")
    parser.add_argument("--model-tag", default=None, help="model to evaluate (default: the largest)")
    parser.add_argument("--step", type=non_negative_int, default=None, help="checkpoint to evaluate (default: the last)")
    parser.add_argument("--max-per-task", type=int_or_off, default=-1, help="rows of each CORE task, -1 for all")
    parser.add_argument("--device-batch-size", type=positive_int, default=32, help="sequences per rank and forward pass, for bpb")
    parser.add_argument("--split-tokens", type=positive_int, default=40 * 524288, help="tokens of each split, for bpb")
    parser.add_argument("--pll-tokens", type=positive_int, default=4096, help="tokens to hide one by one, a forward pass for each, for pll")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    args = parser.parse_args(argv)

    _, rank, _, world_size, device = compute_init(args.device_type or autodetect_device_type())
    try:
        report, results = get_report(), Path(get_base_dir(), "base_eval")
        if (args.eval is None or "core" in args.eval) and rank == 0:
            check_writable(results)
        folder, step = find_checkpoint(checkpoints_dir_of("base"), args.model_tag, args.step)
        model, tokenizer, _ = build_model(folder, step, device, phase="eval")
        causal = getattr(model.config, "causal", True)
        args.eval = args.eval or (["core", "bpb", "sample"] if causal else ["pll"])
        if args.eval != ["pll"]:
            check_causal(model)
        elif causal:
            raise UsageError("--eval=pll is for a model of hidden tokens (--objective=mlm); use bpb for this one")
        sequence_len = model.config.sequence_len
        tokens_per_step = args.device_batch_size * sequence_len * world_size
        if "bpb" in args.eval and args.split_tokens < tokens_per_step:
            raise UsageError(f"--split-tokens={args.split_tokens} is less than one batch of {tokens_per_step} tokens ({args.device_batch_size} "
                             f"sequences of {sequence_len} on {world_size} ranks): raise it, or lower --device-batch-size")
        if "core" in args.eval:
            load_bundle(find_eval_bundle(), args.max_per_task)  # bad data shows now, not after an hour
        summary: dict = {"model": f"{folder.name} (step {step})"}
        details: list[dict] = []

        if "sample" in args.eval and rank == 0:
            engine = Engine(model, tokenizer)
            for name, texts in ("sample", sample_prompts(engine, tokenizer)), ("unconditioned", sample_unconditioned(engine, tokenizer)):
                for i, text in enumerate(texts):
                    print0(f"[{name} {i}] {text}")
                details.append({f"{name} {i}": text for i, text in enumerate(texts)})

        if "bpb" in args.eval:
            token_bytes = get_token_bytes(device)
            for split in ("train", "val"):
                batches = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, args.device_batch_size, sequence_len, split, device=device)
                steps = args.split_tokens // tokens_per_step
                summary[f"{split} bpb"] = evaluate_bpb(model, with_progress(batches, steps, f"{split} bpb"), steps, token_bytes)
                print0(f"{split} bpb: {summary[f'{split} bpb']:.6f}")

        if "pll" in args.eval:
            rows = -(-args.pll_tokens // sequence_len)
            batches = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, 1, sequence_len, "val", device=device)
            perplexity, bits = pseudo_perplexity(model, with_progress(batches, rows, "pseudo-log-likelihood"), rows, tokenizer)
            summary |= {"val pseudo-perplexity": perplexity, "val pseudo bpb": bits}
            print0(f"val pseudo-perplexity: {perplexity:.3f}, {bits:.6f} bits per byte")

        if "core" in args.eval:
            core = evaluate_core(model, tokenizer, device, args.max_per_task)
            summary["CORE metric"] = core["core_metric"]
            details.insert(0, core["centered_results"])
            print0(f"CORE metric: {core['core_metric']:.4f}")
            if rank == 0:
                path = results / f"base_model_{step:06d}.csv"
                write_text_atomic(path, core_csv(core))
                print0(f"Written to {path}")

        report.log(section="Base model evaluation", data=[summary, *details])
    finally:
        compute_cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
