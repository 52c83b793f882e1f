"""Evaluates a chat model: multiple choice (ARC, MMLU), answers and programs that are checked (GSM8K, HumanEval, spelling), ChatCORE.

    python -m scripts.chat_eval -i sft                      # the five tasks of ChatCORE
    python -m scripts.chat_eval -i sft -a "MMLU|GSM8K"
    python -m scripts.chat_eval -i sft -a SpellingBee       # letter counting in words it was not trained on; needs no network
    torchrun --nproc_per_node=8 -m scripts.chat_eval -i sft

ChatCORE is the mean accuracy over its five tasks, each rescaled so that guessing gives 0 and perfection 1.
"""
import argparse
import sys
from dataclasses import asdict, dataclass

from nanochat.checkpoint_manager import SOURCES, CheckpointSettings, build_model
from nanochat.cli import REQUIRED, command, flag, listed, non_negative_float, non_negative_int, parse_settings, positive_int
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, print0
from nanochat.engine import Engine
from nanochat.report import get_report
from tasks.evaluation import evaluate, run_categorical_eval, run_chat_eval, run_generative_eval  # noqa: F401 (nanochat's names, here)
from tasks.registry import CHATCORE, TASKS, chatcore


def known_task(name: str) -> str:
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"unknown task {name!r}: use any of {', '.join(TASKS)}, joined by |")
    return name


@dataclass
class Settings(CheckpointSettings):
    source: str = flag(REQUIRED, "Stage of training that the model comes from", choices=SOURCES, short="-i")
    task_name: list[str] | None = flag(None, f"Tasks, joined by |: any of {', '.join(TASKS)} (default: those of ChatCORE)", type=listed(known_task, "|"), short="-a")
    temperature: float = flag(0.0, "How freely answers are sampled; 0 always takes the likeliest token", type=non_negative_float, short="-t")
    max_new_tokens: int = flag(512, "Length of the longest answer in tokens", type=positive_int, short="-m")
    num_samples: int = flag(1, "Answers to a problem, of which one must be right", type=positive_int, short="-n")
    top_k: int = flag(50, "Number of likeliest tokens to sample among; 0: all tokens", type=non_negative_int, short="-k")
    batch_size: int = flag(8, "Problems in one pass", type=positive_int, short="-b")
    max_problems: int | None = flag(None, "Problems of each task (default: all)", type=positive_int, short="-x")
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, __doc__.splitlines()[0])

    *_, device = compute_init(settings.device_type or autodetect_device_type())
    try:
        report = get_report()
        tasks = {name: TASKS[name].test() for name in settings.task_name or CHATCORE}  # missing data show now, not after an hour
        _, folder, step = settings.find()
        model, tokenizer, _ = build_model(folder, step, device, phase="eval")
        engine = Engine(model, tokenizer)
        accuracies = {}
        for name, task in tasks.items():
            accuracies[name] = evaluate(task, model, tokenizer, engine, settings.batch_size, settings.num_samples, settings.max_new_tokens, settings.temperature,
                                        settings.top_k, settings.max_problems)
            print0(f"{name} accuracy: {100 * accuracies[name]:.2f}%", flush=True)
        summary: dict = {}
        if accuracies.keys() == CHATCORE.keys():
            summary["ChatCORE metric"] = chatcore(accuracies)
            print0(f"ChatCORE metric: {summary['ChatCORE metric']:.4f}")
        report.log(section=f"Chat evaluation {settings.source}", data=[{"model": f"{folder.name} (step {step})", **asdict(settings)}, accuracies, summary])
    finally:
        compute_cleanup()


if __name__ == "__main__":
    sys.exit(main())
