from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.plan import segments as plan
from xkv_gguf.plan.coef_types import DEFAULT_TYPES, TYPES, basis_types, bytes_per_coef, sort_types
from xkv_gguf.plan.groups import group_layers, name_layers
from xkv_gguf.plan.segments import KINDS, Prices, Segment, Statistics, distortion, plan_segments, stored_rank

from .quantizers import stored


def spectrum(dim: int, decay: float) -> plan.Spectrum:
    values: plan.Spectrum = np.exp(-decay * np.arange(dim))
    return values


def statistics(k: list[Any], v: list[Any], frame: int = 64, weights: Any = None) -> Statistics:
    ones = (1.0,) * len(k)
    return Statistics(
        layers=tuple((il,) for il in range(len(k))),
        spectra={"k": tuple(k), "v": tuple(v)},
        weights=weights or {"k": ones, "v": ones},
        frame=frame,
    )


def random_statistics(dims: list[int], seed: int = 1, frame: int = 64) -> Statistics:
    rng = np.random.default_rng(seed)
    spectra = [np.sort(rng.exponential(size=2 * d) ** 3)[::-1][:d] for d in dims for _ in KINDS]
    return statistics(spectra[::2], spectra[1::2], frame)


def cost(stats: Statistics, segments: tuple[Segment, ...], prices: Prices) -> float:
    total = 0.0
    for s in segments:
        total += stored_rank(s) * TYPES[s.type].bytes * prices.slots
        total += prices.basis_sets * stats.dim(s.group, s.kind) * stored_rank(s) * TYPES[s.type_basis].bytes
    return total


def full_cost(stats: Statistics) -> float:
    """Bytes per token of f16."""
    return 2.0 * sum(stats.dim(g, kind) for g in range(len(stats.layers)) for kind in KINDS)


def check_rules(stats: Statistics, segments: tuple[Segment, ...], max_segments: int = 4) -> None:
    """What the native library expects of segments."""
    assert segments == tuple(sorted(segments, key=lambda s: (s.group, s.kind)))  # sorted() keeps the order inside
    order = list(TYPES)
    for g in range(len(stats.layers)):
        for kind in KINDS:
            own = [s for s in segments if (s.group, s.kind) == (g, kind)]
            dim = stats.dim(g, kind)
            assert 1 <= len(own) <= max_segments
            assert [order.index(s.type) for s in own] == sorted({order.index(s.type) for s in own})
            done = 0
            for s in own:
                assert s.rank > 0
                done += s.rank
                step = max(32, TYPES[s.type].block) if kind == "k" else 32
                assert s.rank % step == 0 or (done == dim and s is own[-1])
                if kind == "v":
                    assert stats.frame % TYPES[s.type].block == 0
            assert done <= dim


Q8_BASES = dict.fromkeys(TYPES, "q8_0")
PER_TOKEN = Prices(1, Q8_BASES, basis_sets=0)


# ---- types


