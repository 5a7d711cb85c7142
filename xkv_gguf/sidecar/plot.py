"""Draws the spectra of a sidecar."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..base.pictures import check_picture, new_figure, save_figure
from ..plan.cache_plan import CachePlan
from ..plan.groups import name_layers
from ..plan.segments import KINDS
from .read import Sidecar


def plot_spectra(sidecar: Sidecar, plan: CachePlan, path: Path) -> None:
    """Draw the variance along each direction, one line per group, K and V side by side; dots end a plan's segments.

    Parameters
    ----------
    sidecar : Sidecar
    plan : CachePlan
    path : Path
        A file name that ends in .png, .svg or .pdf.

    Raises
    ------
    OptionError
        The name has another ending, the file cannot be written, or matplotlib is not installed.
    """
    check_picture(path)
    figure = new_figure(11, 4.5)
    axes = figure.subplots(1, 2, sharey=True)
    info = sidecar.info
    for axis, kind in zip(axes, KINDS, strict=True):
        for g, group in enumerate(info.groups):
            if kind not in info.kinds(g):
                continue
            spectrum = np.asarray(sidecar.spectrum(g, kind), dtype=np.float64)
            share = spectrum / max(spectrum.sum(), np.finfo(np.float64).tiny)
            ends = np.cumsum([segment.rank for segment in plan.of(g, kind)])
            x = np.arange(1, len(share) + 1)
            label = f"layers {name_layers(group.layers)}, rank {ends[-1]}"
            line = axis.semilogy(x[share > 0], share[share > 0], lw=1.2, label=label)[0]
            ends = ends[share[ends - 1] > 0]
            axis.plot(ends, share[ends - 1], "o", ms=4, color=line.get_color())
        n_group = sum(kind in info.kinds(g) for g in range(len(info.groups)))
        axis.set_title(f"{kind.upper()}, {n_group} groups" if n_group else "V is a part of K")
        axis.set_xlabel("direction")
        axis.grid(alpha=0.3)
        if n_group:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("share of the variance")
    figure.suptitle(f"{info.name or info.architecture}: spectra, dots where segments end")
    save_figure(figure, path)
