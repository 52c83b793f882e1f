"""What studies share: many short trainings by the runner (runner.py), each done once, and what is made of their results."""
import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from analysis.progress import Display
from analysis.runner import Place, Runner, Work, cpu_places
from analysis.trial import Result, Trial, folder_of, read
from nanochat.checkpoint_manager import list_steps
from nanochat.cli import ArgumentParser, UsageError, parse_settings, picture_path, positive_int
from nanochat.common import get_base_dir
from nanochat.dataset import parquets_iter_batched
from nanochat.layered_gpt import empty_gpt
from nanochat.run_plan import PlanSettings
from nanochat.tokenizer import get_tokenizer

# four layers of width 128
SHAPE = {"depth": 4, "aspect-ratio": 32, "head-dim": 32, "max-seq-len": 256, "window-pattern": "L", "device-batch-size": 16, "total-batch-size": 4096,
         "eval-every": 125, "eval-tokens": 65536}
TUNED = {"unembedding-lr": 0.08, "embedding-lr": 0.15, "scalar-lr": 0.15, "matrix-lr": 0.48}
STEPS = 250

# of the studies that grow 4x64 or 1x128 to 4x128 (mixing.py and those after it), on fresh text
UNIT = 256  # steps of 4,096 tokens: one token per parameter (1,048,576) of blocks and head
LARGE = {"depth": 4, "aspect-ratio": 32, "head-dim": 32, "max-seq-len": 512, "window-pattern": "L", "device-batch-size": 8, "total-batch-size": 4096,
         "eval-every": UNIT, "eval-tokens": 262144, "warmdown-ratio": 0.0, "weight-decay": 0.0,
         "unembedding-lr": 0.08, "embedding-lr": 0.15, "scalar-lr": 0.15, "matrix-lr": 0.12}
SMALL = {"4x64": {"aspect-ratio": 16, "matrix-lr": 0.24}, "1x128": {"depth": 1, "aspect-ratio": 128}}
FLOPS_SHARE = 0.375  # of a token of 4x64 and one of 4x128
DECAY = 0.15  # share of the steps in which a branch decays


def steps_of(units: float) -> int:
    """Tokens per parameter of 4x128 as steps."""
    return round(units * UNIT)


def run_trials(base_dir: str, trials: Iterable[Trial | dict], jobs: int = 2, places: list[Place] | None = None) -> list[Result]:
    """Results in the order of the trials; those not on disk are trained, `jobs` at a time with one thread each, or in `places`; parents before their branches.

    A trial that is a parent keeps the checkpoints that its branches begin with. Raises UsageError for trials that died; they are run again by the next call.
    """
    trials = [trial if isinstance(trial, Trial) else Trial(trial) for trial in trials]
    kept: dict[str, set[int]] = {}
    order: dict[str, Trial] = {}

    def add(trial: Trial) -> None:
        if trial.name in order:
            return
        if trial.parent is not None:
            add(trial.parent)
            kept.setdefault(trial.parent.name, set()).add(trial.step)
        order[trial.name] = trial

    for trial in trials:
        add(trial)
    wanted = {name for name, trial in order.items() if read(base_dir, trial) is None}
    for name in reversed(order):  # a parent that is done must still have what the missing ones begin with
        trial = order[name]
        if name in wanted and trial.parent is not None and trial.step not in list_steps(folder_of(base_dir, trial.parent)):
            wanted.add(trial.parent.name)
    if wanted:
        runner = Runner(base_dir, Work([trial for name, trial in order.items() if name in wanted]), places or cpu_places(jobs), kept, again=True)
        runner.run(Display("trials").show)
    results = [read(base_dir, trial) for trial in trials]
    def culprit(trial: Trial) -> Trial:
        return culprit(trial.parent) if trial.parent is not None and read(base_dir, trial.parent) is None else trial

    if died := [folder_of(base_dir, culprit(trial)) / "out.txt" for trial, result in zip(trials, results) if result is None]:
        raise UsageError(f"{len(died)} of {len(trials)} trials died, see {died[0]}; the same command tries them again")
    return results  # type: ignore[return-value]


