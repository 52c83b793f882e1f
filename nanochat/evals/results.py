"""What was measured: rows with standard errors, in one file beside the checkpoint, from which all reports are drawn.

`eval_000123.json` in the checkpoint's folder holds what is known of step 123, whoever measured it (`base_eval`, or `base_train` while it runs):

    {"step": 123, "tokens": ..., "flops": ..., "rows": {"core/arc_easy": {"value": 0.31, "se": 0.02, "n": 500, "metric": "accuracy", "baseline": 0.25, ...}}}

A row's key begins with the evaluation as it was asked for: `core:50/arc_easy` was measured on 50 rows and never takes the place of `core/arc_easy`.
A later measurement replaces the rows of its keys and no others.
"""
import datetime
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.cli import UsageError
from nanochat.files import locked, parse_json, to_json, write_text_atomic


@dataclass(frozen=True)
class Row:
    """value: a mean over `n` examples. se: its standard error, over the drawing of examples; None where that is not known.

    baseline: what guessing gives, in the same unit. label: the name in the summary of the report, for the few numbers that belong there.
    counts: what else there was to count: ties, rows left out, prompts beyond the context.
    """

    value: float
    n: int
    se: float | None = None
    metric: str = "accuracy"
    baseline: float | None = None
    label: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.se:.4f}" if self.se is not None else "")


Results = dict[str, Row]  # by key


def mean_row(scores: torch.Tensor, **fields: Any) -> Row:
    """Of scores (n,), one for each example, NaN for those that were left out. Standard error: their deviation over the root of their number."""
    left_out = int(scores.isnan().sum())
    scores = scores[~scores.isnan()].double()
    n = len(scores)
    counts = {**fields.pop("counts", {}), **({"left out": left_out} if left_out else {})}
    counts = {name: count for name, count in counts.items() if count}
    se = scores.std().item() / math.sqrt(n) if n > 1 else None
    return Row(scores.mean().item() if n else math.nan, n, se, counts=counts, **fields)


def average(rows: Sequence[Row], **fields: Any) -> Row:
    """The mean of independent rows, each of the same weight; `n` and counts are sums."""
    errors = [row.se for row in rows]
    se = math.sqrt(sum(error ** 2 for error in errors if error is not None)) / len(rows) if None not in errors else None
    counts: dict[str, int] = {}
    for row in rows:
        for name, count in row.counts.items():
            counts[name] = counts.get(name, 0) + count
    return Row(sum(row.value for row in rows) / len(rows), sum(row.n for row in rows), se, counts=counts, **fields)


# -----------------------------------------------------------------------------
# The file


def results_path(folder: Path, step: int) -> Path:
    return Path(folder, f"eval_{step:06d}.json")


def read_results(path: Path) -> dict:
    """The file's content, {"rows": {}} where there is none. Raises UsageError where it is broken."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not all(isinstance(row, dict) and {"value", "n"} <= row.keys() for row in content["rows"].values()):
            raise ValueError("a row has no value")
        return content
    except FileNotFoundError:
        return {"rows": {}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a file of results ({type(error).__name__}: {error}); delete it") from error


def write_results(folder: Path, step: int, results: Results, **facts: Any) -> Path:
    """Adds rows to those that are known of this step. facts: what the model had seen (tokens, flops); None is not known."""
    path = results_path(folder, step)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with locked(path):
        content = read_results(path)
        rows = content["rows"] | {key: {name: value for name, value in asdict(row).items() if value not in (None, "", {})} | {"time": now}
                                  for key, row in results.items()}
        known = {name: value for name, value in facts.items() if value is not None}
        write_text_atomic(path, to_json({"step": step, **content, **known, "rows": dict(sorted(rows.items()))}, indent=1))
    return path


def all_results(folder: Path) -> dict[int, dict]:
    """What is known of the steps of a run, by step, ascending."""
    found = {int(match[1]): path for path in Path(folder).glob("eval_*.json") if (match := re.fullmatch(r"eval_(\d+)\.json", path.name))}
    return {step: read_results(found[step]) for step in sorted(found)}


def forget_results(folder: Path, after: int = -1) -> None:
    """Removes what is known of later steps: a run that begins anew, or goes on from an earlier step, makes other models of them."""
    for path in Path(folder).glob("eval_*.json"):
        if (match := re.fullmatch(r"eval_(\d+)\.json", path.name)) and int(match[1]) > after:
            path.unlink()


# -----------------------------------------------------------------------------
# As text


def headlines(results: Results) -> dict[str, float]:
    """The labelled rows, for the report's summary."""
    return {row.label: row.value for row in results.values() if row.label}


def table(rows: Iterable[tuple[str, dict]]) -> str:
    """Rows of the file, (key, row) each, as a Markdown table."""
    lines = ["| Evaluation | Result | Standard error | Guessing | n | |", "|---|---:|---:|---:|---:|---|"]
    show = lambda value: "" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"
    for key, row in rows:
        notes = [] if row.get("metric", "accuracy") == "accuracy" else [row["metric"]]
        notes += [f"{count:,} {name}" for name, count in row.get("counts", {}).items()]
        lines.append(f"| {key} | {show(row.get('value')) or 'n/a'} | {show(row.get('se'))} | {show(row.get('baseline'))} | {row['n']:,} | {', '.join(notes)} |")
    return "\n".join(lines) + "\n"
