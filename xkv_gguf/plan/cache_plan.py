"""From a size target and the settings that are given to a whole cache: segments, window, micro-batch, types.

With a coefficient ratio or a quality, window and bases have fixed settings: f16 and q8_0, and with a quality, which
means a whole cache, a q8_0 window. With a ratio or a budget, which count all bytes, whatever was not given is chosen as
follows:

- One token in `TEXT_SINK_SHARE` of the context has room to stay exact as an attention sink; a half of that, a quarter
  or none where the budget is out of reach otherwise.
- Sinks and window get at most `WINDOW_SHARE` of the budget. The first of these that fits is taken: an f16 window, then
  q8_0 windows from the largest to the smallest of `WINDOWS`. When none fits, the smallest is taken. The micro-batch is
  `N_UBATCH` tokens at every size: it passes through cells that are scratch.
- Bases are q8_0, and q4_0 for the directions whose coefficients are in q2_0 or q1_0.
- With several sequences, everything that is there once for each of them counts as often. They share what one sequence
  may keep as attention sinks. Streams of their own have no stages, and where bases follow the prompt, each counts one
  more set of bases.
- Directions are charged for their work: those with few bits and little variance give way to more bits for others.
- Heads that are not multiples of 32 leave only f16 for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..base.text import format_bytes
from ..errors import OptionError
from .coef_types import QUANT_BLOCK, basis_types
from .notes import Note, plan_notes
from .segments import (
    Kind,
    Prices,
    Segment,
    Statistics,
    distortion,
    keep_at_most,
    least_cost,
    plan_segments,
    same_rank,
)
from .sizes import (
    CacheLayout,
    ModelShape,
    coef_bytes_per_token,
    mean_bytes,
    predict_parts,
    store_bytes,
    window_bytes,
)
from .stages import Share, Stage, plan_stages
from .wishes import Wishes
from .work import work_charges

WINDOW_SHARE = 0.2
WINDOWS = (64, 48, 32)
N_UBATCH = 512
TEXT_SINK_SHARE = 80
"""One token in so many has room to stay exact as an attention sink; in SmolLM2, one in 65 to 130 is one."""


@dataclass(frozen=True)
class CachePlan:
    """A cache before it is made.

    Attributes
    ----------
    segments : tuple of Segment
        By group, K before V, then by descending variance.
    layout : CacheLayout
    parts : mapping of str to int
        Predicted bytes, see `predict_parts`.
    distortion : float
        Predicted, see `plan.distortion`.
    kld : float or None
        Predicted mean divergence of the next-token distribution in nats; None where the sidecar has no scale.
    f16_bytes : int
        Bytes of a plain f16 cache for the same context and sequences.
    f16_bytes_per_token : int
    stages : tuple of Stage
        What takes the place of `segments` while few tokens are stored, by ascending tokens.
    notes : tuple of Note
        What was left to the plan, and is less than usual.
    """

    segments: tuple[Segment, ...]
    layout: CacheLayout
    parts: Mapping[str, int] = field(hash=False)
    distortion: float
    kld: float | None
    f16_bytes: int
    f16_bytes_per_token: int
    stages: tuple[Stage, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def total_bytes(self) -> int:
        """All bytes of the cache."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """f16's bytes over all bytes."""
        return self.f16_bytes / self.total_bytes

    @property
    def coef_ratio(self) -> float:
        """f16's bytes per token over those of the coefficients."""
        return self.f16_bytes_per_token / coef_bytes_per_token(self.segments)

    def of(self, group: int, kind: Kind) -> tuple[Segment, ...]:
        """Segments of one kind of one group."""
        return tuple(s for s in self.segments if (s.group, s.kind) == (group, kind))


def plan_cache(stats: Statistics, shape: ModelShape, wishes: Wishes) -> CachePlan:
    """Plan a cache, see the top of this module.

    Parameters
    ----------
    stats : Statistics
    shape : ModelShape
    wishes : Wishes

    Returns
    -------
    CachePlan

    Raises
    ------
    OptionError
        The size target is out of reach, and the text says what is the smallest cache; or a type does not fit the model.
    """
    _check_types(shape, wishes)
    if wishes.max_rank is not None:
        stats = keep_at_most(stats, wishes.max_rank)
    if wishes.rank is not None:
        if len(wishes.types) != 1:
            raise OptionError(f"types {'+'.join(wishes.types)}: exactly one expected where a rank is given")
        rank = None if wishes.rank == "full" else wishes.rank
        layout = _plain_layout(stats, shape, wishes)
        type_coef = wishes.types[0]
        segments = same_rank(stats, rank, type_coef, _bases(shape, wishes)[type_coef])
        return _finish(stats, shape, layout, segments)
    by_token = wishes.target.kind in ("coef_ratio", "quality")
    plan = (_plan_coefficients if by_token else _plan_bytes)(stats, shape, wishes)
    # streams fill at different times, but share the tensors
    if wishes.stages and plan.layout.n_stream == 1:
        plan = replace(plan, stages=_stages(stats, shape, wishes, plan))
    usual = _text_sinks(wishes) if wishes.n_text_sink is None else 0
    return replace(plan, notes=plan_notes(plan.layout, plan.stages, usual, wishes.stages))


