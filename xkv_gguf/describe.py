"""What is in a sidecar or a model file, and the cache that is planned for it, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import OptionError, SidecarError
from .model.fingerprint import read_model_header
from .model.gguf_read import GgufFormatError, read_header
from .plan.cache_plan import CachePlan, plan_cache
from .plan.coef_types import TYPES
from .plan.segments import KINDS, energy_kept
from .plan.size_target import SizeTarget
from .plan.sizes import CONTEXTS, ModelShape, coef_bytes_per_token, known_shape, padded_ctx, plain_bytes_per_token
from .plan.wishes import Wishes
from .plan.work import DEFAULT_ATTENTION, Attention, decode_work, plain_work, prefill_work
from .runtime.shape import file_shape, find_shape
from .sidecar.find import find_sidecar
from .sidecar.info import FORMAT_VERSION, SUFFIX
from .sidecar.read import Sidecar, read_sidecar

PLAIN = ("f16", "q8_0", "q4_0")


def is_sidecar(path: Path) -> bool:
    """Whether a file calls itself a sidecar, by its name or by its first field."""
    if path.name.endswith(SUFFIX):
        return True
    try:
        return bool(read_header(path).scalar("general.architecture") == "xkv")
    except (OSError, GgufFormatError):
        return False


def describe(path: Path, target: SizeTarget | None = None, n_ctx: int | None = None) -> dict[str, Any]:
    """Describe a sidecar or a model.

    Parameters
    ----------
    path : Path
    target : SizeTarget, optional
        What to plan for; None is the sidecar's own.
    n_ctx : int, optional
        Context in tokens to plan for; None is what the sidecar was made for.

    Returns
    -------
    dict
        JSON types only. "kind" is "sidecar" or "model"; "plan" is the cache that is planned, null for a model without
        a sidecar; "caches" predicts bytes per token and totals by context.

    Raises
    ------
    SidecarError, ModelError
        The file cannot be read.
    OptionError
        The size target is out of reach, or is given for a model without a sidecar.
    """
    if is_sidecar(path):
        return describe_sidecar(read_sidecar(path), beside(path), target, n_ctx)
    return describe_model(path, target, n_ctx)


def describe_sidecar(
    sidecar: Sidecar, shape: ModelShape | None, target: SizeTarget | None, n_ctx: int | None
) -> dict[str, Any]:
    """See `describe`; `shape` is the model's where it is known."""
    info = sidecar.info
    # without the model, the number of its heads is unknown
    known = shape is not None
    shape = known_shape(shape, info.embd_k, info.embd_v)
    target, n_ctx = target or info.target, n_ctx or info.n_ctx
    plan = plan_of(sidecar, shape, target, n_ctx)
    contexts = contexts_with(n_ctx)
    return {
        "kind": "sidecar",
        "path": str(sidecar.path),
        "bytes": sidecar.path.stat().st_size,
        "format_version": FORMAT_VERSION,
        "digest": sidecar.digest,
        "model": {"architecture": info.architecture, "name": info.name, "fingerprint": info.fingerprint},
        "layers": info.n_layer,
        "group_size": info.group_size,
        "frame": info.frame,
        "n_sink": info.n_sink,
        "kld_scale": info.kld_scale,
        "basis_type": "f16" if sidecar.basis(0, "k").dtype == np.float16 else "f32",
        "calibration": vars(info.calibration).copy(),
        "settings": dict(info.settings),
        "made_for": {"knob": info.target.kind, "value": info.target.value, "n_ctx": info.n_ctx},
        "plan": {
            **describe_plan(sidecar, plan, target),
            "work": describe_work(sidecar, plan, shape) if known else None,
        },
        "caches": {**plain_caches(shape, contexts), "xkv": xkv_cache(sidecar, shape, target, plan, contexts)},
    }


def describe_model(path: Path, target: SizeTarget | None, n_ctx: int | None) -> dict[str, Any]:
    """See `describe`; the model's weights are not loaded.

    Raises
    ------
    ModelError
        The file is no model.
    UnsupportedError
        An xkv cache cannot be used with it.
    """
    header = read_model_header(path)
    shape = file_shape(path)
    arch = header.scalar("general.architecture")
    found: dict[str, Any] = {
        "kind": "model",
        "path": str(path),
        "bytes": header.file_size,
        "model": {"architecture": arch, "name": str(header.scalar("general.name", ""))},
        "layers": len(shape.embd_k),
        "n_ctx_train": header.scalar(f"{arch}.context_length"),
        "embd_k": list(shape.embd_k),
        "embd_v": list(shape.embd_v),
        "sidecar": None,
        "sidecar_problem": None,
        "plan": None,
        "caches": plain_caches(shape, contexts_with(n_ctx)),
    }
    at = find_sidecar(path)
    if at is None:
        if target is not None:
            raise OptionError(
                f"model {path}: there is no sidecar to plan with; make one with `xkv-gguf convert {path}`"
            )
        return found
    found["sidecar"] = str(at)
    try:
        sidecar = read_sidecar(at)
        sidecar.check_model(path)
    except SidecarError as error:
        found["sidecar_problem"] = str(error)
        return found
    of_sidecar = describe_sidecar(sidecar, shape, target, n_ctx)
    return {**found, "plan": of_sidecar["plan"], "caches": of_sidecar["caches"]}


