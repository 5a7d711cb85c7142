"""The work of attention over stored tokens: multiply-adds and bytes read, and their price in bytes. Pure maths.

All of it is per stored token. A decoded token's query meets, in every layer, the first `lead` directions of K and of V
of the layer's group; the rest of the directions only in blocks whose share of the softmax exceeds the tolerance. A
micro-batch of more than a few tokens makes K and V of every layer from all directions, once for all its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .coef_types import TYPES
from .segments import KINDS, Charge, Kind, Layers, Segment, stored_rank
from .sizes import ModelShape

REFINED = 0.1
"""Share of pairs of a query head and a block of 16 tokens whose directions beyond the lead count.

0.09 was found at 4096 tokens with a lead of 128 and a tolerance of 0.0025, and less in longer contexts. The default
tolerance is smaller; what work is priced at changes plans next to nothing.
"""

REFINED_BY_ANY = 0.25
"""Share of blocks that some head refines, at that tolerance: their coefficients are read, if only once."""

F16_BYTES = 2


@dataclass(frozen=True)
class Work:
    """What attention over one stored token takes, in all layers."""

    multiply_adds: float
    bytes: float


@dataclass(frozen=True)
class Attention:
    """How few queries meet stored tokens.

    Attributes
    ----------
    lead : int
        Directions of K and of V that count for every token.
    tolerance : float
        0: all directions count for all tokens.
    leads : tuple of int
        The lead of each layer, by its device's; empty where it is `lead` for all.
    """

    lead: int = 128
    tolerance: float = 0.001
    leads: tuple[int, ...] = ()

    @property
    def dense(self) -> bool:
        """Whether all directions count for all tokens."""
        return self.tolerance == 0

    def of(self, group: Layers) -> Attention:
        """That of a group's layers, which are on one device."""
        return replace(self, lead=self.leads[group[0]], leads=()) if self.leads else self

    def split(self, rank: int) -> tuple[int, int]:
        """Directions that count for every token, and the rest."""
        n = rank if self.dense else min(self.lead, rank)
        return n, rank - n


@dataclass(frozen=True)
class DeviceRates:
    """What a device does in a second.

    Attributes
    ----------
    multiply_adds_per_second : float
        Of coefficients: in 8 bits, or in f32 where K and V are made from them.
    bytes_per_second : float
        Read from memory.
    """

    multiply_adds_per_second: float
    bytes_per_second: float


CPU = DeviceRates(50e9, 10e9)
"""A core: 40 to 60 G multiply-adds a second were measured with AVX-512; its share of the memory's rate is assumed."""

DEFAULT_ATTENTION = Attention()

METAL_LEAD = 64
"""A lead of 64 takes 0.6 of the multiply-adds of one of 128 where a tenth is refined, for a divergence a quarter higher
(2.5 and 1.6 times plain attention's; 0.0024 and 0.0030 of SmolLM2 at 7.5x and a tolerance of 0.0025)."""


def device_lead(name: str) -> int:
    """Directions that count for every token on a ggml device of that name.

    Apple's GPUs have as much memory bandwidth as others and a small part of their arithmetic, so that decoding there is
    short of multiply-adds first. What is behind an RPC server is not known.
    """
    return METAL_LEAD if name.startswith("MTL") else DEFAULT_ATTENTION.lead


def plain_work(shape: ModelShape) -> Work:
    """Work of one query token over one token of an f16 cache: scores and values of every head, K and V read once."""
    n_head = sum(map(shape.n_head, range(len(shape.embd_k))))
    return Work(n_head * (shape.head_k + shape.head_v), F16_BYTES * shape.numbers)


