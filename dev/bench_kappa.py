"""How well kappa keeps its word: the share of a stage's gain that is left when the trigger fires, in hindsight, against the share that was asked for.

    python -m dev.bench_kappa                              # on the recorded stages, without training anything
    python -m dev.bench_kappa --record=FOLDER              # records them anew: 23 short runs

The stages are real: small models on two texts (the source of Python's standard library: code; general English) with a tokenizer each, of several shapes,
batches, horizons and schedules, new or grown out of a smaller one. Each ran to the end of its budget without a (further) growth; its last validation is p.
"""
import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat.cli import ArgumentParser, command
from nanochat.files import atomic_path
from nanochat.growth.forecast import GROWN, Forecast
from nanochat.growth.kappa import SEED_ERROR, GrowthTrigger, Prediction, kappa_target
from nanochat.run_log import FILENAME, read_run_log

RECORDED = Path(__file__).parent / "stage_curves.json.gz"
KAPPAS = 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5


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
    Run("code", "1x64", 512, 300, "linear"),
    Run("english", "1x64", 512, 300, "wsd"),
    Run("code", "2x64", 512, 200, "constant", 20),
    Run("english", "2x64", 512, 250, "linear", 40),
    Run("code", "1x64,2x64", 512, 200, "linear", grown_at=0.2),
    Run("english", "1x64,2x64", 512, 200, "constant", grown_at=0.15),
    Run("code", "1x128", 512, 200, "wsd"),
    Run("english", "1x128", 512, 200, "constant"),
    # the same once more, with another seed: what the earlier runs on disk are
    Run("code", "1x64", 512, 300, "linear", seed=2),
    Run("english", "1x64", 512, 300, "wsd", seed=2),
    Run("code", "2x64", 512, 200, "constant", 20, seed=2),
    Run("english", "2x64", 512, 250, "linear", 40, seed=2),
    Run("english", "1x128", 512, 200, "constant", seed=2),
    Run("code", "1x128", 512, 200, "wsd", seed=2),
]


def flags(run: Run) -> list[str]:
    depth, width = (int(number) for number in run.path.split(",")[-1].split("x"))
    shape = [f"--grow-path={run.path}", f"--grow-at={run.grown_at}"] if run.grown_at else [f"--aspect-ratio={width // depth}"]
    return [f"--depth={depth}", *shape, "--head-dim=32", "--max-seq-len=128", "--window-pattern=L", f"--device-batch-size={run.batch // 128}",
            f"--total-batch-size={run.batch}", f"--num-iterations={run.steps}", f"--warmup-steps={run.warmup}", *SCHEDULES[run.schedule], f"--seed={run.seed}",
            "--matrix-lr=0.16", "--unembedding-lr=0.03", f"--eval-every={run.steps // 25}", f"--eval-tokens={4 * run.batch}", "--sample-every=-1",
            "--core-metric-every=-1", f"--model-tag={run.tag}"]


def record(folder: Path) -> None:
    for number, run in enumerate(RUNS, 1):
        base = folder / run.data
        log = base / "base_checkpoints" / run.tag / FILENAME
        if log.exists() and any(record["kind"] == "end" for record in read_run_log(log)):
            continue
        print(f"{number} of {len(RUNS)}: {run.tag}", flush=True)
        environment = os.environ | dict(NANOCHAT_BASE_DIR=str(base), OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, "-m", "scripts.base_train", *flags(run)], env=environment, check=True, stdout=subprocess.DEVNULL)


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
    late: float  # share of the stage's FLOPs, after the true moment
    checks: int  # validations that did not confirm


class RememberingTrigger(GrowthTrigger):
    """Forecasts do not depend on kappa: those of a stage serve all kappas."""

    remembered: dict

    def forecast(self, *checks: tuple[int, float]) -> Forecast:
        key = self.final, self.seen, *self.checks, *checks
        if key not in self.remembered:
            self.remembered[key] = super().forecast(*checks)
        return self.remembered[key]


def trigger_of(curve: Curve, kappa: float, final: Prediction | None, remembered: dict) -> GrowthTrigger:
    """As it is at the stage's start."""
    steps, start = len(curve.train), curve.evals[0][1]
    rates = np.interp(np.linspace(0, steps, 257), np.arange(steps), curve.lr)
    grown = dict(prior=GROWN, ratio=start / float(np.mean(curve.before[-8:]))) if curve.before else {}
    trigger = RememberingTrigger(kappa, math.inf, steps, rates.tolist(), check_steps=steps / 300, final=final, **grown)  # type: ignore[arg-type]
    trigger.remembered = remembered
    trigger.begin(start)
    return trigger


