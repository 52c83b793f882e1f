"""What a sweep is: a TOML file that says which values base_train's flags take, checked before anything runs.

    name = "rates"                 # of the folder of results; default: that of the file
    tag = "rates_d{depth}"         # names of the runs, which are then kept with their weights; default: a hash, and no weights
    ranks = 1                      # processes of a run, under torchrun

    [fixed]                        # flags of all runs
    num-iterations = 250

    [grid]                         # every combination of these
    matrix-lr = [0.12, 0.24]
    seed = [42, 43]

    [[together]]                   # values that change with each other, and all of these with all of the grid's; any number of such tables
    depth = [4, 6]
    device-batch-size = [16, 8]

    [search]                       # values that are drawn: `runs` points, each with every combination of the above (so of seeds the mean counts)
    method = "optuna"              # or "random"
    runs = 20
    seed = 0                       # of the draws; raising `runs` adds points to those that are there
    [search.flags]
    embedding-lr = {min = 0.05, max = 0.8, log = true}
    rank = {min = 16, max = 64, step = 16}
    block = ["prenorm", "ngpt"]

    [slurm]                        # for --submit: what submitit's executor takes
    timeout_min = 60

A true value is a switch that is set. All runs but those with a tag begin with no samples, no CORE and no checkpoints before the end.
"""
import contextlib
import difflib
import itertools
import json
import math
import random
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.trial import DEFAULTS, Trial, as_words
from nanochat.cli import UsageError, folder_name, settings_parser
from scripts import base_train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = {"name": str, "tag": str, "ranks": int, "fixed": dict, "grid": dict, "together": list, "search": dict, "slurm": dict}
OURS = {"model-tag": 'give a `tag`', "resume": "runs are taken up by themselves", "resume-from-step": "runs are taken up by themselves",
        "grow-plan": "it trains nothing", "memory": "it trains nothing", "grow-family": "it makes runs of its own", "help": "it trains nothing"}


@dataclass(frozen=True)
class Values:
    """What a flag is drawn from: one of `choices`, or a number from low to high; whole ones if both are."""

    choices: tuple = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def ends(self) -> list:
        """Values that show whether the flag takes such."""
        return list(self.choices) or [self.low, *([self.low + self.step] if self.step else []), self.high]

    @property
    def last_step(self) -> int:
        """How many there are above the lowest value, where a step is given."""
        assert self.step
        return int((self.high - self.low) / self.step + 1e-9)

    def draw(self, rng: random.Random) -> Any:
        if self.choices:
            return rng.choice(self.choices)
        if self.step:
            return self.rounded(self.low + self.step * rng.randint(0, self.last_step))
        if self.log:
            return self.rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return rng.randint(int(self.low), int(self.high)) if self.whole else self.rounded(rng.uniform(self.low, self.high))

    def rounded(self, value: float) -> Any:
        """To what a reader wants to see: whole, or four digits."""
        return min(max(round(value) if self.whole else float(f"{value:.4g}"), self.low), self.high)


@dataclass
class Sweep:
    name: str
    tag: str
    ranks: int
    fixed: dict[str, Any]
    choices: list[list[dict[str, Any]]]  # what is crossed: the alternatives of one flag, or of several that change together
    swept: list[str]  # flags that vary
    method: str = ""  # of the search
    runs: int = 0
    seed: int = 0
    search: dict[str, Values] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def trials(self, *points: dict[str, Any]) -> list[Trial]:
        """Of each drawn point (of an empty one where none are drawn) every combination of the choices."""
        found: dict[str, Trial] = {}
        for point, *combination in itertools.product(points, *self.choices):
            flags = {**self.fixed}
            for part in (point, *combination, self.overrides):
                flags |= part
            tag = re.sub(r"\{([\w-]+)\}", lambda match: str(flags.get(match[1], match[0])), self.tag)
            found[json.dumps(flags, sort_keys=True)] = Trial(flags, tag=tag)
        return list(found.values())

    def random_point(self, number: int) -> dict[str, Any]:
        return {flag: values.draw(random.Random(f"{self.seed} {number} {flag}")) for flag, values in self.search.items()}

    def label(self, trial: Trial) -> str:
        return " ".join(f"{flag}={trial.flags[flag]}" for flag in self.swept if flag in trial.flags) or trial.name


