"""Work of attention over stored tokens, by hand, and the price that a plan pays for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from xkv_gguf.plan.coef_types import DEFAULT_TYPES, TYPES
from xkv_gguf.plan.groups import group_layers
from xkv_gguf.plan.segments import KINDS, MOST_RISE, Charge, Prices, Segment, distortion, plan_segments, stored_rank
from xkv_gguf.plan.sizes import ModelShape
from xkv_gguf.plan.work import (
    REFINED,
    REFINED_BY_ANY,
    Attention,
    DeviceRates,
    decode_work,
    plain_work,
    prefill_work,
    work_charges,
)

from .test_segments import Q8_BASES, cost, full_cost, random_statistics, spectrum, statistics

# three layers: 6 query heads and 2 KV heads, K of 64 numbers and V of 32
SHAPE = ModelShape((128,) * 3, (64,) * 3, (192,) * 3, 64, 32)
LAYERS = ((0, 1), (2,))
SEGMENTS = (
    Segment(0, "k", 64, "q8_0"),
    Segment(0, "k", 128, "q4_0"),
    Segment(0, "v", 96, "q8_0"),
    Segment(1, "k", 32, "q8_0"),
    Segment(1, "v", 32, "q4_0"),
)
Q8, Q4 = 34 / 32, 18 / 32


def test_plain_attention() -> None:
    found = plain_work(SHAPE)
    assert found.multiply_adds == 3 * 6 * (64 + 32)
    assert found.bytes == 3 * 2 * (128 + 64)


def test_dense_decoding() -> None:
    """Queries go through K's basis once per chunk of 32 tokens: 64 / 32 multiply-adds per token and direction."""
    found = decode_work(SHAPE, LAYERS, SEGMENTS, 32, Attention(tolerance=0))
    assert found.multiply_adds == 2 * 6 * (192 * (1 + 2) + 96) + 6 * (32 * 3 + 32)
    assert found.bytes == pytest.approx(2 * (64 * Q8 + 128 * Q4 + 96 * Q8) + 32 * Q8 + 32 * Q4)


def test_progressive_decoding() -> None:
    found = decode_work(SHAPE, LAYERS, SEGMENTS, 64, Attention(lead=96))
    # the lead of K is 64 directions of q8_0 and 32 of q4_0; of the rest of 96, a share counts; V has none
    k = 96 + REFINED * 96
    assert found.multiply_adds == pytest.approx(2 * 6 * (2 * k + 96) + 6 * (2 * 32 + 32))
    read = 64 * Q8 + 32 * Q4 + REFINED_BY_ANY * 96 * Q4 + 96 * Q8
    assert found.bytes == pytest.approx(2 * read + 32 * Q8 + 32 * Q4)


def test_a_lead_of_all_directions_is_dense() -> None:
    lead, dense = (decode_work(SHAPE, LAYERS, SEGMENTS, 64, a) for a in (Attention(lead=192), Attention(tolerance=0)))
    assert lead == dense


def test_zeros_of_a_last_block_count() -> None:
    segments = (Segment(0, "k", 80, "q2_0"), Segment(0, "v", 32, "q4_0"))
    found = decode_work(ModelShape((128,), (64,), (192,), 64, 32), ((0,),), segments, 64, Attention(tolerance=0))
    assert found.multiply_adds == 6 * (2 * 128 + 32)


def test_prefill_of_a_micro_batch() -> None:
    """K and V are made once, then all queries meet them; coefficients are read once per layer."""
    found = prefill_work(SHAPE, LAYERS, SEGMENTS, 100)
    made = 2 * (128 * 192 + 64 * 96) + 128 * 32 + 64 * 32
    assert found.multiply_adds == made + 100 * 3 * 6 * 96
    assert found.bytes == pytest.approx(2 * (64 * Q8 + 128 * Q4 + 96 * Q8) + 32 * Q8 + 32 * Q4)


def test_the_published_figures_of_smollm2() -> None:
    """As docs/performance.md has them: one for the queries, the scores and V each; all directions 9."""
    smol = ModelShape((192,) * 30, (192,) * 30, (576,) * 30, 64, 64)
    segments = tuple(Segment(g, k, n, "q4_0") for g in range(6) for k, n in (("k", 400), ("v", 360)))  # type: ignore[arg-type]
    groups = group_layers(range(30), 5)
    plain = plain_work(smol).multiply_adds
    whole = tuple(replace(s, rank=128) for s in segments)
    assert decode_work(smol, groups, whole, 64, Attention()).multiply_adds / plain == 3.0
    dense = decode_work(smol, groups, segments, 64, Attention(tolerance=0)).multiply_adds / plain
    assert dense == pytest.approx(9.2, abs=0.4)