@pytest.mark.parametrize("name", list(TYPES))
def test_noise_is_what_is_measured(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((4096, 128)).astype(np.float32)
    error = ((stored(x, name).astype(np.float64) - x) ** 2).mean() / (x.astype(np.float64) ** 2).mean()
    assert TYPES[name].noise == pytest.approx(error, rel=0.02)


def test_types_are_those_of_ggml() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, found in TYPES.items():
        if name == "q2_0":  # newer than the package gguf
            continue
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
        assert (found.block, found.bytes) == (block, n_bytes / block)
    assert [t.bytes for t in TYPES.values()] == sorted((t.bytes for t in TYPES.values()), reverse=True)
    assert [t.noise for t in TYPES.values()] == sorted(t.noise for t in TYPES.values())


def test_unknown_coefficient_type() -> None:
    with pytest.raises(OptionError, match="'q3_k': one of f32, f16, q8_0"):
        bytes_per_coef("q3_k")
    with pytest.raises(OptionError, match="none, at least one of"):
        sort_types([])
    assert sort_types(["q2_0", "f16", "q8_0", "f16"]) == ("f16", "q8_0", "q2_0")


# ---- groups


def test_groups_are_even_and_cover_all_layers() -> None:
    groups = group_layers(range(32), 5)
    assert [len(layers) for layers in groups] == [5, 5, 5, 5, 4, 4, 4]
    assert [il for layers in groups for il in layers] == list(range(32))
    assert group_layers(range(3), 3) == ((0, 1, 2),)
    assert group_layers([3, 7, 11], 2) == ((3, 7), (11,))


def test_names_of_layers() -> None:
    assert (name_layers([4, 5, 6]), name_layers([3]), name_layers([3, 7, 11])) == ("4-6", "3", "3, 7, 11")


@pytest.mark.parametrize("size", [0, -1, 31])
def test_impossible_group_size(size: int) -> None:
    with pytest.raises(OptionError, match=f"group size {size}: 1 to 30"):
        group_layers(range(30), size)


# ---- segments


@pytest.mark.parametrize("ratio", [1.9, 3.7, 5.5, 8.0, 12.0, 30.0])
@pytest.mark.parametrize("types", [DEFAULT_TYPES, ("q8_0",), ("f16", "q4_0"), ("q4_0", "q1_0")])
def test_budget_is_kept_and_used(ratio: float, types: tuple[str, ...]) -> None:
    stats = random_statistics([320, 320, 256], frame=128)
    budget = full_cost(stats) / ratio
    if budget < plan.least_cost(stats, types, 4, PER_TOKEN):
        assert plan_segments(stats, types, 4, PER_TOKEN, budget) is None
        return
    segments = plan_segments(stats, types, 4, PER_TOKEN, budget)
    assert segments is not None
    check_rules(stats, segments)
    spent = cost(stats, segments, PER_TOKEN)
    assert spent <= budget * (1 + 1e-9)
    largest = sum(stored_rank(Segment(g, k, stats.dim(g, k), types[0])) for g in range(3) for k in KINDS)
    # the last move that fits may be a granule short of the budget
    room = max(32 * TYPES[t].bytes for t in types)
    assert spent >= min(budget - room, largest * TYPES[types[0]].bytes * (1 - 1e-9))


@pytest.mark.parametrize("frame", [32, 64, 128])
@pytest.mark.parametrize("dims", [[80, 48], [24, 160], [960, 768], [100, 33]])
@pytest.mark.parametrize("max_segments", [1, 2, 4])
def test_granularity(frame: int, dims: list[int], max_segments: int) -> None:
    stats = random_statistics(dims, seed=3, frame=frame)
    for prices in (PER_TOKEN, Prices(8192, basis_types(True))):
        least = plan.least_cost(stats, DEFAULT_TYPES, max_segments, prices)
        for factor in (1.0, 1.3, 2.0, 4.0, 100.0):
            segments = plan_segments(stats, DEFAULT_TYPES, max_segments, prices, factor * least)
            assert segments is not None
            check_rules(stats, segments, max_segments)
            assert cost(stats, segments, prices) <= factor * least * (1 + 1e-9)


def test_the_smallest_plan_is_the_smallest() -> None:
    stats = random_statistics([320, 64])
    least = plan.least_cost(stats, DEFAULT_TYPES, 4, PER_TOKEN)
    # K: 64 directions of q2_0, 128 of q1_0 or 32 of q4_0; V: 32 of q2_0, for q1_0 needs chunks of 128
    assert least == 2 * (18 + 9)
    assert plan_segments(stats, DEFAULT_TYPES, 4, PER_TOKEN, least) is not None
    assert plan_segments(stats, DEFAULT_TYPES, 4, PER_TOKEN, least * 0.999) is None


def test_more_budget_never_predicts_more_distortion() -> None:
    stats = random_statistics([320, 192, 256], seed=5)
    for prices in (PER_TOKEN, Prices(4096, Q8_BASES)):
        least = plan.least_cost(stats, DEFAULT_TYPES, 4, prices)
        found = []
        for factor in np.geomspace(1.0, 30.0, 40):
            segments = plan_segments(stats, DEFAULT_TYPES, 4, prices, factor * least)
            assert segments is not None
            found.append(distortion(stats, segments))
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(found))
        assert found[-1] < 1e-3 < found[0]


