"""From options to the plan that a context uses, and to what the native library needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from .convert.pipeline import ensure_sidecar
from .errors import OptionError
from .model.file import ModelFile
from .options import PRESETS, XkvOptions
from .plan.cache_plan import CachePlan, plan_cache
from .plan.groups import default_frame, default_group_size, group_layers
from .plan.placement import HOST, Placement, at_group_borders, place_layers
from .plan.segments import KINDS, Statistics, assumed_spectrum
from .plan.size_target import DEFAULT_TARGET
from .plan.sizes import ModelShape, known_shape, predict_devices
from .plan.wishes import Rank, Wishes
from .plan.work import DEFAULT_ATTENTION, Attention
from .runtime.native import FUSED_CPU, FUSED_OTHER, FUSED_RPC, ScopeParams
from .runtime.shape import file_shape, find_shape
from .sidecar.find import find_sidecar
from .sidecar.read import Sidecar, read_sidecar


class Planned(NamedTuple):
    """A plan, the parameters of the native scope that follow from it, where layers are, and what each device takes."""

    plan: CachePlan
    params: ScopeParams
    placement: Placement
    device_bytes: dict[int, int]


@dataclass(frozen=True)
class OnDevices:
    """What is asked for of devices.

    Attributes
    ----------
    n_gpu_layers : int
        Layers that are on devices, the output included; below 0 all.
    shares : tuple of float
        Of each device in llama.cpp's order; none where layers stay on the host.
    rpc_fused : bool
        Whether all RPC servers are known to have the op XKV_ATTN.
    leads : tuple of int
        Directions that count for every token on each device, see `plan.work.device_lead`.
    """

    n_gpu_layers: int = 0
    shares: tuple[float, ...] = ()
    rpc_fused: bool = False
    leads: tuple[int, ...] = ()


ON_HOST = OnDevices()


def has_sidecar(model: ModelFile, options: XkvOptions) -> bool:
    """Whether there is a sidecar or none is wanted, so that none has to be made."""
    return not options.calibrate or options.sidecar is not None or find_sidecar(model.path) is not None


def open_sidecar(model: Path, options: XkvOptions, threads: int) -> Sidecar | None:
    """Read and check the sidecar of a model: the one that is named, or else one that is found or made.

    Parameters
    ----------
    model : Path
    options : XkvOptions
    threads : int
        Threads for making it.

    Returns
    -------
    Sidecar or None
        None when the options do without.

    Raises
    ------
    SidecarError
        It is missing, damaged, of another version, or of another model.
    """
    if not options.calibrate:
        return None
    path = Path(options.sidecar) if options.sidecar is not None else find_sidecar(model)
    if path is None:
        path = ensure_sidecar(model, threads=threads)
    sidecar = read_sidecar(path)
    sidecar.check_model(model)
    return sidecar


def scope_params(
    sidecar: Sidecar | None,
    options: XkvOptions,
    n_ctx: int,
    n_ubatch: int | None,
    model: ModelFile,
    n_batch: int = 512,
    n_seq_max: int = 1,
    kv_unified: bool = False,
    on_devices: OnDevices = ON_HOST,
    shape: ModelShape | None = None,
) -> Planned:
    """Plan a cache.

    Parameters
    ----------
    sidecar : Sidecar or None
        None: no calibration, the spectra's shape is assumed.
    options : XkvOptions
    n_ctx : int
        Context in tokens.
    n_ubatch : int or None
        Tokens of a micro-batch where the user gives them; None leaves it to the plan.
    model : ModelFile
    n_batch : int
        The most that n_ubatch can be.
    n_seq_max : int
        Most sequences of the context.
    kv_unified : bool
        Whether they share its tokens; else each has an equal part, as a stream of its own.
    on_devices : OnDevices
        Layers are divided so, but for borders that would cut a group.
    shape : ModelShape, optional
        Of the model where it is known; else it is read from the file.

    Returns
    -------
    Planned

    Raises
    ------
    OptionError
        The size that is asked for is out of reach, or an option does not fit the model.
    ModelError, UnsupportedError
        There is no sidecar, and the model cannot be read or is not one for an xkv cache.
    """
    if options.memory is not None:
        raise OptionError("xkv option memory: expected as a budget here, see `fitting.within_memory`")
    if sidecar is not None:
        stats = sidecar.statistics()
        _check_preset(options, sidecar)
        shape = known_shape(shape or find_shape(model.path), sidecar.info.embd_k, sidecar.info.embd_v)
    else:
        shape = shape or file_shape(model.path)
        stats = assumed_statistics(shape, options)
    target = options.target or (sidecar.info.target if sidecar is not None else DEFAULT_TARGET)
    assert isinstance(options.types, tuple)
    asked = place_layers(len(shape.embd_k), on_devices.n_gpu_layers, on_devices.shares)
    placement = at_group_borders(asked, stats.layers)
    attention = _attention(options, on_devices, placement)
    plan = plan_cache(
        stats,
        shape,
        Wishes(
            n_ctx=n_ctx,
            target=target,
            n_sink=options.n_sink,
            n_text_sink=options.n_text_sink,
            n_window=options.n_window,
            n_ubatch=n_ubatch,
            n_batch=n_batch,
            n_seq_max=n_seq_max,
            kv_unified=kv_unified,
            type_window=options.type_window,
            type_basis=options.type_basis,
            types=options.types,
            max_segments=options.max_segments,
            rank=cast("Rank | None", options.rank),
            stages=options.stages,
            online=options.online,
            attention=attention,
            work_price=options.work_price,
            max_rank=options.max_rank,
            places=placement.layers,
        ),
    )
    alone = sidecar is None
    params = ScopeParams(
        segments=plan.segments,
        sidecar=None if sidecar is None else str(sidecar.path),
        n_keep=plan.layout.n_cell,
        n_cell=plan.layout.n_cell + plan.layout.n_transit,
        n_slot=plan.layout.n_slot,
        n_sink=plan.layout.n_sink,
        n_text_sink=plan.layout.n_text_sink,
        n_window=plan.layout.n_window,
        n_absorb=options.n_absorb,
        online=options.online,
        n_prior=options.n_prior,
        fused=_fused(options, on_devices),
        tolerance=options.tolerance,
        n_lead=attention.lead,
        leads=attention.leads,
        layers=stats.layers if alone else (),
        frame=stats.frame if alone else 0,
        stages=plan.stages,
    )
    there = predict_devices(shape, stats.layers, plan.segments, plan.layout, placement.layers)
    return Planned(plan, params, placement, there)


def _attention(options: XkvOptions, on_devices: OnDevices, placement: Placement) -> Attention:
    """The lead that is asked for, or that of each layer's device."""
    if options.lead is not None:
        return Attention(options.lead, options.tolerance)
    usual = DEFAULT_ATTENTION.lead
    known = len(on_devices.leads)  # a device that is not there is refused by name when the context is made
    leads = tuple(on_devices.leads[place] if HOST != place < known else usual for place in placement.layers)
    return Attention(usual, options.tolerance, () if set(leads) <= {usual} else leads)


