"""Bytes per token and predicted cache sizes. Pure functions; the rule for each kind of cache stands in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xkv_gguf.convert.plan import bytes_per_coef

CONTEXTS = (4096, 32768, 131072)
"""Contexts for which totals are printed, in tokens."""

BASIS_BYTES: dict[str, float] = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class GroupShape:
    """Dimensions and ranks of one group of layers: `dim_k` and `dim_v` numbers per token become `rank_k`, `rank_v`."""

    dim_k: int
    dim_v: int
    rank_k: int
    rank_v: int


@dataclass(frozen=True)
class CacheLayout:
    """What decides an xkv cache's size besides ranks. Sizes are in tokens, types are ggml type names."""

    n_sink: int = 4
    n_window: int = 256
    n_block: int = 256
    n_ubatch: int = 512
    type_coef_k: str = "q8_0"
    type_coef_v: str = "q8_0"
    type_basis: str = "f16"


def plain_bytes_per_token(embd_k: Sequence[int], embd_v: Sequence[int], type_name: str) -> float:
    """Bytes per token of a plain cache whose K and V have the ggml type `type_name`."""
    return (sum(embd_k) + sum(embd_v)) * bytes_per_coef(type_name)


def coef_bytes_per_token(groups: Sequence[GroupShape], type_coef_k: str, type_coef_v: str) -> float:
    """Bytes per token of the coefficient store."""
    bpc_k, bpc_v = bytes_per_coef(type_coef_k), bytes_per_coef(type_coef_v)
    return sum(g.rank_k * bpc_k + g.rank_v * bpc_v for g in groups)


def predict_parts(groups: Sequence[GroupShape], layout: CacheLayout, n_ctx: int) -> dict[str, int]:
    """Predicted bytes of an xkv cache, by part.

    Parameters
    ----------
    groups : sequence of GroupShape
    layout : CacheLayout
    n_ctx : int
        Context in tokens, one sequence.

    Returns
    -------
    dict of str to int
        ``exact``: sinks, window, the block that fills and one micro-batch, in f16; ``coefficients``: the rest of the
        context; ``bases`` and ``means``. Scratch memory is not part of the cache.
    """
    dims = sum(g.dim_k + g.dim_v for g in groups)
    n_exact = min(n_ctx, layout.n_sink + layout.n_window + layout.n_block + layout.n_ubatch)
    n_stored = max(0, n_ctx - layout.n_sink - layout.n_window)
    n_stored = -(-n_stored // layout.n_block) * layout.n_block
    per_token = coef_bytes_per_token(groups, layout.type_coef_k, layout.type_coef_v)
    basis = sum(g.dim_k * g.rank_k + g.dim_v * g.rank_v for g in groups)
    return {
        "exact": 2 * dims * n_exact,
        "coefficients": round(per_token * n_stored),
        "bases": round(basis * BASIS_BYTES[layout.type_basis]),
        "means": 4 * dims,
    }
