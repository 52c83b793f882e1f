"""What was measured of a run, as a table and a picture, drawn from the files of results beside its checkpoints (evals/results.py)."""
from pathlib import Path

from nanochat.drawing import COLORS, INK, as_png, new_figure
from nanochat.evals.results import all_results, table

BARS = 40  # at most: with BLiMP's 67 paradigms nobody would see the rest
EARLIER_RUNS = 3  # that are drawn beside


class EvalReport:
    """Of a run's folder. Raises UsageError where a file of results is broken."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.results = all_results(self.folder)  # by step

    def __bool__(self) -> bool:
        return bool(self.results)

    def newest(self) -> dict[str, tuple[int, dict]]:
        """(step, row) by key: of each key that of the last step that has it."""
        return {key: (step, row) for step, content in self.results.items() for key, row in content["rows"].items()}

    def markdown(self, picture: str) -> str:
        """The section; `picture` is the Markdown that shows it."""
        newest = self.newest()
        parts = ["### Evaluations\n", picture]
        for step in sorted({step for step, _ in newest.values()}, reverse=True):
            parts += [f"At step {step:,}:\n", table((key, row) for key, (at, row) in sorted(newest.items()) if at == step)]
        return "\n".join(parts)

    # -------------------------------------------------------------------------
    # Picture

    def _earlier(self) -> list["EvalReport"]:
        """The runs beside this one that were evaluated last."""
        times = {folder: max(path.stat().st_mtime for path in folder.glob("eval_*.json"))
                 for folder in {path.parent for path in self.folder.parent.glob("*/eval_*.json")} if folder != self.folder}
        return [EvalReport(folder) for folder in sorted(times, key=lambda folder: times[folder], reverse=True)[:EARLIER_RUNS]]

    def bars(self) -> dict[str, dict]:
        """The rows that are drawn as bars: accuracies whose guessing is known."""
        rows = {key: row for key, (_, row) in self.newest().items()
                if row.get("baseline") is not None and row.get("value") is not None and row.get("metric", "accuracy") == "accuracy"}
        for fine in "/paradigm/", "/term/":
            if len(rows) > BARS:
                rows = {key: row for key, row in rows.items() if fine not in key}
        return dict(sorted(rows.items())[:BARS])

    def curves(self) -> dict[str, list[tuple[float, float, float]]]:
        """By key (FLOPs, value, standard error) of the labelled rows that are known of two steps or more; the FLOPs of a step are in its file."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for content in self.results.values():
            for key, row in content["rows"].items():
                if row.get("label") and row.get("value") is not None and content.get("flops"):
                    found.setdefault(key, []).append((content["flops"], row["value"], row.get("se") or 0.0))
        return {key: points for key, points in found.items() if len(points) > 1}

    def picture(self) -> bytes | None:
        """PNG: accuracies with their standard errors, guessing and the earlier runs; below, how the summary's numbers moved over the FLOPs. None without either."""
        bars, curves = self.bars(), self.curves()
        if not bars and not curves:
            return None
        bar_height, rows = 0.6 + 0.2 * len(bars), -(-len(curves) // 2)
        heights = ([bar_height] if bars else []) + [2.2] * rows
        figure = new_figure(8, sum(heights) + 0.3)
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        panels = []
        if bars:
            panel = figure.add_subplot(grid[0, :])
            panels.append(panel)
            places = list(range(len(bars)))[::-1]
            panel.barh(places, [row["value"] for row in bars.values()], xerr=[row.get("se") or 0.0 for row in bars.values()], color=COLORS[0], ecolor=INK,
                       height=0.6, label=self.folder.name)
            panel.plot([row["baseline"] for row in bars.values()], places, "|", color=INK, markersize=9, markeredgewidth=2, label="guessing")
            for run, marker in zip(self._earlier(), "osD"):
                known = [(row["value"], place) for key, place in zip(bars, places) if (row := run.newest().get(key, (0, {}))[1]).get("value") is not None]
                if known:
                    panel.plot(*zip(*known), marker, color=COLORS[1], markersize=4, alpha=0.8, label=run.folder.name)
            panel.set_yticks(places, list(bars), fontsize=7)
            panel.set_ylim(-0.7, len(bars) - 0.3)
            panel.set_xlim(0, 1)
            panel.set_xlabel("accuracy", color=INK)
            panel.legend(frameon=False, labelcolor=INK, fontsize=7, loc="lower right")
        for i, (key, points) in enumerate(curves.items()):
            panel = figure.add_subplot(grid[len(heights) - rows + i // 2, i % 2])
            panels.append(panel)
            flops, values, errors = zip(*points)
            panel.errorbar(flops, values, yerr=errors, color=COLORS[i % len(COLORS)], marker="o", markersize=3, linewidth=1.4, elinewidth=0.8)
            panel.set_title(key, fontsize=8, color=INK)
            panel.set_xlabel("training FLOPs", fontsize=7, color=INK)
        return as_png(figure, panels, labelsize=7)