def judge(curve: Curve, kappa: float, final: Prediction | None, remembered: dict) -> Outcome:
    """Lets the trigger decide on a stage, and looks at what it left."""
    validation, steps = curve.validation(), len(curve.train)
    start, p = float(validation[0]), float(validation[-1])
    trigger = trigger_of(curve, kappa, final, remembered)
    for step, loss in enumerate(curve.train, 1):
        trigger.observe(loss)
        if trigger.due() and trigger.decide(0.0, float(validation[step])).grow:
            break
    when = int(np.argmax(validation <= kappa_target(start, p, kappa)))
    return Outcome((float(validation[step]) - p) / (start - p), (step - when) / steps, len(trigger.checks))


def table(title: str, outcomes: dict[float, list[Outcome]]) -> None:
    print(f"\n{title}: {len(outcomes[KAPPAS[0]])} stages\n"
          f"{'kappa':>6}  {'left, median':>12}  {'error: median':>13}  {'worst':>6}  {'moment: median':>14}  {'worst':>6}  {'checks':>6}")
    for kappa, found in outcomes.items():
        left, late = (np.array(values) for values in zip(*((outcome.left, outcome.late) for outcome in found)))
        print(f"{kappa:6.2f}  {np.median(left):12.3f}  {np.median(abs(left - kappa)):13.3f}  {abs(left - kappa).max():6.3f}  "
              f"{np.median(abs(late)):14.1%}  {abs(late).max():6.1%}  {1 + np.mean([outcome.checks for outcome in found]):6.1f}")


def load() -> list[Curve]:
    with gzip.open(RECORDED, "rt") as file:
        return [Curve(Run(*run), *rest) for run, *rest in json.load(file)]


def save(folder: Path) -> None:
    """Packs what is recorded: numbers only."""
    logs = [(run, folder / run.data / "base_checkpoints" / run.tag / FILENAME) for run in RUNS]
    curves = [read_curve(run, log) for run, log in logs if log.exists() and read_run_log(log)[-1]["kind"] == "end"]
    with atomic_path(RECORDED) as path:
        path.write_bytes(gzip.compress(json.dumps(curves, separators=(",", ":")).encode(), mtime=0))


def twin(curve: Curve, curves: list[Curve]) -> Curve | None:
    """The same run with another seed."""
    return next((other for other in curves if other.run._replace(seed=0) == curve.run._replace(seed=0) and other is not curve), None)


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description="The share of a stage's gain that is left when kappa's trigger fires, in hindsight")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="train the stages anew; FOLDER holds a NANOCHAT_BASE_DIR with data and tokenizer for each text: code (vocabulary 1024), code4096 and english (2048)")
    parser.add_argument("--each", action="store_true", help="print each stage too")
    args = parser.parse_args(argv)
    if args.record:
        record(args.record)
        save(args.record)
    curves = load()
    alone: dict[float, list[Outcome]] = {kappa: [] for kappa in KAPPAS}
    helped: dict[float, list[Outcome]] = {kappa: [] for kappa in KAPPAS}
    same: dict[float, list[Outcome]] = {kappa: [] for kappa in KAPPAS}
    for curve in curves:
        other, remembered = twin(curve, curves), dict[tuple, Forecast]()
        for kappa in KAPPAS:
            alone[kappa].append(judge(curve, kappa, None, remembered))
            if other is not None:
                p = other.evals[-1][1]
                helped[kappa].append(judge(curve, kappa, Prediction(p, "an earlier run", SEED_ERROR * p * math.sqrt(2)), remembered))
                same[kappa].append(alone[kappa][-1])
        if args.each:
            print(f"{curve.run.tag:44s} {len(curve.train)} steps, p/s {curve.evals[-1][1] / curve.evals[0][1]:.2f}: "
                  + "  ".join(f"{kappa:g} {alone[kappa][-1].left:.3f} ({alone[kappa][-1].late:+.0%})" for kappa in KAPPAS), flush=True)
    new = [not curve.before for curve in curves]
    table("Without an earlier run, new models", {kappa: [o for o, is_new in zip(found, new) if is_new] for kappa, found in alone.items()})
    table("Without an earlier run, grown models", {kappa: [o for o, is_new in zip(found, new) if not is_new] for kappa, found in alone.items()})
    table("Those that have an earlier run, without it", same)
    table("Those that have an earlier run, with it", helped)


if __name__ == "__main__":
    sys.exit(main())
