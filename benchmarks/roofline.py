"""What attention takes on a GPU by its public figures: computed from a plan's sizes, measured by nobody.

    .venv/bin/python benchmarks/roofline.py
    .venv/bin/python benchmarks/roofline.py --stages "RTX 3060"

The shape is that of Llama-3.1-8B with weights in q4_0, and spectra as they are assumed where nothing was measured. A
stage is a kernel of `native/ops/xkv_attn/cuda` over all layers: bytes from memory and from the second-level cache,
multiply-adds as the tensor cores do them (columns that nobody needs included), instructions around them, launches. It
takes as long as the one of these that binds. docs/performance.md has the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from xkv_gguf.plan.cache_plan import CachePlan, plan_cache
from xkv_gguf.plan.coef_types import TYPES
from xkv_gguf.plan.groups import group_layers
from xkv_gguf.plan.segments import KINDS, Kind, Statistics, assumed_spectrum, stored_rank
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.plan.sizes import ModelShape
from xkv_gguf.plan.wishes import Wishes
from xkv_gguf.plan.work import DEFAULT_ATTENTION, F16_BYTES, REFINED_BY_ANY

LAYERS, HEADS, HEADS_KV, HEAD = 32, 32, 8, 128
GROUP_LAYERS, FRAME = 4, 128
PARAMETERS = 8.03e9
N_UBATCH = 512
CONTEXTS = (32768, 65536, 131072)
GIB = 1 << 30

MEMORY_SHARE, COMPUTE_SHARE = 0.8, 0.6
"""Of a card's figures, what kernels are taken to reach."""

REFINED_PAIRS = 0.3
"""Pairs of a chunk of 128 tokens and a head with a block that is refined; assumed, from 0.09 of blocks and heads."""

REFINED_32 = 0.4
"""Share of blocks of 32 tokens with one that some head refines, where `REFINED_BY_ANY` is that of blocks of 16."""

AHEAD = 4
"""Chunks whose queries go through the lead together (XKV_CU_AHEAD)."""
COLUMNS = 8
"""Queries that a product of the tensor cores has room for."""
PRODUCT = 16 * COLUMNS * 32
"""Multiply-adds of one product of bytes."""
INSTRUCTIONS = 26
"""Of a warp for each product: codes, scales, sums to float; counted in the source."""
FUSED_BYTES = 1.25
"""Of a rounded number: a byte, and a scale and a sum for 32 of them."""
ROUNDS = 3
BATCH = 512
"""Tokens whose K and V are made at a time (XKV_CU_BATCH)."""
SPAN_BYTES = 32 << 20
"""Rows of a span of the second pass (XKV_CU_SPAN)."""


@dataclass(frozen=True)
class Card:
    """Public figures of a device.

    Attributes
    ----------
    memory : float
        Bytes of memory.
    bandwidth, cache : float
        Bytes a second from memory, and, which is assumed, from the second-level cache.
    int8, f16 : float
        Multiply-adds a second: of bytes, and of f16 with sums in f32.
    issue : float
        Instructions of warps a second.
    launch : float
        Seconds between kernels of a graph, assumed.
    kernels : bool
        Whether there are kernels for it; else this is what the same work would take.
    """

    name: str
    memory: float
    bandwidth: float
    cache: float
    int8: float
    f16: float
    issue: float
    launch: float = 2e-6
    kernels: bool = True


CARDS = (
    Card("RTX 3060", 12 * GIB, 360e9, 1.0e12, 51e12, 12.7e12, 28 * 4 * 1.78e9),
    Card("RTX 4060", 8 * GIB, 272e9, 1.2e12, 60e12, 15.1e12, 24 * 4 * 2.46e9),
    Card("RTX 4090", 24 * GIB, 1008e9, 4.0e12, 330e12, 82.6e12, 128 * 4 * 2.52e9),
    # no products of bytes: f16; cores of 4 times 32 lanes
    Card("M2", 16 * GIB, 100e9, 0.4e12, 1.8e12, 1.8e12, 10 * 4 * 1.4e9, 3e-6, kernels=False),
    Card("M4 Pro", 24 * GIB, 273e9, 1.0e12, 4.6e12, 4.6e12, 20 * 4 * 1.58e9, 3e-6, kernels=False),
)