def decode_work(
    shape: ModelShape, layers: Sequence[Layers], segments: Sequence[Segment], frame: int, attention: Attention
) -> Work:
    """Work of one decoded token over one stored token.

    Queries go through the basis of K once per chunk, which is ``head_k / frame`` multiply-adds per token, head and
    direction; a score and a value are one each. Bases stay in the processor's cache and are not counted as read.

    Parameters
    ----------
    shape : ModelShape
    layers : sequence of tuple of int
        Of each group.
    segments : sequence of Segment
    frame : int
        Tokens per chunk.
    attention : Attention

    Returns
    -------
    Work
        Per token, all layers.
    """
    multiply_adds = read = 0.0
    for g, group in enumerate(layers):
        for kind in KINDS:
            own = [s for s in segments if (s.group, s.kind) == (g, kind)]
            n_lead, n_rest = _of_group(shape, group, attention).split(sum(map(stored_rank, own)))
            per_direction = _decode_adds(shape, group, kind, frame)
            multiply_adds += per_direction * (n_lead + REFINED * n_rest)
            lead, rest = _bytes_up_to(own, n_lead)
            read += len(group) * (lead + REFINED_BY_ANY * rest)
    return Work(multiply_adds, read)


def prefill_work(shape: ModelShape, layers: Sequence[Layers], segments: Sequence[Segment], n_ubatch: int) -> Work:
    """Work of a micro-batch of `n_ubatch` tokens over one stored token; parameters as in `decode_work`.

    K and V of a token are ``rank * n_head_kv * head`` multiply-adds each, in every layer; then all queries meet them.
    """
    multiply_adds = n_ubatch * plain_work(shape).multiply_adds
    read = 0.0
    for g, group in enumerate(layers):
        for kind in KINDS:
            own = [s for s in segments if (s.group, s.kind) == (g, kind)]
            multiply_adds += shape.dim(kind, group) * sum(map(stored_rank, own))
            read += len(group) * sum(stored_rank(s) * TYPES[s.type].bytes for s in own)
    return Work(multiply_adds, read)


def work_charges(
    shape: ModelShape,
    layers: Sequence[Layers],
    frame: int,
    attention: Attention,
    n_ubatch: int,
    rates: DeviceRates = CPU,
) -> dict[tuple[int, Kind], Charge]:
    """What the work of a direction counts as in bytes, so that a plan can weigh both.

    The bytes that the device reads while it does the work::

        charge = multiply_adds * bytes_per_second / multiply_adds_per_second

    `multiply_adds` are per direction and stored token, of all layers of its group: those of one decoded token, and one
    micro-batch's share of making K and V, divided by its tokens. Bytes that are read are not charged: they grow with
    the bytes that are stored, and those are what the budget counts.

    Parameters
    ----------
    shape, layers, frame, attention
        As in `decode_work`.
    n_ubatch : int
        Tokens of a micro-batch.
    rates : DeviceRates

    Returns
    -------
    dict of (group, kind) to Charge
        Bytes per direction and stored token.
    """
    bytes_per_add = rates.bytes_per_second / rates.multiply_adds_per_second
    charges: dict[tuple[int, Kind], Charge] = {}
    for g, group in enumerate(layers):
        for kind in KINDS:
            decode = _decode_adds(shape, group, kind, frame)
            prefill = shape.dim(kind, group) / n_ubatch
            share = 1.0 if _of_group(shape, group, attention).dense else REFINED
            charges[g, kind] = Charge(
                lead=_of_group(shape, group, attention).lead,
                within=bytes_per_add * (decode + prefill),
                beyond=bytes_per_add * (share * decode + prefill),
            )
    return charges


def _of_group(shape: ModelShape, group: Layers, attention: Attention) -> Attention:
    """How few queries meet a group's tokens: where V is a part of K, by stock ops, which take all directions."""
    own = attention.of(group)
    return own if shape.dim("v", group) > 0 else replace(own, tolerance=0.0)


def _decode_adds(shape: ModelShape, group: Layers, kind: Kind, frame: int) -> float:
    """Multiply-adds of a decoded token per direction and stored token, in all layers of a group."""
    n_head = sum(map(shape.n_head, group))
    both = shape.dim("v", group) == 0  # directions of K serve V as well
    return n_head * (1 + both + shape.head_k / frame) if kind == "k" else float(n_head)


def _bytes_up_to(segments: Sequence[Segment], rank: int) -> tuple[float, float]:
    """Bytes per token of the first `rank` directions, and of the rest."""
    lead = rest = 0.0
    for segment in segments:
        n = min(rank, stored_rank(segment))
        rank -= n
        lead += n * TYPES[segment.type].bytes
        rest += (stored_rank(segment) - n) * TYPES[segment.type].bytes
    return lead, rest
