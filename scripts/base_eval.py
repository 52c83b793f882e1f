"""Evaluates a base model: sample texts, bits per byte on the pretraining data, and the CORE benchmark.

    python -m scripts.base_eval --model-tag=d12
    torchrun --nproc_per_node=8 -m scripts.base_eval --eval=core,bpb

Samples and scores are printed and noted in the report; CORE goes to base_dir/base_eval/base_model_<step>.csv. The CORE data is
the folder base_dir/eval_bundle, downloaded if it is not there.
"""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.checkpoint_manager import build_model, checkpoints_dir_of, find_checkpoint
from nanochat.cli import command, flag, non_negative_int, parse_settings
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init
from nanochat.evaluations import EVALUATIONS, EvaluationSettings, Subject, choose, evaluate
from nanochat.report import get_report


def evaluation_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in EVALUATIONS:
            raise argparse.ArgumentTypeError(f"unknown evaluation {name!r}: use any of {', '.join(EVALUATIONS)}, joined by commas")
    return names


@dataclass
class Settings(EvaluationSettings):
    eval: list[str] | None = flag(None, f"What to do, joined by commas: {', '.join(EVALUATIONS)} (default: pll for a model of hidden tokens, the others for "
                                        "all others)", type=evaluation_names)
    model_tag: str | None = flag(None, "Model to evaluate (default: the largest)")
    step: int | None = flag(None, "Checkpoint to evaluate (default: the last)", type=non_negative_int)
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


@command
def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(Settings, argv, "Evaluate a base model")
    *_, device = compute_init(settings.device_type or autodetect_device_type())
    try:
        report = get_report()
        folder, step = find_checkpoint(checkpoints_dir_of("base"), settings.model_tag, settings.step)
        model, tokenizer, _ = build_model(folder, step, device, phase="eval")
        summary, details = evaluate(choose(settings.eval, model), Subject(model, tokenizer, device, step, settings))
        report.log(section="Base model evaluation", data=[{"model": f"{folder.name} (step {step})"} | summary, *details])
    finally:
        compute_cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