@dataclass(frozen=True)
class Stage:
    """What a kernel does in all layers.

    Attributes
    ----------
    bytes, cached : float
        From memory, and from the second-level cache.
    int8, f16 : float
        Multiply-adds.
    instructions : float
        Of warps.
    launches : float
    """

    name: str
    bytes: float = 0.0
    cached: float = 0.0
    int8: float = 0.0
    f16: float = 0.0
    launches: float = 0.0

    @property
    def instructions(self) -> float:
        """Of warps, around products of bytes."""
        return self.int8 / PRODUCT * INSTRUCTIONS

    def times(self, card: Card) -> dict[str, float]:
        """Seconds by what could bind."""
        return {
            "memory": self.bytes / (card.bandwidth * MEMORY_SHARE),
            "L2": (self.cached + self.bytes) / (card.cache * MEMORY_SHARE),
            "products": self.int8 / (card.int8 * COMPUTE_SHARE) + self.f16 / (card.f16 * COMPUTE_SHARE),
            "instructions": self.instructions / (card.issue * COMPUTE_SHARE),
        }

    def seconds(self, card: Card) -> float:
        """The time of what binds, and of launches."""
        return max(self.times(card).values()) + self.launches * card.launch

    def binds(self, card: Card) -> str:
        """What takes most of it."""
        times = self.times(card)
        name = max(times, key=times.__getitem__)
        return name if times[name] >= self.launches * card.launch else "launches"


@dataclass(frozen=True)
class Sizes:
    """What the stages need of a plan; bytes and ranks are those of a layer, means over groups.

    Attributes
    ----------
    n : int
        Stored tokens.
    exact : int
        Exact ones.
    rank, lead : dict
        Directions by kind, and those that count for every token.
    coef, lead_coef : dict
        Bytes of their coefficients per token.
    basis, lead_basis : dict
        Bytes of the bases.
    """

    n: int
    exact: int
    frame: int
    rank: dict[Kind, float]
    lead: dict[Kind, int]
    coef: dict[Kind, float]
    lead_coef: dict[Kind, float]
    basis: dict[Kind, float]
    lead_basis: dict[Kind, float]
    total: int


def shape_8b() -> ModelShape:
    """K and V of Llama-3.1-8B."""
    embd = (HEADS_KV * HEAD,) * LAYERS
    return ModelShape(embd, embd, (HEADS * HEAD,) * LAYERS, HEAD, HEAD)


def plan_8b(ratio: float, n_ctx: int) -> CachePlan:
    """The plan of this ratio with assumed spectra."""
    shape = shape_8b()
    groups = group_layers(range(LAYERS), GROUP_LAYERS)
    stats = Statistics(
        layers=groups,
        spectra={kind: tuple(assumed_spectrum(shape.dim(kind, layers)) for layers in groups) for kind in KINDS},
        weights={kind: (1.0,) * len(groups) for kind in KINDS},
        frame=FRAME,
    )
    return plan_cache(stats, shape, Wishes(n_ctx=n_ctx, target=SizeTarget("ratio", f"{ratio:g}")))


def sizes_of(plan: CachePlan) -> Sizes:
    """Means over the plan's groups, with the store full."""
    n_group = 1 + max(segment.group for segment in plan.segments)
    found: list[dict[Kind, float]] = [{}, {}, {}, {}, {}]
    lead = DEFAULT_ATTENTION.lead
    for kind in KINDS:
        sums = [0.0] * 5
        for group in range(n_group):
            left = lead
            for segment in plan.of(group, kind):
                rank, coef, basis = stored_rank(segment), TYPES[segment.type].bytes, TYPES[segment.type_basis].bytes
                first = min(rank, left)
                left -= first
                row = HEADS_KV * HEAD * basis
                for i, x in enumerate((rank, rank * coef, first * coef, rank * row, first * row)):
                    sums[i] += x / n_group
        for i, x in enumerate(sums):
            found[i][kind] = x
    layout = plan.layout
    return Sizes(
        n=layout.n_slot,
        exact=layout.n_cell,
        frame=layout.frame,
        rank=found[0],
        lead=dict.fromkeys(KINDS, lead),
        coef=found[1],
        lead_coef=found[2],
        basis=found[3],
        lead_basis=found[4],
        total=plan.total_bytes,
    )


