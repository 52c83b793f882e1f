"""Sweeps: many runs of base_train over grids, linked values, random or optuna's points, described by a TOML file (sweep_config.py, docs/sweeps.md).

    python -m analysis.sweep analysis/sweeps/low_rank_rates.toml --jobs=2 --plot=rates.png
    python -m analysis.sweep rates.toml --list                    what there is to do, and what is done
    python -m analysis.sweep rates.toml --submit=8                as a Slurm array of 8 runners that share the work
    python -m analysis.sweep rates.toml --export=wandb rates.yaml    # the same for `wandb sweep`

The same command goes on where an earlier one was stopped; any number of them, on machines that share NANOCHAT_BASE_DIR, work through one sweep together.
The results, a row a run, are in sweeps/<name>/results.csv there. Exit status 1: some runs failed (--retry tries them again).
"""
import contextlib
import csv
import hashlib
import io
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.progress import Display, why
from analysis.runner import Runner, Work, places_for
from analysis.sweep_config import Sweep, as_wandb, check_runs, read_sweep, text_of, tomllib
from analysis.sweep_search import Search
from analysis.trial import Trial, check_conditions, folder_of, last_counts, last_evaluations, status_of
from nanochat.cli import UsageError, command, flag, parse_settings, picture_path, positive_int
from nanochat.common import default_device, get_base_dir
from nanochat.drawing import pictures
from nanochat.files import check_writable, write_text_atomic
from nanochat.resources import openmp_threads
from nanochat.run_log import FILENAME, is_finished, last_of_each_kind, read_run_log

MEASURES = ["status", "final_bpb", "min_bpb", "flops", "tokens", "seconds", "params", "peak_memory_mib"]


@dataclass
class Settings:
    config: str = flag("", "The TOML file, - for standard input", positional=True)
    flags: str = flag("", "More flags for all runs, which have the last word, as in --flags='--depth=4 --fp8'")
    jobs: int | None = flag(None, "Runs at a time; on CUDA one per device (or per group of `ranks` devices) at most (default: as many as there is room for)", type=positive_int)
    retry: bool = flag(False, "Run those again that failed")
    no_wait: bool = flag(False, "End when nothing is left to take, without waiting for what other runners have")
    list: bool = flag(False, "Say which runs there are and how they stand, and end")
    plot: Path | None = flag(None, "Draw the results over each flag that varies into this picture", type=picture_path)
    export: tuple | None = flag(None, "Write the sweep to FILE as one of wandb, and end", nargs=2, metavar=("wandb", "FILE"))
    submit: int | None = flag(None, "Hand the sweep to Slurm as an array of so many runners, and end; needs nanochat[sweep]", type=positive_int)


def folder_of_sweep(base_dir: str, sweep: Sweep) -> Path:
    """Named by the sweep, and by --flags, with which it is another one."""
    others = "-" + hashlib.sha256(json.dumps(sweep.overrides, sort_keys=True).encode()).hexdigest()[:8] if sweep.overrides else ""
    return Path(base_dir, "sweeps", sweep.name + others)


# -----------------------------------------------------------------------------
# Results


def measures(base_dir: str, trial: Trial) -> dict[str, Any]:
    """The columns of MEASURES, and by their keys the last results of --eval-tasks on whole sets (those with a label). Those of a run that has not ended are of where it stands."""
    status, log = status_of(base_dir, trial), folder_of(base_dir, trial) / FILENAME
    row: dict[str, Any] = {"status": "unfinished" if status is None else "done" if status == 0 else f"signal {-status}" if status < 0 else f"exit {status}"}
    if not log.exists():
        return row | ({"status": "waiting"} if status is None else {})
    try:
        records = read_run_log(log)
        if status == 0 and not is_finished(records):
            raise UsageError("the last validation is missing")
    except UsageError:  # a broken log costs its numbers only
        return row
    losses = [record["val_bpb"] for record in records if record["kind"] == "eval"]
    losses = [] if status == 0 and losses and losses[-1] is None else [loss for loss in losses if loss is not None]  # broken by its last step: no loss before it is its own
    of = last_of_each_kind(records)
    spent = of.get("train", {})
    row |= {"flops": spent.get("flops"), "tokens": spent.get("tokens"), "seconds": spent.get("time"),
            "params": last_counts(records).get("total"), "peak_memory_mib": of.get("end", {}).get("peak_memory_mib")}
    row |= {key: evaluation["value"] for key, evaluation in last_evaluations(records).items() if evaluation.get("label")}
    return row | ({"final_bpb": losses[-1], "min_bpb": min(losses)} if losses else {})


