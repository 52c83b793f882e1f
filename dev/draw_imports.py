"""Draws who imports whom: every arrow points down, from a file to those that it stands on.

    python -m dev.draw_imports [dev/imports.png]

A file's row is one above the highest file that it imports. Arrows to neighbours only are drawn (an import that another path implies is left out), and
those to what nearly everybody imports (`cli`, `common` and the like, at the bottom) are left out too. Exit status 1 if there is a circle.
"""
import ast
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from nanochat.drawing import new_figure

ROOT = Path(__file__).parents[1]
FOLDERS = {"nanochat": "#3b82f6", "nanochat.growth": "#10b981", "nanochat.evals": "#14b8a6", "nanochat.export": "#f59e0b", "nanochat.serving": "#ef4444", "nanochat.planning": "#84cc16", "tasks": "#a855f7", "scripts": "#e8853d"}
EVERYBODYS = 12  # a file with as many importers is not drawn with its arrows


def modules(folders: Iterable[str] = FOLDERS) -> dict[str, Path]:
    paths = [path for folder in folders for path in ROOT.joinpath(*folder.split(".")).glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(paths) if path.stem != "__init__"}


def imports(folders: Iterable[str] = FOLDERS) -> dict[str, set[str]]:
    """By module the modules of these folders that it imports when it is imported."""
    known = modules(folders)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        names: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        if "nanochat.growth" in names:
            names.add("nanochat.growth.model")  # what its __init__ offers
        found[name] = (names & known.keys()) - {name}
    return found


def rows(graph: dict[str, set[str]]) -> dict[str, int]:
    """Raises graphlib.CycleError where there is a circle."""
    row: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        row[name] = 1 + max((row[below] for below in graph[name]), default=-1)
    return row


def needed(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The imports that no chain of others implies."""
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        below[name] = set().union(*({other} | below[other] for other in graph[name])) if graph[name] else set()
    return {(name, other) for name in graph for other in graph[name] if not any(other in below[third] for third in graph[name] - {other})}


def draw(path: Path) -> None:
    graph = imports()
    row = rows(graph)
    importers = {name: sum(name in others for others in graph.values()) for name in graph}
    arrows = [(a, b) for a, b in needed(graph) if importers[b] < EVERYBODYS]
    lines = [[name for name in sorted(graph) if row[name] == r] for r in range(max(row.values()) + 1)]
    place = {name: ((i + 0.5) / len(line), r) for r, line in enumerate(lines) for i, name in enumerate(line)}
    for _ in range(40):  # each where its neighbours are, as far as the order leaves room
        for r, line in enumerate(lines):
            pull = {name: [place[b][0] for a, b in arrows if a == name] + [place[a][0] for a, b in arrows if b == name] for name in line}
            line.sort(key=lambda name: sum(pull[name]) / len(pull[name]) if pull[name] else place[name][0])
            for i, name in enumerate(line):
                place[name] = ((i + 0.5) / len(line), r)
    figure = new_figure(20, 0.75 * len(lines) + 1)
    axes = figure.subplots()
    for a, b in arrows:
        (x1, y1), (x2, y2) = place[a], place[b]
        axes.annotate("", (x2, y2 + 0.16), (x1, y1 - 0.16), arrowprops=dict(arrowstyle="-|>", color="#9aa4ad", linewidth=0.7, shrinkA=0, shrinkB=0))
    for name, (x, y) in place.items():
        folder, _, short = name.rpartition(".")
        axes.text(x, y, short, ha="center", va="center", fontsize=9, color="white",
                  bbox=dict(boxstyle="round,pad=0.3", facecolor=FOLDERS[folder], edgecolor="none"))
    for i, (folder, color) in enumerate(FOLDERS.items()):
        axes.text(0.01 + 0.1 * i, len(lines) - 0.4, folder, fontsize=10, color=color, weight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(lines))
    axes.axis("off")
    figure.savefig(path, dpi=85, facecolor="white")
    print(f"{path}: {len(graph)} files, {sum(map(len, graph.values()))} imports, {len(lines)} rows, {len(arrows)} arrows drawn, no circle")


if __name__ == "__main__":
    try:
        draw(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dev" / "imports.png"))
    except CycleError as error:
        sys.exit(f"error: a circle: {' -> '.join(error.args[1])}")