def decode_stages(x: Sizes) -> list[Stage]:
    """One token: the kernels of a decoding run."""
    chunks = x.n / x.frame
    rest = {kind: x.rank[kind] - x.lead[kind] for kind in KINDS}
    rest_coef = {kind: x.coef[kind] - x.lead_coef[kind] for kind in KINDS}
    pairs = chunks * HEADS * REFINED_PAIRS
    columns = -(-HEADS * REFINED_PAIRS // COLUMNS) * COLUMNS  # of a chunk
    rows = pairs * (x.rank["k"] + 2 * x.frame) * FUSED_BYTES
    row_bytes = chunks * HEADS * (x.rank["k"] + 2 * x.frame) * FUSED_BYTES
    spans = -(-row_bytes // SPAN_BYTES)
    per_layer = [
        Stage(
            "lead",
            bytes=x.n * sum(x.lead_coef.values()),
            cached=chunks / AHEAD * x.lead_basis["k"],
            int8=chunks * HEADS * HEAD * x.lead["k"] + x.n * HEADS * (x.lead["k"] + x.lead["v"]),
            launches=1,
        ),
        Stage("exact tokens", bytes=x.exact * 2 * HEADS_KV * HEAD * F16_BYTES, launches=1),
        Stage("marking", cached=ROUNDS * 4 * HEADS * x.n / 16, launches=ROUNDS * (1 + spans)),
        Stage(
            "queries through K",
            cached=pairs / HEADS_KV / 32 * x.basis["k"] + pairs * x.rank["k"] * FUSED_BYTES,
            int8=pairs * HEAD * x.rank["k"],
            launches=ROUNDS * spans,
        ),
        Stage(
            "scores",
            bytes=x.n * (x.lead_coef["k"] + REFINED_BY_ANY * rest_coef["k"]),
            cached=rows,
            int8=x.n * columns * (x.lead["k"] + REFINED_BY_ANY * rest["k"]),
            launches=ROUNDS * spans,
        ),
        Stage(
            "values",
            bytes=x.n * REFINED_32 * x.coef["v"],
            cached=pairs * 2 * x.frame * FUSED_BYTES * x.rank["v"] / 128,
            int8=x.n * REFINED_32 * HEADS * (x.rank["v"] + x.lead["v"]),
            launches=ROUNDS * spans,
        ),
        Stage("output", cached=x.basis["v"], int8=HEADS * 2 * HEAD * x.rank["v"], launches=1),
    ]
    return [_all_layers(stage) for stage in per_layer]


def prefill_stages(x: Sizes, n_token: int) -> list[Stage]:
    """Some tokens at the end of the context: K and V made again, and attention."""
    seen = x.n + x.exact + n_token / 2
    batches = -(-x.n // BATCH)
    per_layer = [
        Stage("making K and V", f16=x.n * HEADS_KV * HEAD * sum(x.rank.values()), launches=2 * batches),
        Stage("attention", f16=seen * n_token * HEADS * 2 * HEAD, launches=batches),
    ]
    return [_all_layers(stage) for stage in per_layer]


def plain_decode(n: int, type_name: str) -> Stage:
    """Attention of a token over a plain cache that is full: its bytes."""
    return _all_layers(Stage(type_name, bytes=n * 2 * HEADS_KV * HEAD * TYPES[type_name].bytes, launches=2))


def plain_prefill(n: int, n_token: int) -> Stage:
    """Attention of some tokens over a plain cache."""
    return _all_layers(Stage("attention", f16=(n + n_token / 2) * n_token * HEADS * 2 * HEAD, launches=2))


def model_decode() -> Stage:
    """All weights are read once."""
    return Stage("weights", bytes=PARAMETERS * TYPES["q4_0"].bytes, launches=10 * LAYERS)


def model_prefill(n_token: int) -> Stage:
    """Products with all weights, rounded to bytes as ggml-cuda does."""
    return Stage("weights", bytes=PARAMETERS * TYPES["q4_0"].bytes, int8=PARAMETERS * n_token, launches=10 * LAYERS)


def _all_layers(stage: Stage) -> Stage:
    return Stage(
        stage.name,
        stage.bytes * LAYERS,
        stage.cached * LAYERS,
        stage.int8 * LAYERS,
        stage.f16 * LAYERS,
        stage.launches * LAYERS,
    )


def cache_bytes(cache: str, n_ctx: int) -> float:
    """Bytes of a cache: f16, q4_0 or xkv."""
    if cache == "xkv":
        return plan_8b(7, n_ctx).total_bytes
    return LAYERS * 2 * HEADS_KV * HEAD * TYPES[cache].bytes * n_ctx


def speeds(card: Card, n_ctx: int, cache: str) -> tuple[float, float]:
    """Tokens a second of decoding at the end of a context, and of prefill of a micro-batch there."""
    if cache == "xkv":
        x = sizes_of(plan_8b(7, n_ctx))
        decode, prefill = decode_stages(x), prefill_stages(x, N_UBATCH)
    else:
        decode, prefill = [plain_decode(n_ctx, cache)], [plain_prefill(n_ctx, N_UBATCH)]
    one = sum(stage.seconds(card) for stage in (*decode, model_decode()))
    many = sum(stage.seconds(card) for stage in (*prefill, model_prefill(N_UBATCH)))
    return 1 / one, N_UBATCH / many


def fits(card: Card, n_ctx: int, cache: str) -> bool:
    """Whether weights, cache and half a GiB of buffers have room."""
    return PARAMETERS * TYPES["q4_0"].bytes + cache_bytes(cache, n_ctx) + GIB / 2 <= card.memory


def speed_table(contexts: Sequence[int] = (32768, 131072)) -> str:
    """Rows by card and context, columns by cache; what does not fit into the card's memory in brackets."""
    rows = []
    for card in CARDS:
        for n_ctx in contexts:
            row = [card.name if card.kernels else f"{card.name} (no kernels)", str(n_ctx)]
            found = {cache: speeds(card, n_ctx, cache) for cache in ("f16", "q4_0", "xkv")}
            for what in (0, 1):
                for cache, pair in found.items():
                    text = f"{pair[what]:.0f}" if pair[what] >= 20 else f"{pair[what]:.1f}"
                    row.append(text if fits(card, n_ctx, cache) else f"({text})")
            rows.append(row)
    head = ("card", "n_ctx", *(f"{what}: {c}" for what in ("decode", "prefill") for c in ("f16", "q4_0", "xkv:7")))
    return _markdown(head, rows)


def stage_table(card: Card, n_ctx: int) -> str:
    """Stages of a decoded token, and of prefill, with what binds."""
    x = sizes_of(plan_8b(7, n_ctx))
    rows = []
    for stage in (*decode_stages(x), plain_decode(n_ctx, "f16"), *prefill_stages(x, N_UBATCH)):
        rows.append(
            [
                stage.name,
                f"{stage.bytes / 1e6:.0f}",
                f"{stage.cached / 1e6:.0f}",
                f"{(stage.int8 + stage.f16) / 1e9:.1f}",
                f"{stage.launches:.0f}",
                f"{stage.seconds(card) * 1e3:.2f}",
                stage.binds(card),
            ]
        )
    return _markdown(("stage", "MB", "MB of L2", "G multiply-adds", "launches", "ms", "binds"), rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables that the arguments ask for."""
    parser = argparse.ArgumentParser(description="What attention takes on a GPU, computed from public figures.")
    parser.add_argument(
        "--stages", metavar="CARD", choices=[card.name for card in CARDS], help="by stage, on this card"
    )
    parser.add_argument("--n-ctx", type=int, default=65536, metavar="N", help="for --stages (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.stages:
        print(stage_table(next(card for card in CARDS if card.name == args.stages), args.n_ctx))
    else:
        print(speed_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
