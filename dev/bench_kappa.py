"""How well kappa keeps its word: the share of a stage's gain that is left when the trigger fires, in hindsight, against the share that was asked for.

    python -m dev.bench_kappa                              # on the recorded stages, without training anything
    python -m dev.bench_kappa --record=FOLDER --text=TEXT  # records them anew: some 40 short runs, the half of them on TEXT

The stages are real: small models on two texts (the source of Python's standard library; TEXT, general English) with a tokenizer each, of several shapes,
batches, horizons and schedules, new or grown out of a smaller one. Each ran to the end of its budget without a (further) growth; its last validation is p.
"""
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.cli import ArgumentParser, command
from nanochat.growth.forecast import GROWN
from nanochat.growth.kappa import GrowthTrigger, Prediction, kappa_target
from nanochat.run_log import FILENAME, read_run_log


class Run(NamedTuple):
    """A recorded run. `path`: shapes, the first one left at the share `grown_at` of the budget."""

    data: str
    path: str
    batch: int  # tokens
    steps: int  # of the final model alone
    schedule: str
    warmup: int = 10
    seed: int = 1
    grown_at: float | None = None

    @property
    def tag(self) -> str:
        return "_".join(str(part).replace(",", "-") for part in self if part is not None)


SCHEDULES = {
    "constant": ["--warmdown-ratio=0"],
    "linear": ["--warmdown-ratio=0.65"],
    "wsd": ["--warmdown-ratio=0.15", "--warmdown-shape=sqrt"],
}

RUNS = [
    Run("code4096", "1x64", 2048, 400, "constant"),
    Run("english", "1x64", 1024, 300, "linear"),
    Run("code", "2x128", 1024, 200, "linear", 40),
    Run("english", "2x128", 1024, 200, "wsd"),
    Run("code", "1x64,2x128", 1024, 200, "linear", grown_at=0.15),
    Run("english", "1x64,3x128", 512, 200, "wsd", grown_at=0.25),
    Run("code", "1x64", 1024, 400, "constant"),
    Run("code", "4x128", 512, 240, "wsd"),
    Run("english", "4x128", 512, 200, "linear"),
    Run("code", "2x64", 512, 600, "wsd"),
    Run("english", "2x64", 1024, 300, "constant", 40),
    Run("code", "2x64,4x128", 512, 200, "constant", grown_at=0.2),
    Run("code", "2x64", 1024, 320, "linear"),
    Run("english", "1x64", 512, 600, "wsd"),
    Run("code", "3x128", 1024, 160, "constant"),
    Run("english", "3x128", 512, 240, "linear"),
    # the same once more, with another seed: what the earlier runs on disk are
    Run("english", "1x64", 1024, 300, "linear", seed=2),
    Run("code", "2x128", 1024, 200, "linear", 40, seed=2),
    Run("english", "2x128", 1024, 200, "wsd", seed=2),
    Run("code", "1x64", 1024, 400, "constant", seed=2),
    Run("code", "4x128", 512, 240, "wsd", seed=2),
    Run("english", "2x64", 1024, 300, "constant", 40, seed=2),

    Run("code", "1x64,2x64", 1024, 280, "wsd", grown_at=0.1),
    Run("english", "2x64,4x128", 512, 160, "linear", grown_at=0.2),
    Run("code", "1x64", 512, 600, "linear", 40),
    Run("english", "2x128", 512, 280, "constant"),
    Run("code", "2x128", 512, 360, "wsd"),
    Run("english", "4x128", 1024, 120, "wsd"),
    Run("english", "1x64,2x128", 1024, 160, "constant", grown_at=0.2),
    Run("code", "4x128", 1024, 120, "linear"),
    Run("english", "2x64", 512, 400, "linear"),
]


def flags(run: Run) -> list[str]:
    depth, width = (int(number) for number in run.path.split(",")[-1].split("x"))
    shape = [f"--grow-path={run.path}", f"--grow-at={run.grown_at}"] if run.grown_at else [f"--aspect-ratio={width // depth}"]
    if not run.grown_at:
        assert width % depth == 0 or depth == 3
        shape = [f"--aspect-ratio={-(-width // depth) if width % depth == 0 else 42}"]
    return [f"--depth={depth}", *shape, "--head-dim=32", "--max-seq-len=128", "--window-pattern=L", f"--device-batch-size={run.batch // 128}",
            f"--total-batch-size={run.batch}", f"--num-iterations={run.steps}", f"--warmup-steps={run.warmup}", *SCHEDULES[run.schedule], f"--seed={run.seed}",
            "--matrix-lr=0.16", "--unembedding-lr=0.03", f"--eval-every={run.steps // (20 if run.steps > 300 else 25) if run.batch < 2048 else 10}", f"--eval-tokens={4096 if run.batch < 2048 else 8192}", "--sample-every=-1",
            "--core-metric-every=-1", f"--model-tag={run.tag}"]


