"""Sweeps whose points depend on what earlier ones reached: optuna proposes, and a ledger of files lets any number of runners share its proposals.

Point N is the file `points/N.json` of the sweep's folder. A runner with a free place and nothing to start asks optuna for the next one, given the results so far, and
creates its file; where another was faster, that one's counts (claims.create_once). So the files alone say which runs there are, and a sweep that was stopped, or
whose `runs` were raised, goes on from them. `point_runs.json` beside them says what the runs of each point have in common, for which alone the proposals are good.
Optuna keeps nothing on disk, and needs no database that several machines would have to reach.
"""
import json
import math
import statistics
from pathlib import Path
from typing import Any

from analysis.claims import create_once
from analysis.runner import Work
from analysis.sweep_config import Sweep, check_runs
from analysis.trial import read, status_of
from nanochat.cli import UsageError
from nanochat.files import parse_json


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(f'method = "optuna" needs a package that is not installed ({error.name}): pip install -e \'.[sweep]\'') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Search(Work):
    def __init__(self, sweep: Sweep, base_dir: str, folder: Path):
        super().__init__([])
        self.sweep, self.base_dir, self.folder = sweep, base_dir, folder / "points"
        self.points: list[dict[str, Any]] = []
        self.optuna = import_optuna()
        self._values: dict[int, float | None] = {}  # by number, of points that are done; None: it failed
        self._check_runs()
        while self._read():
            pass

    @property
    def total(self) -> int:
        return (self.sweep.runs - len(self.refused)) * len(self.sweep.trials({}))

    def _check_runs(self, begin: bool = False) -> None:
        """Raises UsageError where the points that are there, or from now on with `begin`, are of other runs than this sweep's."""
        path, runs = self.folder.with_name("point_runs.json"), [trial.flags for trial in self.sweep.trials({})]
        if begin and not path.exists():
            create_once(path, json.dumps(runs))
        if not path.exists():
            return
        try:
            had, now = ({frozenset((flag, json.dumps(value)) for flag, value in flags.items()) for flags in found} for found in (parse_json(path.read_bytes()), runs))
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error}); give this sweep another name, or delete {path.parent}") from None
        if had != now:
            differ = sorted({flag for flag, _ in frozenset().union(*had) ^ frozenset().union(*now)})
            raise UsageError(f"the points in {self.folder} are of runs with other {'values of ' + ', '.join(differ) if differ else 'combinations of these values'}; "
                             f"give this sweep another name, or delete {path.parent}")

    def _path(self) -> Path:
        """Of the next point."""
        return self.folder / f"{len(self.points):05d}.json"

    def _read(self) -> bool:
        """Takes up the next point. False if it is not there, or not wanted."""
        if len(self.points) == self.sweep.runs or not self._path().exists():
            return False
        try:
            point = parse_json(self._path().read_bytes())
            if not isinstance(point, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UsageError(f"{self._path()} is damaged ({error}); delete it, and optuna proposes another point") from None
        if point.keys() != self.sweep.search.keys():
            raise UsageError(f"{self._path()} is of a sweep over {', '.join(point)}; give this one another name, or delete {self.folder.parent}")
        trials = self.sweep.trials(point)
        try:
            check_runs(self.sweep, trials)
        except UsageError as error:  # values that go well one by one, and not together
            self.refused.append(f"point {len(self.points)}: {error}")
            self._values[len(self.points)] = None
            trials = []
        self.points.append(point)
        self.trials += trials
        return True

    def more(self) -> bool:
        if len(self.points) == self.sweep.runs:
            return False
        if not self._path().exists():
            self._check_runs(begin=True)
            create_once(self._path(), json.dumps(self._propose()))
        return self._read()

    def _value(self, number: int) -> float | None:
        """The mean of the point's runs in bits per byte, infinite if one of them diverged, None if one failed otherwise. Raises LookupError while they are not done."""
        if number not in self._values:
            trials = self.sweep.trials(self.points[number])
            if None in [status_of(self.base_dir, trial) for trial in trials]:
                raise LookupError
            try:
                results = [read(self.base_dir, trial) for trial in trials]
            except UsageError:  # a broken log costs its numbers only
                results = []
            finals = [result.final for result in results if result]
            self._values[number] = statistics.mean(finals) if len(finals) == len(trials) > 0 else None
        return self._values[number]

    def _propose(self) -> dict[str, Any]:
        optuna = self.optuna
        # of points that still run the sampler thinks badly, so that two places get two different ones
        sampler = optuna.samplers.TPESampler(seed=self.sweep.seed + len(self.points), constant_liar=True)
        study = optuna.create_study(direction="minimize", sampler=sampler)
        distributions = {}
        for flag, values in self.sweep.search.items():
            kind = optuna.distributions.IntDistribution if values.whole else optuna.distributions.FloatDistribution
            distributions[flag] = optuna.distributions.CategoricalDistribution(values.choices) if values.choices else kind(
                values.low, values.high, log=values.log, step=values.step or (1 if values.whole else None))
        states, found = optuna.trial.TrialState, []
        for number in range(len(self.points)):
            try:
                value = self._value(number)
                found.append((states.FAIL if value is None else states.COMPLETE, value))
            except LookupError:
                found.append((states.RUNNING, None))
        # optuna passes over failures, and would go on proposing points that diverge: those count as worse than all others
        worst = 2 * max((value for _, value in found if value is not None and value < math.inf), default=10.0)
        for number, (point, (state, value)) in enumerate(zip(self.points, found)):
            try:
                study.add_trial(optuna.trial.create_trial(state=state, params=point, distributions=distributions, value=worst if value == math.inf else value))
            except ValueError as error:
                raise UsageError(f"point {number} in {self.folder} is not within [search.flags] ({error}); widen that, or give this sweep another name") from None
        drawn = study.ask(distributions).params
        return {flag: drawn[flag] if values.choices or values.step else values.rounded(drawn[flag]) for flag, values in self.sweep.search.items()}