def all_plans(dim: int, kind: Any, types: tuple[str, ...], frame: int) -> list[list[Segment]]:
    """Every allowed sequence of segments of one source."""
    found = []
    for counts in itertools.product(range(dim // 32 + 1), repeat=len(types)):
        segments = [Segment(0, kind, 32 * n, t) for n, t in zip(counts, types, strict=True) if n > 0]
        if 0 < sum(s.rank for s in segments) <= dim:
            try:
                v, k = Segment(0, "v", 32, "q8_0"), Segment(0, "k", 32, "q8_0")
                whole = (*segments, v) if kind == "k" else (k, *segments)
                check_rules(statistics([np.ones(dim)], [np.ones(dim)], frame), whole)
            except AssertionError:
                continue
            found.append(segments)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_close_to_brute_force(seed: int) -> None:
    dim, types = 192, ("q8_0", "q4_0", "q2_0")
    stats = random_statistics([dim], seed=seed)
    options = {}
    for kind in KINDS:
        options[kind] = [
            (cost(stats, tuple(p), PER_TOKEN), sum(stats.variances(0, kind)) - kept_by(stats, p))
            for p in all_plans(dim, kind, types, stats.frame)
        ]
    for budget in (60, 90, 140, 200, 280):
        segments = plan_segments(stats, types, 3, PER_TOKEN, budget)
        assert segments is not None
        found = distortion(stats, [replace(s, type_basis="f32") for s in segments])
        best = min(dk + dv for (ck, dk), (cv, dv) in itertools.product(*options.values()) if ck + cv <= budget)
        assert best * (1 - 1e-9) <= found
        # a price per byte reaches only the convex hull; single moves fill most of what lies between
        assert found <= best * 1.05


def kept_by(stats: Statistics, segments: list[Segment]) -> float:
    start, kept = 0, 0.0
    for s in segments:
        kept += float(stats.variances(0, s.kind)[start : start + s.rank].sum()) * (1 - TYPES[s.type].noise)
        start += s.rank
    return kept


def test_bits_go_where_the_variance_is() -> None:
    flat, steep = spectrum(256, 0.001), spectrum(256, 0.2)
    stats = statistics([steep, flat], [flat, steep])
    segments = plan_segments(stats, DEFAULT_TYPES, 4, PER_TOKEN, full_cost(stats) / 5)
    assert segments is not None
    rank = {(g, k): sum(s.rank for s in segments if (s.group, s.kind) == (g, k)) for g in range(2) for k in KINDS}
    assert rank[0, "k"] <= 128 < rank[1, "k"]
    assert rank[1, "v"] <= 128 < rank[0, "v"]


def test_weights_move_bits() -> None:
    s = spectrum(256, 0.01)
    even = statistics([s], [s])
    uneven = statistics([s], [s], weights={"k": (10.0,), "v": (1.0,)})
    spent = []
    for stats in (even, uneven):
        segments = plan_segments(stats, DEFAULT_TYPES, 4, PER_TOKEN, 200)
        assert segments is not None
        spent.append(sum(stored_rank(s) * TYPES[s.type].bytes for s in segments if s.kind == "k"))
    assert spent[1] > 1.2 * spent[0]


def test_bases_count_and_their_noise_too() -> None:
    stats = random_statistics([320, 320])
    few = plan_segments(stats, DEFAULT_TYPES, 4, Prices(256, Q8_BASES), 500_000)
    assert few is not None
    check_rules(stats, few)
    assert cost(stats, few, Prices(256, Q8_BASES)) <= 500_000

    def lost(type_basis: str) -> float:
        return distortion(stats, [replace(s, type_basis=type_basis) for s in few or ()])

    assert lost("q4_0") > lost("q5_0") > lost("q8_0") > lost("f32")


def test_bases_are_as_coarse_as_their_coefficients_allow() -> None:
    stats = statistics([spectrum(256, 0.03)], [spectrum(256, 0.03)])
    prices = Prices(2048, basis_types(quantizable=True))
    segments = plan_segments(stats, DEFAULT_TYPES, 4, prices, full_cost(stats) * 2048 / 12)
    assert segments is not None
    assert {(s.type in ("q2_0", "q1_0"), s.type_basis) for s in segments} == {(True, "q4_0"), (False, "q8_0")}
    assert set(basis_types(quantizable=False).values()) == {"f16"}
    assert set(basis_types(True, "q5_0").values()) == {"q5_0"}
    for coef, basis in basis_types(quantizable=True).items():
        assert TYPES[basis].noise < max(0.1 * TYPES[coef].noise, 3e-5)


def test_distortion_by_hand() -> None:
    stats = statistics([np.ones(64)], [np.ones(64)], weights={"k": (3.0,), "v": (1.0,)})
    segments = (Segment(0, "k", 32, "q8_0"), Segment(0, "k", 32, "q4_0"), Segment(0, "v", 32, "q5_0"))
    q8_0, q5_0, q4_0 = (TYPES[t].noise for t in ("q8_0", "q5_0", "q4_0"))
    expected = 3 * (0.5 * q8_0 + 0.5 * q4_0 + q8_0) + 0.5 + 0.5 * (q5_0 + q8_0)
    assert distortion(stats, segments) == pytest.approx(expected)


def test_spectrum_of_zeros() -> None:
    stats = statistics([np.zeros(64)], [spectrum(64, 1.0)])
    segments = plan_segments(stats, DEFAULT_TYPES, 4, PER_TOKEN, 100)
    assert segments is not None
    check_rules(stats, segments)
    assert plan.energy_kept(np.zeros(64), 32) == 1.0
    nothing = statistics([np.zeros(64)], [np.zeros(64)])
    assert plan_segments(nothing, DEFAULT_TYPES, 4, PER_TOKEN, 100) is not None


def test_types_that_no_chunk_holds() -> None:
    with pytest.raises(OptionError, match="q1_0: none has blocks that fit into chunks of 64 tokens, as V needs"):
        plan_segments(random_statistics([128]), ("q1_0",), 4, PER_TOKEN, 1e9)
    assert plan_segments(random_statistics([128], frame=128), ("q1_0",), 4, PER_TOKEN, 1e9) is not None


def test_zeros_fill_the_last_block() -> None:
    assert stored_rank(Segment(0, "k", 80, "q2_0")) == 128
    assert stored_rank(Segment(0, "v", 80, "q2_0")) == 96
    assert stored_rank(Segment(0, "k", 80, "q8_0")) == 96
    assert stored_rank(Segment(0, "k", 80, "f16")) == 96


def test_same_rank() -> None:
    stats = random_statistics([80, 48])
    full = plan.same_rank(stats, None, "f32", "f32")
    assert [(s.group, s.kind, s.rank) for s in full] == [(0, "k", 80), (0, "v", 80), (1, "k", 48), (1, "v", 48)]
    assert [s.rank for s in plan.same_rank(stats, 64, "q8_0", "q8_0")] == [64, 64, 48, 48]
    with pytest.raises(OptionError, match="rank 33: a multiple of 32"):
        plan.same_rank(stats, 33, "q8_0", "q8_0")
    with pytest.raises(OptionError, match=r"rank 32: a multiple of 64 \(for q2_0\)"):
        plan.same_rank(stats, 32, "q2_0", "q8_0")
    with pytest.raises(OptionError, match="type q1_0 for V"):
        plan.same_rank(stats, None, "q1_0", "q8_0")


def test_the_assumed_spectrum_descends() -> None:
    assumed = plan.assumed_spectrum(960)
    assert (np.diff(assumed) < 0).all() and assumed[0] == pytest.approx(8**-1.5)


def test_planning_is_fast() -> None:
    stats = random_statistics([960] * 6)
    begin = time.perf_counter()
    plan_segments(stats, DEFAULT_TYPES, 4, Prices(8192, Q8_BASES), 20e6)
    # 0.06 s on one core
    assert time.perf_counter() - begin < 1.0
