"""Runs side by side: what they are, what they cost and what they can do, with error bars, and whether one is really better (`python -m nanochat.report compare TAG TAG ...`).

Everything is read from the logs and from the results beside the checkpoints (evals/results.py); nothing is measured here.
"""
import math
from pathlib import Path

import numpy as np

from nanochat.cli import UsageError
from nanochat.drawing import COLORS, INK, as_png, new_figure
from nanochat.eval_report import EvalReport
from nanochat.run_log import FILENAME
from nanochat.run_report import TrainingRun, count, duration, table

FLIPS = 20_000  # of signs, in the paired test
MIN_PAIRS = 5  # with fewer no p-value means anything


class Contestant:
    """One run of the base directory. Raises UsageError where there is none of this tag."""

    def __init__(self, base_dir: str | Path, tag: str):
        self.tag, self.folder = tag, Path(base_dir, "base_checkpoints", tag)
        if not (self.folder / FILENAME).exists():
            known = sorted(path.parent.name for path in self.folder.parent.glob(f"*/{FILENAME}"))
            raise UsageError(f"there is no run {tag} to compare; there are: {', '.join(known) or 'none'}")
        self.run = TrainingRun(self.folder / FILENAME)
        self.newest = {key: (step, row) for key, (step, row) in EvalReport(self.folder).newest().items() if row.get("value") is not None}
        self.step = max((record["step"] for record in self.run.records), default=0)  # where it stands

    @property
    def rows(self) -> dict[str, dict]:
        """What was measured of the run as it stands, which alone is comparable."""
        return {key: row for key, (step, row) in self.newest.items() if step == self.step}

    def shown(self, key: str) -> str:
        """The cell of a table: value, standard error, and the step where it is not the last; empty where nothing is known."""
        if key not in self.newest:
            return ""
        step, row = self.newest[key]
        digits = ".2f" if abs(row["value"]) >= 10 else ".4f"
        return f"{row['value']:{digits}}" + (f" ± {row['se']:{digits}}" if row.get("se") is not None else "") + (f" (step {step:,})" if step != self.step else "")

    def facts(self) -> dict[str, str]:
        run, end = self.run, self.run.last("end")
        counts = run.latest("counts", "start", "grow") or {}
        bpb, weights = run.latest("val_bpb", "eval"), sorted(self.folder.glob("model_*.pt"))
        flops, seconds = run.latest("flops", "train", "eval"), run.latest("time", "train", "eval")
        return {
            "Shape": run.shape(),
            "Parameters": count(counts["total"]) if counts.get("total") else "",
            "Training tokens": count(run.latest("tokens", "train", "eval") or 0),
            "Training FLOPs": f"{flops:.3e}" if flops else "",
            "Training time": duration(seconds) if seconds else "",
            "Peak memory": f"{end['peak_memory_mib']:,.0f} MiB" if end.get("peak_memory_mib") else "",
            "Size on disk": f"{weights[-1].stat().st_size / 2 ** 20:,.1f} MiB" if weights else "",
            "Validation bpb": f"{bpb:.4f}" if bpb is not None else "",
        }


def paired_test(differences) -> float:
    """Two-sided p-value of the mean of paired differences (n,): how often random signs make it as large. All signs are tried where they are few."""
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    if n <= math.log2(FLIPS):
        signs = 1 - 2 * ((np.arange(2 ** n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean())
    signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (FLIPS, n))
    return float((1 + (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).sum()) / (FLIPS + 1))


def pairs_of(one: dict, other: dict) -> dict[str, list[tuple[float, float]]]:
    """By evaluation the accuracies of both on its tasks or paradigms, the finest rows that both have."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key in one.keys() & other.keys():
        evaluation, _, rest = key.partition("/")
        fine = "/paradigm/" in key if evaluation.startswith("blimp") else bool(rest)
        if fine and one[key].get("metric", "accuracy") == "accuracy":
            name = key.partition("/paradigm/")[0] if "/paradigm/" in key else evaluation
            found.setdefault(name, []).append((one[key]["value"], other[key]["value"]))
    return dict(sorted(found.items()))


def verdicts(first: Contestant, other: Contestant) -> list[str]:
    """A sentence for each evaluation that both, as they stand, have of several tasks."""
    said = []
    for name, pairs in pairs_of(first.rows, other.rows).items():
        differences = [b - a for a, b in pairs]
        if len(pairs) < MIN_PAIRS:
            continue
        p = paired_test(differences)
        mean = sum(differences) / len(differences)
        better = f"{other.tag if mean > 0 else first.tag} is better" if p < 0.01 else "no difference that could not be chance"
        said.append(f"{name}: {better} ({other.tag} - {first.tag} = {mean:+.4f} over {len(pairs)} tasks, random signs of the differences: p = {p:.4f})")
    return said


def compare(contestants: list[Contestant], picture: str) -> str:
    """As Markdown; `picture` is the Markdown that shows it."""
    facts = [contestant.facts() for contestant in contestants]
    rows = [[name, *(fact[name] for fact in facts)] for name in facts[0] if any(fact[name] for fact in facts)]
    labelled = dict.fromkeys(key for contestant in contestants for key, (_, row) in contestant.newest.items() if row.get("label"))
    rows += [[key, *(contestant.shown(key) for contestant in contestants)] for key in labelled]
    parts = [f"# {' against '.join(contestant.tag for contestant in contestants)}\n", table(["", *(contestant.tag for contestant in contestants)], rows), picture]
    said = [line for other in contestants[1:] for line in verdicts(contestants[0], other)]
    parts += ["\n## Is one better?\n", "".join(f"- {line}\n" for line in said) or
              f"No evaluation of {MIN_PAIRS} tasks or more is known of the last steps of two of them: run base_eval --eval=blimp,core on both.\n"]
    return "\n".join(parts)


def draw(contestants: list[Contestant]) -> bytes:
    """PNG: left validation losses over FLOPs, right the labelled accuracies of the last steps with their standard errors."""
    keys = list(dict.fromkeys(key for one in contestants for key, row in one.rows.items() if row.get("label") and row.get("metric", "accuracy") == "accuracy"))
    figure = new_figure(11 if keys else 6, 4)
    panels = figure.subplots(1, 2 if keys else 1, squeeze=False)[0]
    for i, one in enumerate(contestants):
        color = COLORS[i % len(COLORS)]
        points = [(record["flops"], record["val_bpb"]) for record in one.run.of("eval") if record.get("flops") and record.get("val_bpb") is not None]
        if points:
            panels[0].plot(*zip(*points), color=color, marker="o", markersize=3, label=one.tag)
        if keys:
            known = [(place + 0.8 * i / len(contestants), one.rows[key]) for place, key in enumerate(keys) if key in one.rows]
            panels[1].barh([place for place, _ in known], [row["value"] for _, row in known], xerr=[row.get("se") or 0.0 for _, row in known],
                           height=0.8 / len(contestants), color=color, ecolor=INK, label=one.tag)
    panels[0].set_xlabel("training FLOPs", color=INK)
    panels[0].set_ylabel("validation bits per byte", color=INK)
    if keys:
        panels[1].set_yticks([place + 0.4 for place in range(len(keys))], keys, fontsize=8)
        panels[1].set_xlabel("accuracy", color=INK)
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, labelcolor=INK, fontsize=8)
    return as_png(figure, panels)