def _stages(stats: Statistics, shape: ModelShape, wishes: Wishes, plan: CachePlan) -> tuple[Stage, ...]:
    places = wishes.places or (0,) * len(shape.embd_k)
    shares = []
    for device in sorted(set(places)):
        groups = tuple(g for g, layers in enumerate(stats.layers) if places[layers[0]] == device)
        if groups:
            shares.append(Share(groups, store_bytes(shape, stats.layers, plan.segments, plan.layout, groups)))
    prices = _prices(stats, shape, wishes, plan.layout)
    return plan_stages(
        stats, shape, plan.segments, plan.layout.n_slot, shares, wishes.types, wishes.max_segments, prices
    )


def _check_types(shape: ModelShape, wishes: Wishes) -> None:
    if shape.quantizable:
        return
    for name in ("type_window", "type_basis"):
        value = getattr(wishes, name)
        if value is not None and value not in ("f32", "f16"):
            raise OptionError(
                f"{name} {value}: the model's heads have {shape.head_k} numbers of K and {shape.head_v} of V, "
                f"multiples of {QUANT_BLOCK} expected; use f16"
            )


def _plain_layout(stats: Statistics, shape: ModelShape, wishes: Wishes) -> CacheLayout:
    """The layout where nothing follows from a budget."""
    small = shape.quantizable and wishes.rank is None and wishes.target.kind == "quality"
    return CacheLayout(
        n_ctx=wishes.n_ctx,
        n_sink=wishes.n_sink,
        n_window=wishes.n_window if wishes.n_window is not None else WINDOWS[0],
        n_ubatch=_n_ubatch(wishes),
        frame=stats.frame,
        type_window=wishes.type_window or ("q8_0" if small else "f16"),
        n_text_sink=_text_sinks(wishes),
        n_seq_max=wishes.n_seq_max,
        kv_unified=wishes.kv_unified,
        online=wishes.online,
    )


def _plan_coefficients(stats: Statistics, shape: ModelShape, wishes: Wishes) -> CachePlan:
    layout = _plain_layout(stats, shape, wishes)
    prices = replace(_prices(stats, shape, wishes, layout), slots=1, basis_sets=0)
    plain = 2 * shape.numbers
    budget = plain / wishes.target.number
    least = least_cost(stats, wishes.types, wishes.max_segments, prices)
    if wishes.target.kind == "quality":
        budget = max(budget, least)
    segments = plan_segments(stats, wishes.types, wishes.max_segments, prices, budget)
    if segments is None:
        raise OptionError(
            f"coef_ratio {wishes.target.value}: out of reach with coefficients of {'+'.join(wishes.types)}; the fewest "
            f"bytes per token are {least:.0f} (coef_ratio {_floor(plain / least)})"
        )
    return _finish(stats, shape, layout, segments)


