"""Sizes of a model's K and V from its metadata; the model is not loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import ModelError
from ..plan.sizes import ModelShape
from .gguf_read import GgufHeader


def model_shape(header: GgufHeader) -> ModelShape:
    """Numbers per token of every layer.

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

    def per_layer(key: str, n_layer: int) -> list[int]:
        """Numbers of a field that may be one for all layers or one for each; empty when it does not say."""
        value = fields.get(f"{arch}.{key}")
        if value is None or not value.is_array:
            one = number(key)
            return [one] * n_layer if one else []
        values = value.value
        return [int(v) for v in values] if isinstance(values, np.ndarray) and len(values) == n_layer else []

    if f"{arch}.attention.kv_lora_rank" in fields or any(key.startswith(f"{arch}.ssm.") for key in fields):
        raise ModelError(f"model {header.path}: {arch} does not cache plain K and V in every layer; no sizes are known")
    n_layer, n_embd = number("block_count") or 0, number("embedding_length")
    heads = per_layer("attention.head_count", n_layer)
    heads_kv = per_layer("attention.head_count_kv", n_layer)
    if not heads_kv and f"{arch}.attention.head_count_kv" not in fields:
        heads_kv = heads
    default = n_embd // heads[0] if n_embd and heads and heads[0] > 0 else None
    head_k, head_v = number("attention.key_length") or default, number("attention.value_length") or default
    if not heads or not heads_kv or not head_k or not head_v or min(*heads, *heads_kv) < 1:
        raise ModelError(f"model {header.path}: its metadata does not tell the size of K and V in every layer")
    return ModelShape(
        embd_k=tuple(h * head_k for h in heads_kv),
        embd_v=tuple(h * head_v for h in heads_kv),
        embd_out=tuple(h * head_v for h in heads),
        head_k=head_k,
        head_v=head_v,
    )


def known_shape(found: ModelShape | None, embd_k: Sequence[int], embd_v: Sequence[int]) -> ModelShape:
    """The shape that metadata gives, or where there is none or another one, what K and V numbers by layer tell.

    Then layers count as one head, and the means are predicted somewhat too small where there are more query heads
    than KV heads.
    """
    k, v = tuple(embd_k), tuple(embd_v)
    if found is not None and (found.embd_k, found.embd_v) == (k, v):
        return found
    return ModelShape(k, v, v, math.gcd(*k), math.gcd(*v))


def find_shape(header: GgufHeader) -> ModelShape | None:
    """See `model_shape`; None when the metadata does not tell."""
    try:
        return model_shape(header)
    except ModelError:
        return None
