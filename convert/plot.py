"""Draws the spectra of a sidecar."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from xkv_gguf.convert.sidecar import Sidecar
from xkv_gguf.convert.sidecar_info import KINDS
from xkv_gguf.convert.sidecar_write import check_writable
from xkv_gguf.errors import OptionError

FORMATS = (".png", ".svg", ".pdf")


def plot_spectra(sidecar: Sidecar, path: Path) -> None:
    """Draw the variance along each direction, one line per group, K and V side by side; dots mark the planned ranks.

    Parameters
    ----------
    sidecar : Sidecar
    path : Path
        A file name that ends in .png, .svg or .pdf.

    Raises
    ------
    OptionError
        The name has another ending, the file cannot be written, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"plot {path}: a name that ends in {', '.join(FORMATS)} expected")
    check_writable(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise OptionError("--plot needs matplotlib; `pip install xkv-gguf[plot]` brings it") from err
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    info = sidecar.info
    for axis, kind in zip(axes, KINDS, strict=True):
        for g, group in enumerate(info.groups):
            spectrum = np.asarray(sidecar.spectrum(g, kind), dtype=np.float64)
            share = spectrum / max(spectrum.sum(), np.finfo(np.float64).tiny)
            rank = group.rank_k if kind == "k" else group.rank_v
            x = np.arange(1, len(share) + 1)
            label = f"layers {group.first}-{group.first + group.count - 1}, rank {rank}"
            line = axis.semilogy(x[share > 0], share[share > 0], lw=1.2, label=label)[0]
            if share[rank - 1] > 0:
                axis.plot(rank, share[rank - 1], "o", ms=5, color=line.get_color())
        axis.set_title(f"{kind.upper()}, {len(info.groups)} groups")
        axis.set_xlabel("direction")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("share of the variance")
    figure.suptitle(f"{info.name or info.architecture}: spectra, dots at the planned ranks")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temp:
        figure.savefig(Path(temp) / path.name, dpi=120)
        (Path(temp) / path.name).replace(path)