# -----------------------------------------------------------------------------
# Studies


def check_ended(runs: Iterable[tuple[str, Result]]) -> None:
    """Raises UsageError for one of the trainings, given by their names, that diverged: a study has nothing to compare it with."""
    for name, run in runs:
        if not run.bpb:
            seed = f" of seed {run.flags['seed']}" if "seed" in run.flags else ""  # a branch has its trunk's
            raise UsageError(f"the run {name!r}{seed} diverged: there is nothing to compare the others with")


def run_by_seed(plan: Callable[[int], dict[str, Trial]], seeds: int, jobs: int, places: list[Place] | None = None, all_must_end: bool = True) -> list[dict[str, Result]]:
    """For each of `seeds` seeds, from 42 on, the results of the trials that `plan` makes of it, by their names there. Raises UsageError for one that diverged, if `all_must_end`."""
    plans = [plan(seed) for seed in range(42, 42 + seeds)]
    results = iter(run_trials(get_base_dir(), [trial for found in plans for trial in found.values()], jobs, places))
    by_seed = [{name: next(results) for name in found} for found in plans]
    if all_must_end:
        check_ended(pair for runs in by_seed for pair in runs.items())
    return by_seed


def study_parser(doc: str, seeds: int = 3, jobs: int | None = 2) -> ArgumentParser:
    """A parser with the flags of all studies. seeds: how many by default; 0 for a study of one. jobs: likewise; None for one that asks which devices there are."""
    parser = ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--jobs", type=positive_int, default=jobs, help="trials at a time, on a CPU with one thread each" + ("" if jobs else " (default: as many as there are GPUs or cores)"))
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--plot", type=picture_path, help="draw them into this picture")
    if seeds:
        parser.add_argument("--seeds", type=positive_int, default=seeds, help="how many")
    return parser


def width_of_heads(text: str) -> int:
    """A width that models of the studies' heads can have."""
    width = positive_int(text)
    if width % SHAPE["head-dim"]:
        raise argparse.ArgumentTypeError(f"{width} is no multiple of {SHAPE['head-dim']}, the width of a head")
    return width


def cost_with(loss: float, costs: Sequence[float], losses: Sequence[float]) -> float:
    """The steps, FLOPs or seconds at which runs of these costs would end with `loss`: losses against the log of the cost, by a straight line through the two runs around it, or
    through the first or last two where it lies beyond them. Runs that are no better than a cheaper one do not count; NaN where fewer than two are left."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(zip(costs, losses)):
        if not kept or value < kept[-1][1]:
            kept.append((cost, value))
    if len(kept) < 2:
        return math.nan
    (c0, l0), (c1, l1) = next(((a, b) for a, b in zip(kept, kept[1:]) if b[1] <= loss), (kept[-2], kept[-1]))
    return math.exp(math.log(c0) + (math.log(c1) - math.log(c0)) * (l0 - loss) / (l0 - l1))


def flops_per_token(flags: dict, vocabulary: int) -> int:
    """Of the model that base_train's flags describe."""
    settings = parse_settings(PlanSettings, [f"--{name}={value}" for name, value in flags.items()], "")
    return empty_gpt(settings.config(vocabulary)).estimate_flops()


def dense_flops() -> int:
    """Of STEPS steps of the model of SHAPE, with the tokenizer in the base directory."""
    return flops_per_token(SHAPE, get_tokenizer().get_vocab_size()) * SHAPE["total-batch-size"] * STEPS


def nats_per_bpb() -> float:
    """Nats per token for one bit per byte, on the validation text of the base directory."""
    tokenizer = get_tokenizer()
    texts = next(parquets_iter_batched("val"))
    tokens = sum(map(len, tokenizer.encode(texts)))
    return math.log(2) * sum(len(text.encode()) for text in texts) / tokens
