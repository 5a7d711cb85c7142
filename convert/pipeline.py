"""A whole conversion: calibrate, solve, plan, write. And finding the sidecar of a model, or making it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from xkv_gguf.convert.calibrate import LayerGroups, collect, file_sequences, self_shape
from xkv_gguf.convert.capture import Sums, model_layers
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.find import cached_sidecar, find_sidecar
from xkv_gguf.convert.fingerprint import model_fingerprint, read_model_header
from xkv_gguf.convert.plan import bytes_per_coef, check_rank, group_layers, plan_ranks, ratio_range
from xkv_gguf.convert.settings import RATIO, Settings
from xkv_gguf.convert.sidecar import read_sidecar
from xkv_gguf.convert.sidecar_info import Calibration, Group, Kind, SidecarInfo, sidecar_beside, tensor_name
from xkv_gguf.convert.sidecar_write import check_writable, write_sidecar
from xkv_gguf.convert.solve import Solver
from xkv_gguf.errors import SidecarError

__all__ = ["Converted", "convert", "ensure_sidecar", "find_sidecar"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Converted:
    """What a conversion made. `notes` are lines for the user: what was asked for and could not be had as such."""

    path: Path
    info: SidecarInfo
    notes: tuple[str, ...]


def convert(model: Path, out: Path | None, settings: Settings, show_progress: bool = True) -> Converted:
    """Calibrate a GGUF model and write its sidecar.

    Parameters
    ----------
    model : Path
        GGUF model; of a split model, its first file.
    out : Path, optional
        The sidecar; None is MODEL.xkv.gguf beside the model.
    settings : Settings
    show_progress : bool
        Draw progress bars on stderr.

    Returns
    -------
    Converted

    Raises
    ------
    ModelError, UnsupportedError
        The model cannot be read or used.
    OptionError
        A setting does not fit the model; found out before the long part begins, where that can be known.
    CalibrationError
        There is too little text, or the model fails on it.
    SidecarError
        The file cannot be written.
    """
    header = read_model_header(model)
    out = out if out is not None else sidecar_beside(model)
    check_writable(out)
    fingerprint = model_fingerprint(model)
    with Engine(model, settings.threads) as engine:
        embd_k, embd_v = model_layers(engine)
        n_layer = len(embd_k)
        group_size = settings.groups_of(n_layer)
        groups = LayerGroups.of(*group_layers(n_layer, group_size), embd_k, embd_v)
        ratio, notes = _settle_ratio(groups, settings)
        texts = file_sequences(engine, settings) if settings.data else None
        n_run = sum(map(len, texts)) if texts is not None else int(np.prod(self_shape(engine, settings.tokens)))
        biggest = max(max(dims) for dims in groups.dims.values())
        if n_run < 4 * biggest:
            notes.append(
                f"{n_run} calibration tokens are few for groups of {biggest} numbers, {4 * biggest} are advised"
            )

        with (
            tqdm(total=n_run, desc="calibrating", unit="tok", disable=not show_progress) as run_bar,
            tqdm(total=2 * len(groups.first), desc="solving", unit="basis", disable=not show_progress) as solve_bar,
            Solver[tuple[int, Kind]](settings.threads, settings.basis_type, solve_bar.update) as solver,
        ):

            def use(g: int, kind: Kind, sums: Sums) -> None:
                first, last = groups.first[g], groups.first[g] + groups.count[g] - 1
                what = f"{kind.upper()} of layers {first}-{last}"
                solver.submit((g, kind), sums.gram, sums.total, sums.n_tokens, what)

            text = collect(engine, groups, settings, texts, run_bar.update, use)
            bases = solver.results()

    arrays: dict[str, Array] = {}
    spectra: dict[Kind, list[Array]] = {"k": [], "v": []}
    for (g, kind), basis in bases.items():
        spectra[kind].append(basis.spectrum)
        arrays[tensor_name(g, kind, "basis")] = basis.basis
        arrays[tensor_name(g, kind, "mean")] = basis.mean.astype(np.float32)
        arrays[tensor_name(g, kind, "spectrum")] = basis.spectrum.astype(np.float32)

    if ratio > 0:
        bpc = bytes_per_coef(settings.type_coef)
        rank_k, rank_v = plan_ranks(spectra["k"], spectra["v"], ratio, bpc, bpc)
    else:
        assert settings.rank_k is not None and settings.rank_v is not None
        rank_k = [min(settings.rank_k, d) for d in groups.dims["k"]]
        rank_v = [min(settings.rank_v, d) for d in groups.dims["v"]]
    info = SidecarInfo(
        fingerprint=fingerprint,
        architecture=header.scalar("general.architecture"),
        name=str(header.scalar("general.name", "")),
        embd_k=tuple(embd_k),
        embd_v=tuple(embd_v),
        group_size=group_size,
        frame=settings.frame,
        n_sink=settings.n_sink,
        groups=tuple(Group(*row) for row in zip(groups.first, groups.count, rank_k, rank_v, strict=True)),
        ratio=ratio,
        calibration=Calibration(
            "files" if settings.data else "self", text.n_tokens, settings.seed, text.n_len, text.sha256
        ),
        settings=settings.record(n_layer),
    )
    write_sidecar(out, info, arrays)
    return Converted(out, info, tuple(notes))


def _settle_ratio(groups: LayerGroups, settings: Settings) -> tuple[float, list[str]]:
    """The ratio to plan for, 0 for given ranks, and notes; refuses what the model's dimensions rule out."""
    if settings.rank_k is not None and settings.rank_v is not None:
        for what, rank, dims in (
            ("rank of K", settings.rank_k, groups.dims["k"]),
            ("rank of V", settings.rank_v, groups.dims["v"]),
        ):
            # smaller groups take their dimension
            check_rank(rank, max(dims), what)
        return 0.0, []
    bpc = bytes_per_coef(settings.type_coef)
    if settings.ratio is not None:
        ones: dict[Kind, list[Array]] = {kind: [np.ones(d) for d in dims] for kind, dims in groups.dims.items()}
        plan_ranks(ones["k"], ones["v"], settings.ratio, bpc, bpc)
        return settings.ratio, []
    low, high = ratio_range(groups.dims["k"], groups.dims["v"], bpc, bpc)
    ratio = min(max(RATIO, low), high)
    if ratio == RATIO:
        return ratio, []
    return ratio, [f"the default ratio {RATIO:g} is out of reach for so small a model, {ratio:.3g} is used"]


