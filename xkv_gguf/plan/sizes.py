"""Bytes per token and predicted cache sizes. Pure functions; the rule for each kind of cache stands in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .coef_types import QUANT_BLOCK, TYPES, bytes_per_coef
from .segments import KINDS, Kind, Layers, Segment, stored_rank

CONTEXTS = (4096, 32768, 131072)
"""Contexts for which totals are printed, in tokens."""

PLAN_CTX = 8192
"""Context that a sidecar is made for unless another is given."""

CTX_STEP = 256  # llama.cpp rounds n_ctx up to it, llama_cpp does not
SLOT_PAD = 256
CELL_PAD = 32


def padded_ctx(n_ctx: int, n_stream: int = 1) -> int:
    """Tokens that a context has when `n_ctx` are asked for, all streams together: each gets as many, rounded up."""
    return _pad(_pad(n_ctx, CTX_STEP) // n_stream, CTX_STEP) * n_stream


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's layers, in numbers per token; 0 for layers that an xkv cache does not hold.

    Attributes
    ----------
    embd_k, embd_v : tuple of int
        K and V of each layer; V is 0 where it is the first numbers of each head of K, and not kept by itself.
    embd_out : tuple of int
        Output of attention of each layer, before its projection: heads times head size of V.
    head_k, head_v : int
        Size of a head of K and of V; the greatest common divisor where layers differ.
    """

    embd_k: tuple[int, ...]
    embd_v: tuple[int, ...]
    embd_out: tuple[int, ...]
    head_k: int
    head_v: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that the cache holds."""
        return tuple(il for il, embd in enumerate(self.embd_k) if embd > 0)

    @property
    def numbers(self) -> int:
        """Numbers per token that a plain cache keeps of these layers."""
        return sum(self.embd_k) + sum(self.embd_v)

    @property
    def quantizable(self) -> bool:
        """Whether windows and bases of this model can be quantized."""
        return self.head_k % QUANT_BLOCK == 0 and self.head_v % QUANT_BLOCK == 0

    def dim(self, kind: Kind, layers: Sequence[int]) -> int:
        """Numbers per token of one kind of a group of layers."""
        embd = self.embd_k if kind == "k" else self.embd_v
        return sum(embd[il] for il in layers)

    def n_head(self, layer: int) -> int:
        """Query heads of a layer."""
        return self.embd_out[layer] // self.head_v


def known_shape(found: ModelShape | None, embd_k: Sequence[int], embd_v: Sequence[int]) -> ModelShape:
    """The shape of a model's file, or where there is none or another one, what K and V numbers by layer tell.

    Then layers count as one head, and the means are predicted somewhat too small where there are more query heads
    than KV heads.
    """
    k, v = tuple(embd_k), tuple(embd_v)
    if found is not None and (found.embd_k, found.embd_v) == (k, v):
        return found
    out = tuple(of_v or of_k for of_k, of_v in zip(k, v, strict=True))
    return ModelShape(k, v, out, math.gcd(*k), math.gcd(*v) or math.gcd(*k))


@dataclass(frozen=True)
class CacheLayout:
    """What decides an xkv cache's size besides its segments. Sizes are in tokens, types are ggml type names.

    A stream has a window and a store of its own, of the same sizes. With `kv_unified`, all sequences share one stream,
    where each keeps its own exact tokens; else every sequence has its own stream.

    Attributes
    ----------
    n_ctx : int
        Of all streams together.
    n_sink, n_text_sink, n_window : int
        Tokens of a sequence that stay exact: at its start, as attention sinks in its text, and of late.
    n_ubatch : int
    frame : int
    type_window : str
    n_seq_max : int
        Most sequences.
    kv_unified : bool
    online : bool
        Whether bases follow the prompt: then each of several streams comes to have bases of its own.
    """

    n_ctx: int
    n_sink: int = 4
    n_window: int = 64
    n_ubatch: int = 512
    frame: int = 64
    type_window: str = "f16"
    n_text_sink: int = 0
    n_seq_max: int = 1
    kv_unified: bool = False
    online: bool = True

    @property
    def n_stream(self) -> int:
        """Streams."""
        return 1 if self.kv_unified else self.n_seq_max

    @property
    def n_seq(self) -> int:
        """Most sequences of a stream."""
        return self.n_seq_max // self.n_stream

    @property
    def n_ctx_seq(self) -> int:
        """Tokens that a stream has room for, and so the most that a sequence has."""
        return self.n_ctx // self.n_stream

    @property
    def n_cell(self) -> int:
        """Cells of a stream's window: for each sequence sinks at the start and in the text, recent tokens, a chunk."""
        return _pad(self._n_kept, CELL_PAD)

    @property
    def n_transit(self) -> int:
        """Cells of a stream beyond its window, through which a micro-batch passes: scratch, whatever n_ctx is."""
        return _pad(self._n_kept + self.n_ubatch, CELL_PAD) - self.n_cell

    @property
    def n_slot(self) -> int:
        """Tokens that a stream's store has room for."""
        # for each sequence one chunk more than there are full ones, for the chunk that is cut short
        n_chunk = -(-max(0, self.n_ctx_seq - self.n_sink - self.n_window) // self.frame) + self.n_seq
        return _pad(n_chunk * self.frame, SLOT_PAD)

    @property
    def n_exact(self) -> int:
        """Tokens that a stream's context has to exceed, so that something is left to compress."""
        return self.n_sink + self.n_window + self.frame

    @property
    def n_basis_set(self) -> int:
        """Bases that there can be: the calibrated ones, which a single stream changes in place, and streams' own."""
        return 1 + (self.n_stream if self.online and self.n_stream > 1 else 0)

    @property
    def _n_kept(self) -> int:
        return self.n_seq * (self.n_exact + self.n_text_sink)


def plain_bytes_per_token(embd_k: Sequence[int], embd_v: Sequence[int], type_name: str) -> float:
    """Bytes per token of a plain cache whose K and V have the ggml type `type_name`."""
    return (sum(embd_k) + sum(embd_v)) * bytes_per_coef(type_name)


def coef_bytes_per_token(segments: Sequence[Segment]) -> float:
    """Bytes per token of the coefficient store."""
    return sum(stored_rank(s) * TYPES[s.type].bytes for s in segments)


def window_bytes(shape: ModelShape, layout: CacheLayout) -> int:
    """Bytes of sinks and windows, of all streams."""
    return round(shape.numbers * TYPES[layout.type_window].bytes) * layout.n_cell * layout.n_stream


def transit_bytes(shape: ModelShape, layout: CacheLayout) -> int:
    """Bytes of the cells through which a micro-batch passes, of all streams."""
    return round(shape.numbers * TYPES[layout.type_window].bytes) * layout.n_transit * layout.n_stream


def mean_bytes(shape: ModelShape) -> int:
    """Bytes of the means: f32, of K and V, and of V as it is added to the output of each layer that keeps V."""
    return 4 * (shape.numbers + sum(out for out, v in zip(shape.embd_out, shape.embd_v, strict=True) if v > 0))


def store_bytes(
    shape: ModelShape,
    layers: Sequence[Layers],
    segments: Sequence[Segment],
    layout: CacheLayout,
    groups: Sequence[int],
) -> int:
    """Bytes of coefficients and bases of some groups, of all streams."""
    coef = sum(_coef_bytes([s for s in segments if s.group in groups], layout).values())
    return coef + round(sum(_basis_bytes(shape, layers, segments, g) for g in groups)) * layout.n_basis_set


def predict_devices(
    shape: ModelShape,
    layers: Sequence[Layers],
    segments: Sequence[Segment],
    layout: CacheLayout,
    places: Sequence[int],
) -> dict[int, int]:
    """Bytes that an xkv cache allocates on each device, the cells through which a micro-batch passes included.

    Parameters
    ----------
    shape : ModelShape
    layers : sequence of tuple of int
        Of each group.
    segments : sequence of Segment
    layout : CacheLayout
    places : sequence of int
        The device of each layer, the same one for all of a group, see `placement.Placement.layers`.

    Returns
    -------
    dict of int to int
    """
    found = {}
    for device in sorted(set(places)):
        own = [layer for layer, place in enumerate(places) if place == device]
        groups = [g for g, group in enumerate(layers) if places[group[0]] == device]
        part = replace(
            shape,
            embd_k=tuple(shape.embd_k[layer] for layer in own),
            embd_v=tuple(shape.embd_v[layer] for layer in own),
            embd_out=tuple(shape.embd_out[layer] for layer in own),
        )
        exact = window_bytes(part, layout) + transit_bytes(part, layout) + mean_bytes(part)
        found[device] = exact + store_bytes(shape, layers, segments, layout, groups)
    return found


def predict_parts(
    shape: ModelShape, layers: Sequence[Layers], segments: Sequence[Segment], layout: CacheLayout
) -> dict[str, int]:
    """Bytes of an xkv cache, by the names of the parts in its report.

    The rule is the native cache's (xkv-cache.cpp, xkv-store.cpp). Scratch is not part of it, see `transit_bytes`.
    Streams' own bases are, although they are allocated only when a stream's bases are renewed.

    Parameters
    ----------
    shape : ModelShape
    layers : sequence of tuple of int
        Of each group.
    segments : sequence of Segment
    layout : CacheLayout

    Returns
    -------
    dict of str to int
        Bytes of "K coefficients", "V coefficients", "bases and means", "sinks and window".
    """
    coef = _coef_bytes(segments, layout)
    bases = sum(_basis_bytes(shape, layers, segments, g) for g in range(len(layers)))
    return {
        "K coefficients": coef["k"],
        "V coefficients": coef["v"],
        "bases and means": round(bases) * layout.n_basis_set + mean_bytes(shape),
        "sinks and window": window_bytes(shape, layout),
    }


def _coef_bytes(segments: Sequence[Segment], layout: CacheLayout) -> dict[Kind, int]:
    return {
        kind: round(coef_bytes_per_token([s for s in segments if s.kind == kind]) * layout.n_slot) * layout.n_stream
        for kind in KINDS
    }


def _basis_bytes(shape: ModelShape, layers: Sequence[Layers], segments: Sequence[Segment], group: int) -> float:
    return sum(
        shape.dim(s.kind, layers[group]) * stored_rank(s) * TYPES[s.type_basis].bytes
        for s in segments
        if s.group == group
    )


def _pad(n: int, step: int) -> int:
    return -(-n // step) * step
