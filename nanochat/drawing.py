"""Pictures of reports and studies: figures without a window, and one style for light and dark pages."""
import contextlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat.files import atomic_path

INK, COLORS = "#808890", ("#3b82f6", "#e8853d", "#10b981", "#a855f7", "#64748b", "#d946ef")
DPI = 160


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of that many inches. Importing matplotlib is slow, so it comes with the first."""
    if "matplotlib" not in sys.modules:
        wanted = os.environ.pop("MPLBACKEND", None)  # a name that this matplotlib does not know would end the import, and a figure needs none
        try:
            import matplotlib
        finally:
            if wanted is not None:
                os.environ["MPLBACKEND"] = wanted
        with contextlib.suppress(ValueError):
            if wanted:  # of whoever draws on a screen
                matplotlib.rcParams["backend"] = wanted
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any, panels: Iterable[Any], **ticks: Any) -> bytes:
    """The picture with a transparent background, its panels with a grid of mid-tones and no frame. ticks: what `tick_params` takes."""
    for panel in panels:
        panel.grid(color=INK, alpha=0.25, linewidth=0.6)
        panel.tick_params(colors=INK, **ticks)
        panel.spines[:].set_visible(False)
        panel.set_facecolor("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


@contextlib.contextmanager
def pictures(path: Path, width: float, height: float, columns: int):
    """Yields the axes of so many pictures side by side, of that many inches in all, which are written to one file afterwards."""
    figure = new_figure(width, height)
    yield figure.subplots(1, columns, squeeze=False)[0]
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=DPI)


@contextlib.contextmanager
def picture(path: Path, width: float, height: float):
    """One of `pictures`."""
    with pictures(path, width, height, 1) as (axes,):
        yield axes