def ensure_sidecar(
    model: str | Path, sidecar: str | Path | None = None, *, threads: int | None = None, show_progress: bool = True
) -> Path:
    """Find a model's sidecar and check it, or make it with default settings in the cache folder.

    Parameters
    ----------
    model : str or Path
        GGUF model.
    sidecar : str or Path, optional
        Take this file and look nowhere else.
    threads : int, optional
        Threads for making it.
    show_progress : bool
        Draw progress bars on stderr while making it.

    Returns
    -------
    Path
        A sidecar that was read, is whole, and was made for this model.

    Raises
    ------
    SidecarError, SidecarVersionError, SidecarMismatchError
        The file that was found cannot be used. It is not replaced silently.
    ModelError, UnsupportedError, CalibrationError
        See `convert`.
    """
    model = Path(model)
    found = Path(sidecar) if sidecar is not None else find_sidecar(model)
    if found is not None:
        read_sidecar(found).check_model(model)
        return found
    out = cached_sidecar(model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SidecarError(
            f"cache folder {out.parent}: cannot be made ({err.strerror}); use `xkv-gguf convert {model} -o FILE`"
        ) from err
    print(
        f"xkv-gguf: {model.name} has no sidecar yet; calibrating once into {out} "
        "(choose settings with `xkv-gguf convert`)",
        file=sys.stderr,
    )
    settings = Settings() if threads is None else Settings(threads=threads)
    return convert(model, out, settings, show_progress).path