def test_groups_have_the_lead_of_their_device() -> None:
    one = Attention(leads=(64, 64, 128))
    assert (one.of((0, 1)).lead, one.of((2,)).lead, Attention(96).of((2,)).lead) == (64, 128, 96)
    both = [decode_work(SHAPE, LAYERS, SEGMENTS, 64, Attention(lead)) for lead in (64, 128)]
    mixed = decode_work(SHAPE, LAYERS, SEGMENTS, 64, one)
    # the second group has fewer directions than either lead
    assert mixed == both[0] != both[1]
    charges = work_charges(SHAPE, LAYERS, 64, one, 512)
    assert (charges[0, "k"].lead, charges[1, "k"].lead) == (64, 128)


# ---- charges


def test_charges_by_hand() -> None:
    rates = DeviceRates(multiply_adds_per_second=8e9, bytes_per_second=2e9)  # a quarter of a byte each
    found = work_charges(SHAPE, LAYERS, 64, Attention(lead=96), 128, rates)
    assert found[0, "k"] == Charge(96, 0.25 * (2 * 6 * 2 + 2), pytest.approx(0.25 * (REFINED * 2 * 6 * 2 + 2)))
    assert found[1, "v"] == Charge(96, 0.25 * (6 + 0.5), pytest.approx(0.25 * (REFINED * 6 + 0.5)))
    dense = work_charges(SHAPE, LAYERS, 64, Attention(tolerance=0), 128, rates)[0, "k"]
    assert dense.within == dense.beyond == found[0, "k"].within
    np.testing.assert_array_equal(Charge(64, 2.0, 0.5).steps(4), [64, 64, 16, 16])


@pytest.mark.parametrize("seed", range(3))
def test_a_price_takes_work_for_distortion_and_leaves_the_budget(seed: int) -> None:
    stats = random_statistics([320, 320, 256], seed=seed)
    shape = ModelShape((64,) * 14, (64,) * 14, (192,) * 14, 64, 64)
    charges = work_charges(shape, group_layers(range(14), 5), 64, Attention(), 512)
    budget = full_cost(stats) / 6
    found: list[Any] = []
    for price in (0.0, 0.3, 3.0):
        prices = Prices(1, Q8_BASES, basis_sets=0, charges=charges, work_price=price)
        segments = plan_segments(stats, DEFAULT_TYPES, 4, prices, budget)
        assert segments is not None
        spent = cost(stats, segments, prices)
        # true bytes: all of the budget is used at any price
        assert budget - 32 * TYPES["q8_0"].bytes <= spent <= budget * (1 + 1e-9)
        found.append((sum(map(stored_rank, segments)), distortion(stats, segments)))
    assert [rank for rank, _ in found] == sorted((rank for rank, _ in found), reverse=True)
    assert found[2][0] < found[0][0]
    assert found[0][1] <= found[1][1] * (1 + 1e-3)
    assert found[0][1] < found[2][1]


@pytest.mark.parametrize("decay", [0.005, 0.02, 0.1])
def test_the_default_price_raises_the_predicted_distortion_by_little(decay: float) -> None:
    stats = statistics([spectrum(320, decay)] * 2, [spectrum(320, decay / 2)] * 2)
    shape = ModelShape((64,) * 10, (64,) * 10, (192,) * 10, 64, 64)
    charges = work_charges(shape, group_layers(range(10), 5), 64, Attention(), 512)
    for slots in (1024, 8192):
        prices = Prices(slots, Q8_BASES, charges=charges)
        budget = full_cost(stats) * slots / 6
        steered = plan_segments(stats, DEFAULT_TYPES, 4, prices, budget)
        free = plan_segments(stats, DEFAULT_TYPES, 4, replace(prices, work_price=0), budget)
        assert steered is not None and free is not None
        assert distortion(stats, steered) <= (1 + MOST_RISE) * distortion(stats, free)
        assert sum(map(stored_rank, steered)) <= sum(map(stored_rank, free))


def test_charges_change_nothing_of_what_is_in_reach() -> None:
    stats = random_statistics([320, 64])
    charges = {(g, kind): Charge(128, 1e3, 1e2) for g in range(2) for kind in KINDS}
    prices = Prices(1, Q8_BASES, basis_sets=0, charges=charges, work_price=1.0)
    assert plan_segments(stats, DEFAULT_TYPES, 4, prices, 2 * (18 + 9)) is not None
    assert plan_segments(stats, DEFAULT_TYPES, 4, prices, 2 * (18 + 9) - 0.1) is None
