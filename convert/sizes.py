"""Bytes per token and predicted cache sizes. Pure functions; the rule for each kind of cache stands in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xkv_gguf.convert.plan import bytes_per_coef

CONTEXTS = (4096, 32768, 131072)
"""Contexts for which totals are printed, in tokens."""

BASIS_BYTES = {"f32": 4, "f16": 2}
SLOT_PAD = 256
MEAN_ROWS = 4


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
    n_window: int = 128
    n_block: int = 128
    n_ubatch: int = 512
    frame: int = 64
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
    """Predicted bytes of an xkv cache for one sequence, by the names of the parts in its report.

    The rule is the native cache's (xkv-cache.cpp, xkv-store.cpp). Left out are the scratch of a flush, which is
    allocated when the first block leaves the window, and one more f32 vector per layer beside the means.

    Parameters
    ----------
    groups : sequence of GroupShape
    layout : CacheLayout
    n_ctx : int
        Context in tokens.

    Returns
    -------
    dict of str to int
        Bytes of "K coefficients", "V coefficients", "bases and means", "sinks and window".
    """
    dims = sum(g.dim_k + g.dim_v for g in groups)
    n_exact = layout.n_sink + layout.n_window + layout.n_block
    n_cell = _pad(n_exact + layout.n_ubatch, 32)
    # one chunk more than there are full ones, for the chunk that is cut short
    n_chunk = -(-max(0, n_ctx - layout.n_sink - layout.n_window) // layout.frame) + 1
    n_slot = _pad(n_chunk * layout.frame, SLOT_PAD)
    bpc_k, bpc_v = bytes_per_coef(layout.type_coef_k), bytes_per_coef(layout.type_coef_v)
    basis_k = sum(g.dim_k * (_pad(g.rank_k, 32) + MEAN_ROWS) for g in groups)
    basis_v = sum(g.dim_v * _pad(g.rank_v, 32) for g in groups)
    return {
        "K coefficients": round(sum(_pad(g.rank_k, 32) for g in groups) * n_slot * bpc_k),
        "V coefficients": round(sum(_pad(g.rank_v, 32) for g in groups) * n_slot * bpc_v),
        # on the CPU, bases of K are f32 whatever type is asked for
        "bases and means": round(basis_k * BASIS_BYTES["f32"] + basis_v * BASIS_BYTES[layout.type_basis]) + 4 * dims,
        "sinks and window": 2 * dims * n_cell,
    }


def _pad(n: int, step: int) -> int:
    return -(-n // step) * step