def _check_preset(options: XkvOptions, sidecar: Sidecar) -> None:
    """A published configuration is of groups of so many layers."""
    size = PRESETS[options.preset].group_size if options.preset is not None else sidecar.info.group_size
    if sidecar.info.group_size != size:
        raise OptionError(
            f"xkv option preset: {options.preset} is of groups of {size} layers, sidecar {sidecar.path} has groups of "
            f"{sidecar.info.group_size}; make one with xkv-gguf convert --group-size {size}"
        )


def _fused(options: XkvOptions, on_devices: OnDevices) -> int:
    """The kinds of device on which attention is to be one op, see `ScopeParams.fused`."""
    if options.fused is False:
        return 0
    found = FUSED_CPU + (FUSED_RPC if on_devices.rpc_fused else 0)
    return found if options.fused == "auto" else found + FUSED_OTHER


def assumed_statistics(shape: ModelShape, options: XkvOptions) -> Statistics:
    """Statistics where nothing was measured, see `assumed_spectrum`.

    Raises
    ------
    OptionError
        The group size is larger than the model has layers.
    """
    n_layer = len(shape.layers)
    if options.group_size is not None and options.group_size > n_layer:
        raise OptionError(
            f"xkv option group_size: {options.group_size}, expected 1 to {n_layer} (layers that the cache holds)"
        )
    groups = group_layers(shape.layers, options.group_size or default_group_size(shape))
    return Statistics(
        layers=groups,
        spectra={kind: tuple(assumed_spectrum(shape.dim(kind, layers)) for layers in groups) for kind in KINDS},
        weights={kind: (1.0,) * len(groups) for kind in KINDS},
        frame=options.frame or default_frame(shape.head_k),
    )