def _plan_bytes(stats: Statistics, shape: ModelShape, wishes: Wishes) -> CachePlan:
    plain = 2 * shape.numbers * wishes.n_ctx
    budget = wishes.target.number if wishes.target.kind == "budget" else plain / wishes.target.number
    layouts = list(_layouts(stats, shape, wishes))
    small = [layout for layout in layouts if window_bytes(shape, layout) <= WINDOW_SHARE * budget]
    fewer = list(_fewer_text_sinks(layouts[-1], wishes))
    for layout in (*(small or layouts[-1:]), *fewer):
        fixed = window_bytes(shape, layout) + mean_bytes(shape)
        prices = _prices(stats, shape, wishes, layout)
        segments = plan_segments(stats, wishes.types, wishes.max_segments, prices, budget - fixed)
        if segments is not None:
            return _finish(stats, shape, layout, segments)
    smallest = _smallest(stats, shape, wishes, layouts + fewer)
    prices = Prices(1, _bases(shape, wishes), basis_sets=0)
    per_token = least_cost(stats, wishes.types, wishes.max_segments, prices)
    limit = 2 * shape.numbers / per_token
    if wishes.target.kind == "ratio" and wishes.target.number >= limit:
        hint = f"no n_ctx gets beyond {_floor(limit)} with coefficients of {'+'.join(wishes.types)}"
    else:
        helps = ["a larger n_ctx" if wishes.target.kind == "ratio" else "a smaller n_ctx"]
        if wishes.n_window is not None and wishes.n_window > WINDOWS[-1]:
            helps.append(f"a smaller n_window than {wishes.n_window}")
        if wishes.n_seq_max > 1:
            helps.append(f"a smaller n_seq_max than {wishes.n_seq_max}")
        hint = f"{' or '.join(helps)} helps"
    raise OptionError(
        f"{wishes.target}: out of reach at n_ctx {wishes.n_ctx}{_sequences(wishes)}; the smallest cache takes "
        f"{smallest} bytes ({format_bytes(smallest)}, ratio {_floor(plain / smallest)}); {hint}"
    )


def _smallest(stats: Statistics, shape: ModelShape, wishes: Wishes, layouts: list[CacheLayout]) -> int:
    """Bytes of the smallest cache that the wishes allow."""
    layout = min(layouts, key=lambda layout: window_bytes(shape, layout))
    fixed = window_bytes(shape, layout) + mean_bytes(shape)
    prices = _prices(stats, shape, wishes, layout)
    return math.ceil(fixed + least_cost(stats, wishes.types, wishes.max_segments, prices))


def _layouts(stats: Statistics, shape: ModelShape, wishes: Wishes) -> Iterator[CacheLayout]:
    """Windows to try, from the one that is liked best."""
    layout = _plain_layout(stats, shape, wishes)
    windows = WINDOWS if wishes.n_window is None else (wishes.n_window,)
    types = (wishes.type_window,) if wishes.type_window else ("f16", "q8_0") if shape.quantizable else ("f16",)
    for type_window in types:
        for n_window in windows[:1] if type_window == "f16" and len(types) > 1 else windows:
            yield replace(layout, n_window=n_window, type_window=type_window)


def _fewer_text_sinks(layout: CacheLayout, wishes: Wishes) -> Iterator[CacheLayout]:
    if wishes.n_text_sink is None:
        for part in (2, 4):
            yield replace(layout, n_text_sink=layout.n_text_sink // part)
        yield replace(layout, n_text_sink=0)


def _text_sinks(wishes: Wishes) -> int:
    if wishes.n_text_sink is not None:
        return wishes.n_text_sink
    # sequences of one stream share it, and so do those of all streams
    return 0 if wishes.rank is not None else wishes.n_ctx // wishes.n_seq_max // TEXT_SINK_SHARE


def _n_ubatch(wishes: Wishes) -> int:
    return min(wishes.n_batch, wishes.n_ubatch if wishes.n_ubatch is not None else N_UBATCH)


def _sequences(wishes: Wishes) -> str:
    """What an error says of several sequences."""
    if wishes.n_seq_max == 1:
        return ""
    return f" for {wishes.n_seq_max} sequences in {'one stream' if wishes.kv_unified else 'streams of their own'}"


def _prices(stats: Statistics, shape: ModelShape, wishes: Wishes, layout: CacheLayout) -> Prices:
    return Prices(
        slots=layout.n_slot * layout.n_stream,
        bases=_bases(shape, wishes),
        basis_sets=layout.n_basis_set,
        charges=work_charges(shape, stats.layers, stats.frame, wishes.attention, layout.n_ubatch),
        work_price=wishes.work_price,
    )


def _bases(shape: ModelShape, wishes: Wishes) -> dict[str, str]:
    return basis_types(shape.quantizable, wishes.type_basis)


def _finish(stats: Statistics, shape: ModelShape, layout: CacheLayout, segments: tuple[Segment, ...]) -> CachePlan:
    lost = distortion(stats, segments)
    return CachePlan(
        segments=segments,
        layout=layout,
        parts=predict_parts(shape, stats.layers, segments, layout),
        distortion=lost,
        kld=stats.kld_scale * lost if stats.kld_scale > 0 else None,
        f16_bytes=2 * shape.numbers * layout.n_ctx,
        f16_bytes_per_token=2 * shape.numbers,
    )


def _floor(ratio: float) -> str:
    """A ratio rounded down, so that what is printed can be asked for."""
    return f"{math.floor(ratio * 100) / 100:.2f}"
