"""The arms of a study that a sweep's file describes: its configurations, each with a learning rate of its own."""
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from analysis.rates import best_rate, rates_table, try_rates
from analysis.runner import places_for
from analysis.study import run_trials
from analysis.sweep_config import check_runs, read_sweep, text_of
from analysis.trial import Result, Trial, status_of
from nanochat import evaluations
from nanochat.cli import UsageError
from nanochat.common import default_device, get_base_dir
from nanochat.layered_gpt import empty_gpt
from nanochat.tokenizer import get_tokenizer
from scripts import base_train

HORIZONS = ("num-iterations", "target-flops", "target-param-data-ratio")  # the first positive one counts, as in base_train
RATE = "matrix-lr"
NO_NAMES = (RATE, "seed", "eval-tasks")
TUNING = 0.5  # of a budget, for each rate: twice the arms for the same time


@dataclass(frozen=True)
class Configuration:
    """What is tuned as one."""

    name: str
    tuning: tuple[Trial, ...]  # one for each rate

    def trial(self, unit: float, **flags: Any) -> Trial:
        """One of its runs with a budget of so many units, validated as often as with one."""
        flags = {**self.tuning[0].flags, **flags}
        for flag in (next(flag for flag in HORIZONS if float(flags.get(flag, -1)) > 0), "eval-every"):
            flags[flag] = max(1, round(float(flags[flag]) * unit)) if flag in ("num-iterations", "eval-every") else float(flags[flag]) * unit
        return Trial(flags)

    def rates(self) -> list[float]:
        return [trial.flags[RATE] for trial in self.tuning]


def configurations(path: Path, flags: str = "", objective: str | None = None) -> list[Configuration]:
    """Those of a sweep's file (-: standard input), in its order, named by what varies; of one objective, if it has several. Raises UsageError for a file that is no such study."""
    sweep = read_sweep(path.name, text_of(path), flags)
    if "device-type" not in sweep.fixed | sweep.overrides:
        sweep.fixed["device-type"] = default_device()
    trials = sweep.trials({})
    if sweep.method or sweep.tag or len({trial.flags.get("seed") for trial in trials}) > 1 or any("seed" not in trial.flags or RATE not in trial.flags for trial in trials):
        raise UsageError(f"{sweep.name}: each run needs a {RATE} and the one `seed` of the tuning, without [search] or `tag`; take analysis/sweeps/rank_depth.toml as a pattern")
    if sweep.ranks > 1:
        raise UsageError(f"{sweep.name}: studies train on one device a run; leave `ranks` to analysis.sweep")
    if any(not isinstance(trial.flags[RATE], (int, float)) or not isinstance(trial.flags["seed"], int) for trial in trials):
        raise UsageError(f"{sweep.name}: {RATE} and seed must be numbers, without quotes")
    if not all(any(float(trial.flags.get(horizon, -1)) > 0 for horizon in HORIZONS) and float(trial.flags.get("eval-every", -1)) > 0 for trial in trials):
        raise UsageError(f"{sweep.name}: give a positive {', '.join(HORIZONS[:-1])} or {HORIZONS[-1]}, and eval-every")
    check_runs(sweep, trials)
    if objective is not None:
        objectives = {trial.flags.get("objective", "next-token") for trial in trials}
        if objective not in objectives:
            raise UsageError(f"--objective={objective}: {sweep.name} has {' and '.join(sorted(objectives))}")
        trials = [trial for trial in trials if trial.flags.get("objective", "next-token") == objective]
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {flag: value for flag, value in trial.flags.items() if flag != RATE}
        found.setdefault(json.dumps(rest, sort_keys=True), []).append(trial)
    names = [flag for flag in sweep.swept if flag not in NO_NAMES and len({str(trial.flags.get(flag)) for trial in trials}) > 1]
    arms = [Configuration(" ".join(f"{flag}={group[0].flags[flag]}" for flag in names if flag in group[0].flags), tuple(group)) for group in found.values()]
    if len({tuple(arm.rates()) for arm in arms}) > 1:
        raise UsageError(f"{sweep.name}: {RATE} belongs into [grid], so that all configurations are tried with the same ones")
    return arms


def reported_seeds(arms: Sequence[Configuration], count: int) -> list[int]:
    """From 42 on, without the one that rates are tuned with."""
    tuning = arms[0].tuning[0].flags["seed"]
    return [seed for seed in range(42, 43 + count) if seed != tuning][:count]


def check_evaluations(arms: Sequence[Configuration]) -> None:
    """Raises UsageError where --eval-tasks lacks its data: the tuning does without, and the first reported run would say so hours later."""
    known = set()
    for arm in arms:
        settings = base_train.parse(arm.tuning[0].arguments())
        rows = max(1, settings.device_batch_size)
        what = str([settings.eval_tasks, settings.objective, rows, settings.max_seq_len, settings.eval_tokens, *(getattr(settings, field.name) for field in fields(evaluations.EvaluationSettings))])
        if settings.eval_tasks and what not in known:
            known.add(what)
            tokenizer = get_tokenizer()
            model = empty_gpt(settings.config(tokenizer.get_vocab_size()))
            subject = evaluations.Subject(model, tokenizer, model.get_device(), settings, 0, rows, settings.eval_tokens, settings.core_metric_max_per_task)
            evaluations.check(evaluations.choose(settings.eval_tasks, model), subject)


def run_arms(arms: Sequence[Configuration], units: Sequence[float], seeds: Sequence[int], jobs: int | None) -> dict[tuple[int, float], tuple[float, list[Result]]]:
    """jobs: runs at a time; None: as many as there are devices, or cores. By number of the configuration and budget: the rate, and the results of the seeds. Prints what came of the rates, which are tuned without other evaluations than that of the loss."""
    places = places_for(arms[0].tuning[0].flags["device-type"], jobs)
    keys = {arm.name + (f", {unit:g} units" if len(units) > 1 else ""): (i, unit) for i, arm in enumerate(arms) for unit in units}

    def losses(asked: list[tuple[str, float]]) -> list[float]:
        runs = [arms[i].trial(unit * TUNING, **{RATE: rate}) for (i, unit), rate in ((keys[key], rate) for key, rate in asked)]
        runs = [Trial({flag: value for flag, value in run.flags.items() if flag != "eval-tasks"}) for run in runs]
        if any(status_of(get_base_dir(), run) is None for run in runs):
            check_evaluations(arms)
        return [result.final for result in run_trials(get_base_dir(), runs, len(places), places)]

    tried = try_rates(list(keys), arms[0].rates(), losses)
    print(f"Bits per byte of the tuning, by {RATE}\n\n{rates_table(tried)}\n")
    rates = {keys[key]: best_rate(found) for key, found in tried.items()}
    results = iter(run_trials(get_base_dir(), [arms[i].trial(unit, **{RATE: rate, "seed": seed}) for (i, unit), rate in rates.items() for seed in seeds], len(places), places))
    return {key: (rate, [next(results) for _ in seeds]) for key, rate in rates.items()}
