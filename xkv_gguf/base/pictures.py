"""Pictures by matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import OptionError
from .files import check_writable, replacing

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before work is done for it.

    Raises
    ------
    OptionError
        The name has an unknown ending, the file cannot be written, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"--plot: {path}, expected a name that ends in {', '.join(FORMATS)}")
    check_writable(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib; `pip install xkv-gguf[plot]` brings it") from error


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, which appears when it is complete."""
    with replacing(path) as temp:
        figure.savefig(temp, dpi=120)