def record(folder: Path) -> None:
    for number, run in enumerate(RUNS, 1):
        base = folder / run.data
        log = base / "base_checkpoints" / run.tag / FILENAME
        if log.exists() and any(record["kind"] == "end" for record in read_run_log(log)):
            continue
        print(f"{number} of {len(RUNS)}: {run.tag}", flush=True)
        environment = os.environ | dict(NANOCHAT_BASE_DIR=str(base), OMP_NUM_THREADS="1")
        subprocess.run([*os.environ.get("RUNNER", "").split(), sys.executable, "-m", "scripts.base_train", *flags(run)], env=environment, check=True, stdout=subprocess.DEVNULL)


class Curve(NamedTuple):
    """A stage that went on to the end of the budget. lr: the multiplier of each step; evals: (step, loss), the first one at 0; before: the training
    losses of the last steps of the stage before."""

    run: Run
    train: list[float]
    lr: list[float]
    evals: list[tuple[int, float]]
    before: list[float]

    def validation(self) -> np.ndarray:
        """(steps + 1,): between the validations on straight lines; these are averaged with their neighbours, but for the first ones and the last."""
        steps, losses = np.array(self.evals).T
        smooth = losses.copy()
        smooth[3:-1] = (losses[2:-2] + 2 * losses[3:-1] + losses[4:]) / 4
        return np.interp(np.arange(len(self.train) + 1), steps, smooth)


def read_curve(run: Run, log: Path) -> Curve:
    records = read_run_log(log)
    grown = next((record for record in records if record["kind"] == "grow"), None)
    begin = grown["step"] if grown else 0
    train = [record for record in records if record["kind"] == "train"]
    evals = [(record["step"] - begin, round(record["val_bpb"], 4)) for record in records if record["kind"] == "eval" and record["step"] >= begin + bool(grown)]
    return Curve(run, [round(record["raw_loss"], 3) for record in train if record["step"] >= begin],
                 [round(record["lrm"], 4) for record in train if record["step"] >= begin],
                 ([(0, round(grown["loss_after"], 4))] if grown else []) + evals, [round(record["raw_loss"], 3) for record in train if record["step"] < begin])


class Outcome(NamedTuple):
    left: float  # share of the gain, in hindsight
    late: float  # share of the stage's steps, after the true moment
    predicted: float  # p, relative to the true one
    checks: int


def judge(curve: Curve, kappa: float, final: Prediction | None = None) -> Outcome:
    """Lets the trigger decide on a stage, and looks at what it left."""
    validation, steps = curve.validation(), len(curve.train)
    start, p = validation[0], validation[-1]
    rates = np.interp(np.linspace(0, steps, 257), np.arange(steps), curve.lr)
    grown = bool(curve.before)
    trigger = GrowthTrigger(kappa, cap=math.inf, steps=steps, rates=list(rates), check_steps=1.0, final=final, prior=GROWN if grown else None,
                            ratio=start / np.mean(curve.before[-8:]) if grown else None)
    trigger.begin(start)
    when = int(np.argmax(validation <= kappa_target(start, p, kappa)))
    predicted = math.nan
    for step, loss in enumerate(curve.train, 1):
        trigger.observe(loss)
        if trigger.due():
            decision = trigger.decide(0.0, validation[step])
            if decision.grow:
                predicted = decision.predicted.loss / p
                break
    return Outcome((validation[step] - p) / (start - p), (step - when) / steps, predicted, len(trigger.checks))


KAPPAS = 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5


def table(curves: list[Curve], known: bool) -> None:
    for curve in curves:
        pass


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__, )
    parser.add_argument("--record", type=Path)
    args = parser.parse_args(argv)
    record(args.record)


if __name__ == "__main__":
    sys.exit(main())
