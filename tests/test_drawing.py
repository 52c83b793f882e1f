"""Pictures wherever they are drawn: without a window, and whatever the environment says of windows."""
import os
import subprocess
import sys

from nanochat.drawing import as_png, new_figure
from tests.tiny import ROOT


def test_a_picture():
    figure = new_figure(2, 1)
    panel = figure.subplots()
    panel.plot([1, 2], [3, 4])
    picture = as_png(figure, [panel], labelsize=5)
    assert picture.startswith(b"\x89PNG") and not any(spine.get_visible() for spine in panel.spines.values())


def test_a_backend_that_matplotlib_does_not_know():
    """As a notebook or an old Qt leaves it in the environment."""
    program = "from nanochat.drawing import as_png, new_figure; import os; figure = new_figure(1, 1); print(len(as_png(figure, [figure.subplots()])) * (os.environ['MPLBACKEND'] == 'Qt4Agg'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"MPLBACKEND": "Qt4Agg"}, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 100, done.stderr