def beside(sidecar: Path) -> ModelShape | None:
    """Shape of the model that a sidecar lies beside; None where there is none."""
    model = sidecar.with_name(sidecar.name.removesuffix(SUFFIX) + ".gguf")
    return find_shape(model) if model != sidecar and model.is_file() else None


def plan_of(sidecar: Sidecar, shape: ModelShape, target: SizeTarget, n_ctx: int) -> CachePlan:
    """The plan of a context with default options."""
    return plan_cache(sidecar.statistics(), shape, Wishes(n_ctx, target, sidecar.info.n_sink))


def describe_plan(sidecar: Sidecar, plan: CachePlan, target: SizeTarget) -> dict[str, Any]:
    """A plan in JSON types; "groups" has what is kept of the (scaled) variance, and more."""
    layout = plan.layout
    stats = sidecar.statistics()
    groups = []
    for g, group in enumerate(sidecar.info.groups):
        entry: dict[str, Any] = {"layers": list(group.layers)}
        for kind in KINDS:
            segments = plan.of(g, kind)
            entry[f"dim_{kind}"] = sidecar.info.dim(g, kind)
            entry[f"segments_{kind}"] = [[s.rank, s.type] for s in segments]
            spectrum = stats.spectra[kind][g]
            entry[f"kept_{kind}"] = energy_kept(spectrum, sum(s.rank for s in segments)) if len(spectrum) else None
            entry[f"weight_{kind}"] = group.weight_k if kind == "k" else group.weight_v
            entry[f"scale_{kind}"] = [sidecar.info.scales(kind)[il] for il in group.layers]
        groups.append(entry)
    return {
        "knob": target.kind,
        "value": target.value,
        "n_ctx": layout.n_ctx,
        "ratio": plan.ratio,
        "coef_ratio": plan.coef_ratio,
        "total_bytes": plan.total_bytes,
        "f16_bytes": plan.f16_bytes,
        "parts": dict(plan.parts),
        "n_sink": layout.n_sink,
        "n_text_sink": layout.n_text_sink,
        "n_window": layout.n_window,
        "n_ubatch": layout.n_ubatch,
        "type_window": layout.type_window,
        "types_basis": [name for name in TYPES if any(s.type_basis == name for s in plan.segments)],
        "distortion": plan.distortion,
        "kld": plan.kld,
        "stages": [{"n_slot": s.n_slot, "distortion": s.distortion(stats)} for s in plan.stages],
        "groups": groups,
    }


def describe_work(sidecar: Sidecar, plan: CachePlan, shape: ModelShape) -> dict[str, float]:
    """Work per stored token with default options.

    Returns
    -------
    dict
        "decode", "dense", "prefill": multiply-adds of a decoded token, of one that meets all directions of all tokens,
        and of a micro-batch, plain attention = 1. "bytes_read", "bytes_read_dense", "bytes_read_f16": per layer, of a
        decoded token.
    """
    layers = [group.layers for group in sidecar.info.groups]
    plain, n_ubatch = plain_work(shape), plan.layout.n_ubatch
    lead, dense = (
        decode_work(shape, layers, plan.segments, plan.layout.frame, attention)
        for attention in (DEFAULT_ATTENTION, Attention(tolerance=0))
    )
    prefill = prefill_work(shape, layers, plan.segments, n_ubatch)
    n_layer = sidecar.info.n_layer
    return {
        "decode": lead.multiply_adds / plain.multiply_adds,
        "dense": dense.multiply_adds / plain.multiply_adds,
        "prefill": prefill.multiply_adds / (n_ubatch * plain.multiply_adds),
        "bytes_read": lead.bytes / n_layer,
        "bytes_read_dense": dense.bytes / n_layer,
        "bytes_read_f16": plain.bytes / n_layer,
    }


def contexts_with(n_ctx: int | None) -> list[int]:
    """Contexts to tell totals of, in tokens: the usual ones and a given one."""
    return sorted({*CONTEXTS, *([] if n_ctx is None else [padded_ctx(n_ctx)])})


def xkv_cache(
    sidecar: Sidecar, shape: ModelShape, target: SizeTarget, plan: CachePlan, contexts: Sequence[int]
) -> dict[str, Any]:
    """Bytes per token of a plan, and totals of the caches that are planned for other contexts: null out of reach."""
    totals: dict[str, int | None] = {}
    for n in contexts:
        try:
            totals[str(n)] = plan_of(sidecar, shape, target, n).total_bytes
        except OptionError:
            totals[str(n)] = None
    return {"bytes_per_token": coef_bytes_per_token(plan.segments), "totals": totals}


def plain_caches(shape: ModelShape, contexts: Sequence[int]) -> dict[str, Any]:
    """Bytes per token and totals of plain caches, by type."""
    caches: dict[str, Any] = {}
    for name in PLAIN:
        per_token = plain_bytes_per_token(shape.embd_k, shape.embd_v, name)
        caches[name] = {"bytes_per_token": per_token, "totals": {str(n): round(per_token * n) for n in contexts}}
    return caches
