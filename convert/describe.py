"""What is in a sidecar or a model file, as plain values for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xkv_gguf.convert.find import find_sidecar
from xkv_gguf.convert.fingerprint import read_model_header
from xkv_gguf.convert.gguf_read import GgufFormatError, GgufHeader, read_header
from xkv_gguf.convert.plan import energy_kept
from xkv_gguf.convert.sidecar import Sidecar, read_sidecar
from xkv_gguf.convert.sidecar_info import KINDS
from xkv_gguf.convert.sizes import (
    CONTEXTS,
    CacheLayout,
    coef_bytes_per_token,
    plain_bytes_per_token,
    predict_parts,
)
from xkv_gguf.errors import ModelError

PLAIN = ("f16", "q8_0", "q4_0")


def is_sidecar(path: Path) -> bool:
    """Whether a file calls itself a sidecar, by its name or by its first field."""
    if path.name.endswith(".xkv.gguf"):
        return True
    try:
        return bool(read_header(path).scalar("general.architecture") == "xkv")
    except (OSError, GgufFormatError):
        return False


def describe(path: Path) -> dict[str, Any]:
    """Describe a sidecar or a model.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
        JSON types only. "kind" is "sidecar" or "model"; "caches" predicts bytes per token and totals by context.

    Raises
    ------
    SidecarError, ModelError
        The file cannot be read.
    """
    return describe_sidecar(read_sidecar(path)) if is_sidecar(path) else describe_model(path)


def describe_sidecar(sidecar: Sidecar) -> dict[str, Any]:
    """See `describe`."""
    info = sidecar.info
    groups = []
    for g, group in enumerate(info.groups):
        entry: dict[str, Any] = {"layers": [group.first, group.first + group.count - 1]}
        for kind, rank in zip(KINDS, (group.rank_k, group.rank_v), strict=True):
            entry[f"dim_{kind}"] = info.dim(g, kind)
            entry[f"rank_{kind}"] = rank
            entry[f"energy_{kind}"] = energy_kept(sidecar.spectrum(g, kind), rank)
        groups.append(entry)
    coef = type_coef(info.settings)
    layout = CacheLayout(n_sink=info.n_sink, frame=info.frame, type_coef_k=coef, type_coef_v=coef)
    caches = plain_caches(info.embd_k, info.embd_v)
    parts = {str(n): predict_parts(info.shapes, layout, n) for n in CONTEXTS}
    per_token = coef_bytes_per_token(info.shapes, layout.type_coef_k, layout.type_coef_v)
    caches["xkv"] = {
        "bytes_per_token": per_token,
        "totals": {n: sum(p.values()) for n, p in parts.items()},
        "parts": parts,
        "type_coef": layout.type_coef_k,
    }
    return {
        "kind": "sidecar",
        "path": str(sidecar.path),
        "bytes": sidecar.path.stat().st_size,
        "format_version": 1,
        "digest": sidecar.digest,
        "model": {"architecture": info.architecture, "name": info.name, "fingerprint": info.fingerprint},
        "layers": info.n_layer,
        "group_size": info.group_size,
        "frame": info.frame,
        "n_sink": info.n_sink,
        "ratio_planned": info.ratio,
        "ratio": caches["f16"]["bytes_per_token"] / per_token,
        "basis_type": "f16" if sidecar.basis(0, "k").dtype == np.float16 else "f32",
        "calibration": vars(info.calibration).copy(),
        "settings": dict(info.settings),
        "groups": groups,
        "caches": caches,
    }


def describe_model(path: Path) -> dict[str, Any]:
    """See `describe`; K and V sizes come from the metadata, the model is not loaded.

    Raises
    ------
    ModelError
        The file is no model, or its metadata does not tell the size of K and V.
    """
    header = read_model_header(path)
    embd_k, embd_v = kv_sizes(header)
    sidecar = find_sidecar(path)
    arch = header.scalar("general.architecture")
    return {
        "kind": "model",
        "path": str(path),
        "bytes": header.file_size,
        "model": {"architecture": arch, "name": str(header.scalar("general.name", ""))},
        "layers": len(embd_k),
        "n_ctx_train": header.scalar(f"{arch}.context_length"),
        "embd_k": embd_k,
        "embd_v": embd_v,
        "sidecar": str(sidecar) if sidecar is not None else None,
        "caches": plain_caches(embd_k, embd_v),
    }


def type_coef(settings: Mapping[str, Any]) -> str:
    """Coefficient type that a sidecar was planned for."""
    value = settings.get("type_coef", "q8_0")
    return value if value in ("f32", "f16", "q8_0", "q5_0", "q4_0") else "q8_0"


def plain_caches(embd_k: Sequence[int], embd_v: Sequence[int]) -> dict[str, Any]:
    """Bytes per token and totals of plain caches, by type."""
    caches: dict[str, Any] = {}
    for name in PLAIN:
        per_token = plain_bytes_per_token(embd_k, embd_v, name)
        caches[name] = {"bytes_per_token": per_token, "totals": {str(n): round(per_token * n) for n in CONTEXTS}}
    return caches


def kv_sizes(header: GgufHeader) -> tuple[list[int], list[int]]:
    """K and V numbers per token of every layer, from a model's metadata.

    Raises
    ------
    ModelError
        The metadata does not tell, or the model caches something else than K and V.
    """
    arch = header.scalar("general.architecture")
    fields = header.fields

    def number(key: str) -> int | None:
        value = header.scalar(f"{arch}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    n_layer, n_embd, n_head = (number(k) for k in ("block_count", "embedding_length", "attention.head_count"))
    if f"{arch}.attention.kv_lora_rank" in fields or any(key.startswith(f"{arch}.ssm.") for key in fields):
        raise ModelError(f"model {header.path}: {arch} does not cache plain K and V in every layer; no sizes are known")
    heads_field = fields.get(f"{arch}.attention.head_count_kv")
    heads: list[int] = []
    if n_layer is not None and heads_field is not None and heads_field.is_array:
        values = heads_field.value
        heads = [int(v) for v in values] if isinstance(values, np.ndarray) and len(values) == n_layer else []
    elif n_layer is not None:
        heads = [number("attention.head_count_kv") or n_head or 0] * n_layer
    default = n_embd // n_head if n_embd and n_head else None
    head_k, head_v = number("attention.key_length") or default, number("attention.value_length") or default
    if not heads or head_k is None or head_v is None or min(heads) < 1:
        raise ModelError(f"model {header.path}: its metadata does not tell the size of K and V in every layer")
    return [h * head_k for h in heads], [h * head_v for h in heads]
