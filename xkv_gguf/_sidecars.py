"""From options to the sidecar and ranks that a context uses."""

from __future__ import annotations

from pathlib import Path

from ._native import ScopeParams
from .convert.find import find_sidecar
from .convert.pipeline import ensure_sidecar
from .convert.sidecar import Sidecar, read_sidecar
from .convert.sizes import CacheLayout, GroupShape, predict_parts
from .errors import OptionError
from .options import XkvOptions


def open_sidecar(model: Path, options: XkvOptions, threads: int | None = None) -> Sidecar:
    """Read and check the sidecar of a model: the one that is named, or else one that is found or made.

    Parameters
    ----------
    model : Path
    options : XkvOptions
    threads : int, optional
        Threads for making it.

    Returns
    -------
    Sidecar

    Raises
    ------
    SidecarError
        It is missing, damaged, newer, or of another model.
    OptionError
        Its frame does not fit the options.
    """
    path = Path(options.sidecar) if options.sidecar is not None else find_sidecar(model)
    if path is None:
        path = ensure_sidecar(model, threads=threads)
    sidecar = read_sidecar(path)
    sidecar.check_model(model)
    frame = sidecar.info.frame
    if options.n_block % frame:
        raise OptionError(f"xkv option n_block: {options.n_block}, expected a multiple of the sidecar's frame, {frame}")
    return sidecar


def scope_params(sidecar: Sidecar, options: XkvOptions) -> ScopeParams:
    """What the native library needs to know; plans ranks when a ratio is given.

    Raises
    ------
    OptionError
        The ratio cannot be met.
    """
    type_k, type_v = options.coef_types
    return ScopeParams(
        sidecar=str(sidecar.path),
        n_sink=options.n_sink,
        n_window=options.n_window,
        n_block=options.n_block,
        n_absorb=options.n_absorb,
        type_coef_k=type_k,
        type_coef_v=type_v,
        type_basis=options.type_basis,
        ranks=None if options.ratio is None else sidecar.plan(options.ratio, type_k, type_v),
    )


def predicted_bytes(sidecar: Sidecar, params: ScopeParams, n_ctx: int, n_ubatch: int) -> int:
    """Bytes that the cache will take, near enough to tell what cannot fit."""
    shapes = sidecar.info.shapes
    if params.ranks is not None:
        shapes = tuple(
            GroupShape(shape.dim_k, shape.dim_v, rank_k, rank_v)
            for shape, rank_k, rank_v in zip(shapes, *params.ranks, strict=True)
        )
    layout = CacheLayout(
        n_sink=params.n_sink,
        n_window=params.n_window,
        n_block=params.n_block,
        n_ubatch=n_ubatch,
        frame=sidecar.info.frame,
        type_coef_k=params.type_coef_k,
        type_coef_v=params.type_coef_v,
        type_basis=params.type_basis,
    )
    return sum(predict_parts(shapes, layout, n_ctx).values())