def words_as_flags(text: str) -> dict[str, Any]:
    """Of `--a=1 --b 2 --c`: texts, or True for what has no value."""
    flags: dict[str, Any] = {}
    name = ""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--flags={text!r}: {str(error).lower()}; write --flags='--depth=4 --fp8'") from error
    for word in words:
        if match := re.fullmatch(r"--([\w-]+)(?:=(.*))?", word, re.DOTALL):
            name = match[1].replace("_", "-")
            flags[name] = True if match[2] is None else match[2]
            name = name if match[2] is None else ""
        elif name:
            flags[name], name = word, ""
        else:
            raise UsageError(f"--flags={text!r}: {word!r} belongs to no flag; write --flags='--depth=4 --fp8'")
    return flags


# -----------------------------------------------------------------------------
# Reading


class Source:
    """The text of a file, for errors that say where."""

    def __init__(self, name: str, text: str):
        self.name, self.lines = name, {}
        table, counts = "", {}
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*(\[\[?)\s*([^\]\[]+?)\s*\]", line):
                table = match[2]
                if match[1] == "[[":
                    counts[table] = counts.get(table, 0) + 1
                    table += f" {counts[table]}"
                self.lines.setdefault(table, number)
            elif match := re.match(r"""\s*["']?([\w.-]+)["']?\s*=""", line):
                self.lines.setdefault(".".join(filter(None, (table, match[1]))), number)

    def error(self, message: str, *path: str) -> UsageError:
        """path: from the outermost table to the key."""
        keys = [".".join(path[:length]) for length in range(len(path), 0, -1)]
        line = next((self.lines[key] for key in keys if key in self.lines), None)
        return UsageError(f"{self.name}{f', line {line}' if line else ''}: {message}")


class Flags:
    """base_train's, by which names and values are checked."""

    def __init__(self):
        self.parser = settings_parser(base_train.Settings, "")
        self.parser.error = self._error  # type: ignore[method-assign]
        self.actions = {option[2:]: action for action in self.parser._actions for option in action.option_strings if option.startswith("--")}

    def _error(self, message: str):
        raise UsageError(message)

    def name(self, key: str) -> str:
        """In dashes. Raises UsageError for one that is none, or not a sweep's to set."""
        name = key.replace("_", "-")
        if name in OURS:
            raise UsageError(f"{key} is not for sweeps: {OURS[name]}")
        if name not in self.actions:
            raise UsageError(f"base_train has no flag --{name}{_perhaps(name, self.actions)}")
        return name

    def value(self, name: str, word: Any) -> Any:
        """A number where the flag takes one, or one is written as numbers are, so that a run is the same as one whose flags stand in the file."""
        if word is True or self.actions[name].nargs == 0:
            return word
        parsed = getattr(self.parser.parse_args([f"--{name}={word}"]), self.actions[name].dest)
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                if isinstance(parsed, (int, float)) or str(kind(word)) == word:
                    return kind(word)
        return word

    def check(self, name: str, value: Any) -> None:
        """Raises UsageError for a value that the flag does not take."""
        switch = self.actions[name].nargs == 0
        if switch != isinstance(value, bool):
            raise UsageError(f"--{name} is a switch: give true or false" if switch else f"--{name} is no switch: give it a value instead of {str(value).lower()}")
        if not switch:
            if not isinstance(value, (str, int, float)):
                raise UsageError(f"--{name} takes a text or a number, not {value!r}")
            self.parser.parse_args([f"--{name}={value}"])


def _perhaps(word: str, words) -> str:
    close = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {close[0]}?" if close else ""


def text_of(config: str | Path) -> str:
    """Of a sweep's file, - for standard input. Raises UsageError where there is none."""
    try:
        return sys.stdin.read() if str(config) == "-" else Path(config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {config} ({error}); give the TOML file of a sweep, such as those of analysis/sweeps (docs/sweeps.md)") from error


def read_sweep(name: str, text: str, flags: str = "") -> Sweep:
    """name: of the file. flags: more of base_train's, which have the last word. Raises UsageError that says what is wrong in which line."""
    source, known = Source(name, text), Flags()
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOML's own, numbers beyond what Python reads, tables nested too deep
        raise UsageError(f"{name} is not TOML: {error}") from None

    def typed(table: dict, kinds: dict, *path: str) -> None:
        for key, value in table.items():
            if key not in kinds:
                raise source.error(f"{key!r} means nothing here{_perhaps(key, kinds) or '; there are ' + ', '.join(kinds)}", *path, key)
            if not isinstance(value, kinds[key]) or isinstance(value, bool) and kinds[key] is not bool:
                wanted = {str: "a text", int: "a whole number", dict: "a table", list: "a list of tables, each headed [[together]]"}[kinds[key]]
                raise source.error(f"{key} must be {wanted}", *path, key)

    typed(data, TABLES)
    used: dict[str, str] = {}

    def named(table: str, entries: dict, *path: str) -> dict[str, Any]:
        """The entries of a table by the names of flags, of which each may be set in one place only."""
        found = {}
        for key, value in entries.items():
            try:
                flag = known.name(key)
                if flag in used:
                    raise UsageError(f"{key} is set in {used[flag]} already")
                used[flag] = table
                for one in [value] if table == "[fixed]" else value.ends() if isinstance(value, Values) else value:
                    known.check(flag, one)
            except UsageError as error:
                raise source.error(str(error), *path, key) from None
            found[flag] = value
        return found

    def lists(entries: dict, *path: str) -> dict:
        for key, value in entries.items():
            if not isinstance(value, list) or not value:
                raise source.error(f"{key} needs a list of values here, as in {key} = [1, 2]; what all runs share goes into [fixed]", *path, key)
        return entries

    fixed = named("[fixed]", data.get("fixed", {}), "fixed")
    choices = [[{flag: value} for value in values] for flag, values in named("[grid]", lists(data.get("grid", {}), "grid"), "grid").items()]
    for number, rows in enumerate(data.get("together", []), 1):
        path = f"together {number}"
        if not isinstance(rows, dict):
            raise source.error("together must be tables, each headed [[together]]", "together")
        columns = named("[[together]]", lists(rows, path), path)
        if len({len(values) for values in columns.values()}) != 1:
            raise source.error(f"lists of one [[together]] must be equally long, not {', '.join(f'{flag}: {len(values)}' for flag, values in columns.items()) or 'none'}", path)
        choices.append([dict(zip(columns, row)) for row in zip(*columns.values())])
    sweep = Sweep(data.get("name", Path(name).stem), data.get("tag", ""), data.get("ranks", 1), fixed, choices, [], slurm=data.get("slurm", {}))
    if "search" in data:
        _read_search(sweep, data["search"], typed, named, source)
    elif not choices:
        raise UsageError(f"{name}: nothing varies; give a [grid], a [[together]] or a [search]")
    sweep.swept = [flag for alternatives in choices for flag in alternatives[0]] + list(sweep.search)
    if sweep.ranks < 1:
        raise source.error(f"ranks = {sweep.ranks} must be 1 or more", "ranks")
    for key, value in (("name", sweep.name), ("tag", sweep.tag)):
        try:
            if not folder_name(value) and key == "name":
                raise ValueError("it is empty")
        except Exception as error:
            raise source.error(f"{key}: {error}", key) from None
    for flag, word in words_as_flags(flags).items():
        value = known.value(known.name(flag), word)
        known.check(flag, value)
        sweep.overrides[flag] = value
    return sweep


def _read_search(sweep: Sweep, table: dict, typed, named, source: Source) -> None:
    typed(table, {"method": str, "runs": int, "seed": int, "flags": dict}, "search")
    sweep.method, sweep.runs, sweep.seed = table.get("method", ""), table.get("runs", 0), table.get("seed", 0)
    if sweep.method not in ("random", "optuna"):
        raise source.error('method must be "random" or "optuna"', "search", "method")
    if sweep.runs < 1:
        raise source.error("runs must say how many points are drawn", "search", "runs")
    if sweep.method == "optuna" and not 0 <= sweep.seed <= 2 ** 32 - sweep.runs:  # each point has its own
        raise source.error("optuna takes seeds from 0 to 2^32, less the runs", "search", "seed")
    values: dict[str, Values] = {}
    for key, entry in table.get("flags", {}).items():
        where = "search", "flags", key
        if isinstance(entry, list) and entry:
            values[key] = Values(tuple(entry))
            continue
        number = lambda name: isinstance(entry.get(name), (int, float)) and not isinstance(entry[name], bool) and abs(entry[name]) <= sys.float_info.max
        if not isinstance(entry, dict) or not entry.keys() <= {"min", "max", "log", "step"} or not (number("min") and number("max")):
            raise source.error(f"{key} must be a list of values, or {{min = ..., max = ...}} with log = true or a step", *where)
        if not isinstance(entry.get("log", False), bool):
            raise source.error(f"{key}: log must be true or false", *where)
        drawn = values[key] = Values((), entry["min"], entry["max"], entry.get("log", False), entry.get("step"))
        if not drawn.low < drawn.high:
            raise source.error(f"{key}: min must be below max", *where)
        if drawn.log and drawn.low <= 0:
            raise source.error(f"{key}: with log = true min must be above 0", *where)
        if "step" in entry and (drawn.log or not number("step") or entry["step"] <= 0):
            raise source.error(f"{key}: step must be above 0, and without log", *where)
    if not values:
        raise source.error("[search.flags] must say what is drawn", "search")
    sweep.search = named("[search.flags]", values, "search", "flags")


def check_runs(sweep: Sweep, trials: list[Trial]) -> None:
    """Raises UsageError for flags that contradict each other, and for runs of one name."""
    if len({trial.name for trial in trials}) < len(trials):  # they differ in their flags
        raise UsageError(f"{sweep.name}: several runs have the tag {sweep.tag!r}; name the flags in it that vary, as in \"mine_d{{depth}}\"")
    for trial in trials:
        try:
            base_train.parse(trial.arguments())
        except UsageError as error:
            raise UsageError(f"{sweep.name}, the run with {sweep.label(trial)}: {error}") from None


# -----------------------------------------------------------------------------
# For others


MOST_STEPS = 1000  # in a list for wandb
# wandb hands every parameter over as `--name=value`; that of a [[together]] is a list of flags
WANDB_SHELL = ('for word; do shift; case $word in --together-*) eval "set -- \\"\\$@\\" ${word#*=}";; *) set -- "$@" "$word";; esac; done; '
               'exec "$0" %s -m scripts.base_train --model-tag="wandb-$WANDB_RUN_ID" "$@"')  # a folder for each run, by the number that wandb gives it


def as_wandb(sweep: Sweep) -> dict[str, Any]:
    """The same as the configuration of a wandb sweep, whose agents do the runs, each on the device that it finds there unless the sweep names one. Values that change
    together are one parameter, of lists of flags. Raises UsageError for points of a search that are several runs each, of which wandb knows nothing: it would draw the
    seed too, and take the luckiest."""
    several = [flag for alternatives in sweep.choices if len(alternatives) > 1 for flag in alternatives[0] if flag not in sweep.overrides]
    if sweep.method and several:
        raise UsageError(f"{sweep.name}: wandb cannot run each point of a [search] with every value of {several[0]}; move one value of it into [fixed], or let analysis.sweep do the runs")
    begin = {} if sweep.tag else {flag: value for flag, value in DEFAULTS.items() if flag != "device-type"}
    parameters: dict[str, dict] = {flag: {"value": value} for flag, value in (begin | sweep.fixed | {"run": sweep.name} | sweep.overrides).items()}
    for alternatives in sweep.choices:
        left = [{flag: value for flag, value in alternative.items() if flag not in sweep.overrides} for alternative in alternatives]
        if len(left[0]) == 1:
            (flag,) = left[0]
            parameters[flag] = {"values": list(dict.fromkeys(alternative[flag] for alternative in left))}
        elif left[0]:
            name = f"together-{sum(parameter.startswith('together-') for parameter in parameters) + 1}"
            parameters[name] = {"values": list(dict.fromkeys(shlex.join(as_words(alternative)) for alternative in left))}
    for flag, values in sweep.search.items():
        if values.choices:
            parameters[flag] = {"values": list(values.choices)}
        elif values.step:  # wandb would count them from 0, and past the highest
            if values.last_step >= MOST_STEPS:
                raise UsageError(f"{sweep.name}: {flag} has {values.last_step + 1:,} steps, and wandb gets a list of them; give it {MOST_STEPS:,} at most, or none")
            parameters[flag] = {"values": [values.rounded(values.low + values.step * i) for i in range(values.last_step + 1)]}
        else:
            kind = ("log_uniform_values" if values.log else "uniform") if not values.whole else "q_log_uniform_values" if values.log else "int_uniform"
            parameters[flag] = {"distribution": kind, "min": values.low, "max": values.high}
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={sweep.ranks}" if sweep.ranks > 1 else ""
    return {"program": "scripts/base_train.py", "name": sweep.name, "method": {"": "grid", "random": "random", "optuna": "bayes"}[sweep.method],
            **({"run_cap": sweep.runs} if sweep.method else {}), "metric": {"name": "val/bpb", "goal": "minimize"}, "parameters": parameters,
            "command": ["${env}", "bash", "-c", WANDB_SHELL % torchrun, "${interpreter}", "${args_no_boolean_flags}"]}
