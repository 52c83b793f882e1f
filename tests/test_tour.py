"""The notebook runs from its first cell to its last."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "analysis" / "tour.ipynb"


@pytest.mark.slow
def test_every_cell_runs():
    """As in Jupyter, in the notebook's own folder, but without its kernel: cells are plain Python."""
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    code = "\n\n".join(cells)
    done = subprocess.run([sys.executable, "-c", code], cwd=NOTEBOOK.parent, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("have a twin" in line for line in lines) == 2
    difference = next(float(line.rpartition(": ")[2]) for line in lines if line.startswith("2x64 -> 5x160"))
    assert difference < 0.1  # in bf16, or 1e-5 in float32
    before, after = (float(x) for x in next(line for line in lines if line.startswith("2x64 → 3x96 at step")).split(": ")[1].split(" bits")[0].split(" -> "))
    assert abs(before - after) < 0.01
