"""Evaluates base models: sample texts, bits per byte, CORE, BLiMP, NLI, SuperGLUE, any text file.

    python -m scripts.base_eval --model-tag=d12
    python -m scripts.base_eval --model-tag=d12 --step=all --eval=blimp,text --blimp=DATA/blimp.jsonl.gz --text=DATA/wiki.txt
    torchrun --nproc_per_node=8 -m scripts.base_eval --eval=core,bpb

What is found is printed, noted in the report, and kept with standard errors in eval_<step>.json beside the checkpoint (docs/evaluation.md); CORE goes to
base_dir/base_eval/base_model_<step>.csv too.
"""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.checkpoint_manager import CheckpointNotFound, build_model, checkpoints_dir_of, find_checkpoint, list_models, list_steps
from nanochat.cli import command, flag, int_or_off, non_negative_int, parse_settings, positive_int
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, get_base_dir, get_dist_info, print0
from nanochat.evals.results import headlines, read_results, results_path, table, write_results
from nanochat.evaluations import EVALUATIONS, EvaluationSettings, Subject, check, choose, evaluate, requests
from nanochat.files import check_writable
from nanochat.report import get_report

ALL = "all"


def step_or_all(text: str) -> int | str:
    try:
        return text if text == ALL else non_negative_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no step, and not {ALL}") from None


@dataclass
class Settings(EvaluationSettings):
    eval: list[str] | None = flag(
        None, "What to do, joined by commas, each with or without a number, as in blimp:10,core: "
        + ", ".join(f"{name}[:{evaluation.counts}]" for name, evaluation in EVALUATIONS.items())
        + f" (default: {', '.join(name for name, evaluation in EVALUATIONS.items() if evaluation.default and evaluation.causal)}, or pll for a model of hidden tokens)",
        type=requests)
    max_per_task: int = flag(-1, "Rows of each task of CORE; -1: all", type=int_or_off)
    device_batch_size: int = flag(32, "Rows per rank and forward pass of bpb", type=positive_int)
    split_tokens: int = flag(40 * 524288, "Tokens of each split that bpb reads", type=positive_int)
    model_tag: str | None = flag(None, f"Model to evaluate, or {ALL} (default: the largest)")
    step: int | str | None = flag(None, f"Checkpoint to evaluate, or {ALL} of the model (default: the last)", type=step_or_all)
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


def checkpoints(settings: Settings) -> list[tuple[Path, int]]:
    """(folder, step) of each that is asked for. Raises CheckpointNotFound."""
    parent = checkpoints_dir_of("base")
    tags: list = list_models(parent) if settings.model_tag == ALL else [settings.model_tag]
    if not tags:
        raise CheckpointNotFound(f"no model in {parent}; train one first with python -m scripts.base_train")
    found = []
    for tag in tags:
        folder, step = find_checkpoint(parent, tag, None if settings.step == ALL else settings.step)  # type: ignore[arg-type]
        found += [(folder, one) for one in (list_steps(folder) if settings.step == ALL else [step])]
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(Settings, argv, "Evaluate base models")
    # nanochat's flags for what NAME:N says, so their results are kept under that name and not in the place of the whole set's
    limits = {"core": settings.max_per_task if settings.max_per_task > 0 else None, "bpb": settings.split_tokens if settings.split_tokens != Settings.split_tokens else None}
    *_, device = compute_init(settings.device_type or autodetect_device_type())
    try:
        report, master = get_report(), get_dist_info()[1] == 0
        sections: list = []
        for folder, step in checkpoints(settings):
            if master:
                check_writable(folder)
                read_results(results_path(folder, step))
            model, tokenizer, meta = build_model(folder, step, device, phase="eval")
            subject = Subject(model, tokenizer, device, settings, step, settings.device_batch_size, settings.split_tokens, settings.max_per_task,
                              tables=Path(get_base_dir(), "base_eval"))
            chosen = [one.within(limits.get(one.name)) for one in choose(settings.eval, model)]
            check(chosen, subject)
            results, details = evaluate(chosen, subject)
            if master and results:
                spent = dict(tokens=meta["step"] * meta["total_batch_size"] if "total_batch_size" in meta else None, flops=meta.get("loop_state", {}).get("flops"))
                print0(f"Results: {write_results(folder, step, results, **spent)}")
            rows = [(key, asdict(row)) for key, row in results.items()]
            sections += [{"model": f"{folder.name} (step {step})"} | headlines(results), "\n" + table(rows) if rows else None, *details]
        report.log(section="Base model evaluation", data=sections)
    finally:
        compute_cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