class Table:
    """One row a run: its name, the flags that vary, those of --flags, MEASURES, and a column for each evaluation that any run has; what is not known is empty."""

    def __init__(self, sweep: Sweep, base_dir: str, trials: list[Trial]):
        """trials: there may come more."""
        self.sweep, self.base_dir, self.trials = sweep, base_dir, trials
        self.path = folder_of_sweep(base_dir, sweep) / "results.csv"
        self.flags = [flag for flag in dict.fromkeys([*sweep.swept, *sweep.overrides]) if flag != "run"]  # wandb's name, and that of a column
        self._done: dict[str, dict[str, Any]] = {}  # by name; their logs are not read again

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for trial in self.trials:
            row = self._done.get(trial.name) or {"run": trial.name, **{flag: trial.flags.get(flag) for flag in self.flags}, **measures(self.base_dir, trial)}
            if row["status"] == "done":
                self._done[trial.name] = row
            rows.append(row)
        return rows

    def write(self) -> str:
        out, rows = io.StringIO(), self.rows()
        known = ["run", *self.flags, *MEASURES]
        evaluations = sorted({key for row in rows for key in row} - set(known))
        writer = csv.DictWriter(out, [*known, *evaluations], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(self.path, out.getvalue())
        return out.getvalue()


def panels_of(sweep: Sweep, ended: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What varies but seeds and objectives, by name: the alternatives of a flag, or of flags that change together."""
    drawn = [[{flag: value} for value in dict.fromkeys(row[flag] for row in ended)] for flag in sweep.search]
    groups = []
    for group in [*sweep.choices, *drawn]:
        flags = [flag for flag in group[0] if flag not in sweep.overrides and len({str(one[flag]) for one in group}) > 1]
        if flags:
            groups.append([{flag: one[flag] for flag in flags} for one in group])
    plain = [group for group in groups if "objective" not in group[0]]
    chosen = [group for group in plain if "seed" not in group[0]] or plain or groups or [[{flag: ended[0][flag] for flag in sweep.swept}]]
    return {"\n".join(group[0]): group for group in chosen}


def draw(sweep: Sweep, rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each of them: a dot a finished run, a cross at the top for each value of which runs failed, and a line through the best of each value, by the mean of the
    seeds where all of them are done. Losses of different objectives are no rivals: each has a color and a line of its own."""
    done, failed = [row for row in rows if is_done(row)], [row for row in rows if not is_done(row) and row["status"] not in ("waiting", "unfinished")]
    if not done:
        raise UsageError("no run is done yet, so there is nothing to draw")
    objectives = list(dict.fromkeys(row.get("objective") for row in done))
    panels = panels_of(sweep, done + failed)
    with pictures(path, 4.5 * len(panels), 4, len(panels)) as drawn:
        for axes, (name, values) in zip(drawn, panels.items()):
            of_value = lambda some, value: [row for row in some if all(row[flag] == one for flag, one in value.items())]
            numbers = sorted(one for value in values for one in value.values() if isinstance(one, (int, float)) and not isinstance(one, bool))
            scale = "\n" not in name and len(numbers) == len(values)  # of one flag, whose values are numbers
            values = sorted(values, key=lambda value: next(iter(value.values()))) if scale else values
            places = [next(iter(value.values())) if scale else i for i, value in enumerate(values)]
            for color, objective in enumerate(objectives):
                alike = [row for row in rows if row.get("objective") == objective]
                dots = [(place, row["final_bpb"]) for place, value in zip(places, values) for row in of_value(alike, value) if is_done(row)]
                best = [(place, min(means)) for place, value in zip(places, values) if (means := means_of_seeds(sweep, of_value(alike, value)))]
                axes.plot([place for place, _ in dots], [loss for _, loss in dots], "o", color=f"C{color}", alpha=0.5)
                axes.plot([place for place, _ in best], [loss for _, loss in best], color=f"C{color}", label=objective)
            if crosses := [place for place, value in zip(places, values) if of_value(failed, value)]:
                axes.plot(crosses, [0.97] * len(crosses), "x", color="red", transform=axes.get_xaxis_transform(), label="runs failed")
            if not scale:
                axes.set_xticks(places, ["\n".join(map(str, value.values())) for value in values])
            elif places[0] > 0 and places[-1] >= 8 * places[0]:
                axes.set_xscale("log")
            axes.set_xlabel(name)
        drawn[0].set_ylabel("validation bits per byte")
        if len(objectives) > 1 or failed:
            drawn[0].legend(frameon=False)


def is_done(row: dict[str, Any]) -> bool:
    """Whether it has a last loss: its training may have ended well, and its last step have broken the weights."""
    return row["status"] == "done" and row.get("final_bpb") is not None


def means_of_seeds(sweep: Sweep, rows: list[dict[str, Any]]) -> list[float]:
    """Of the last losses of runs that differ in nothing else, where all of them have one: the seeds that survived are the lucky ones."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(str([row[flag] for flag in sweep.swept if flag != "seed"]), []).append(row)
    return [statistics.mean(row["final_bpb"] for row in arm) for arm in arms.values() if all(map(is_done, arm))]


# -----------------------------------------------------------------------------
# Running


def device_of(sweep: Sweep) -> str:
    """The one that all its runs are for. Raises UsageError for several."""
    devices = {str(trial.flags.get("device-type", "")) or default_device() for trial in sweep.trials({})}
    if len(devices) > 1:
        raise UsageError(f"{sweep.name} is for several device types ({', '.join(sorted(devices))}); make a sweep of each")
    return devices.pop()


def submit(settings: Settings, sweep: Sweep, folder: Path, tasks: int) -> list:
    """The jobs of an array of runners; what they print goes into the folder `slurm` of the sweep."""
    if "device-type" not in sweep.fixed | sweep.overrides:
        raise UsageError(f"{sweep.name}: give the flag device-type under [fixed]; the machine that submits may have another device than those that train")
    try:
        import submitit
    except ImportError as error:
        raise UsageError(f"--submit needs a package that is not installed ({error.name}): pip install -e '.[sweep]'") from error
    options = {"name": sweep.name, "timeout_min": 24 * 60, **sweep.slurm}
    try:
        executor = submitit.AutoExecutor(folder / "slurm", cluster=options.pop("cluster", "slurm"))
        executor.update_parameters(**options)
    except (NameError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"[slurm] or --submit: {str(error).splitlines()[0]}") from error
    task = [sys.executable, "-m", "analysis.sweep", str(folder / "config.toml"), "--no-wait"]
    task += [f"--flags={settings.flags}"] * bool(settings.flags) + [f"--jobs={settings.jobs}"] * bool(settings.jobs) + ["--retry"] * settings.retry
    with executor.batch():
        jobs = [executor.submit(submitit.helpers.CommandFunction(task)) for _ in range(tasks)]
    print(f"Submitted: {', '.join(job.job_id for job in jobs)}; what they print is in {folder / 'slurm'}")
    return jobs


@command
def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else argv
    words = [part for word in words for part in (word.split("=") if word == "--export=wandb" else [word])]  # argparse takes no second value after a `=`
    settings = parse_settings(Settings, words, __doc__.splitlines()[0])
    text = text_of(settings.config)
    sweep = read_sweep(settings.config, text, settings.flags)
    if settings.export:
        program, file = settings.export
        if program != "wandb":
            raise UsageError(f"--export={program} is unknown; there is --export=wandb FILE")
        write_text_atomic(file, yaml.safe_dump(as_wandb(sweep), sort_keys=False))
        return 0
    if not sweep.tag and not settings.submit and "device-type" not in sweep.swept:
        sweep.fixed.setdefault("device-type", default_device())
    base_dir = get_base_dir()
    folder = folder_of_sweep(base_dir, sweep)
    check_writable(folder)
    work = work_of(sweep, base_dir, folder)
    table = Table(sweep, base_dir, work.trials)
    write_text_atomic(folder / "config.toml", text if "name" in tomllib.loads(text) else f'name = "{sweep.name}"\n{text}')
    if settings.submit:
        submit(settings, sweep, folder, settings.submit)
        return 0
    if not settings.list:
        for trial in work.trials:
            check_conditions(base_dir, trial)
        places = places_for(device_of(sweep), settings.jobs, sweep.ranks, openmp_threads())
        display = Display("runs", sweep.label)
        runner = Runner(base_dir, work, places, again=settings.retry, wait=not settings.no_wait)
        written = -1

        def tell(runner: Runner) -> None:
            nonlocal written
            display.show(runner)
            if len(runner.seconds) != written:  # what is done is in the table, whatever happens next
                written = len(runner.seconds)
                with contextlib.suppress(UsageError, OSError):  # a full disk or a damaged file ends no run that goes on; the last table tells
                    table.write()

        runner.run(tell)
    print(f"{table.write()}\nWritten to {table.path}")
    failed = [(trial, status) for trial in work.trials if (status := status_of(base_dir, trial))]
    for trial, status in failed:
        print(f"failed: {sweep.label(trial)}: {why(base_dir, trial, status)}")
    for reason in work.refused:
        print(f"not run: {reason}")
    if settings.plot:
        draw(sweep, table.rows(), settings.plot)
    return int(bool(failed or work.refused and not work.trials) and not settings.list)


def work_of(sweep: Sweep, base_dir: str, folder: Path) -> Work:
    """Raises UsageError for runs that cannot be, before any of them begins."""
    if sweep.method == "optuna":
        check_runs(sweep, sweep.trials(*({flag: values.ends()[at] for flag, values in sweep.search.items()} for at in (0, -1))))
        return Search(sweep, base_dir, folder)
    trials = sweep.trials(*([sweep.random_point(number) for number in range(sweep.runs)] or [{}]))
    check_runs(sweep, trials)
    return Work(trials)


if __name__ == "__main__":
    sys.exit(main())
