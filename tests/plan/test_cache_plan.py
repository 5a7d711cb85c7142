from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.plan.cache_plan import WINDOW_SHARE, CachePlan, plan_cache
from xkv_gguf.plan.groups import default_frame, default_group_size, group_layers
from xkv_gguf.plan.segments import KINDS, Kind, Segment, Statistics, assumed_spectrum
from xkv_gguf.plan.size_target import DEFAULT_TARGET, QUALITIES, SizeTarget, one_target, parse_bytes
from xkv_gguf.plan.sizes import (
    CacheLayout,
    ModelShape,
    coef_bytes_per_token,
    plain_bytes_per_token,
    predict_parts,
    transit_bytes,
    window_bytes,
)
from xkv_gguf.plan.wishes import Wishes

from .test_segments import check_rules, random_statistics

N_LAYER, EMBD, N_HEAD = 12, 128, 6
MIB = 2**20


def shape(head: int = 64, embd: int = EMBD) -> ModelShape:
    return ModelShape((embd,) * N_LAYER, (embd,) * N_LAYER, (N_HEAD * head,) * N_LAYER, head, head)


def statistics(frame: int = 64, embd: int = EMBD, kld_scale: float = 0.0) -> Statistics:
    groups = group_layers(range(N_LAYER), 4)
    stats = random_statistics([len(layers) * embd for layers in groups], frame=frame)
    return dataclasses.replace(stats, layers=groups, kld_scale=kld_scale)


def plan(kind: str, value: Any, n_ctx: int = 8192, **wishes: Any) -> CachePlan:
    return plan_cache(statistics(), shape(), Wishes(n_ctx, SizeTarget.of(kind, value), **wishes))


# ---- size targets


@pytest.mark.parametrize(
    ("value", "expected"),
    [(26, 26), ("1048576", MIB), ("26MiB", 26 * MIB), ("1.5 GiB", 3 * 2**29), ("0.5kib", 512), (" 7MIB ", 7 * MIB)],
)
def test_sizes_are_read(value: Any, expected: int) -> None:
    assert parse_bytes(value) == expected


@pytest.mark.parametrize("value", [0, -5, 1.5, True, None, "", "MiB", "26MB", "1e9", "-3MiB", "nan", "0MiB", 2**63])
def test_impossible_sizes(value: Any) -> None:
    with pytest.raises(OptionError, match=r"budget: .*, expected bytes or a size such as 26MiB"):
        parse_bytes(value)


def test_size_targets_have_one_spelling() -> None:
    assert SizeTarget.of("ratio", 6) == SizeTarget("ratio", "6.0") == SizeTarget("ratio", "6")
    assert SizeTarget.of("budget", "1MiB") == SizeTarget("budget", str(MIB))
    assert SizeTarget("quality", "low").number == QUALITIES["low"]
    assert SizeTarget.of("coef_ratio", 10 / 3).number == 10 / 3
    assert (str(SizeTarget("ratio", "6")), str(SizeTarget.of("budget", 5))) == ("ratio 6", "budget 5 bytes")


@pytest.mark.parametrize(
    ("kind", "value", "match"),
    [
        ("size", "3", "plan 'size': one of ratio, coef_ratio, budget, quality expected"),
        ("ratio", 0, "ratio: 0, expected a number of 1 or more"),
        ("ratio", float("nan"), "ratio: nan, expected"),
        ("coef_ratio", float("inf"), "coef_ratio: inf, expected"),
        ("ratio", "many", "ratio: 'many', expected"),
        ("quality", "best", "quality: 'best', expected one of high, medium, low"),
        ("quality", 3, "quality: 3, expected one of"),
    ],
)
def test_impossible_size_targets(kind: str, value: Any, match: str) -> None:
    with pytest.raises(OptionError, match=re.escape(match)):
        SizeTarget.of(kind, value)


def test_one_size_target_at_most() -> None:
    assert one_target({"ratio": None}) is None
    assert one_target({"budget": 5, "ratio": None}) == SizeTarget("budget", "5")
    with pytest.raises(OptionError, match="ratio: quality is given as well, one of them expected"):
        one_target({"quality": "low", "ratio": 5})


# ---- sizes


def test_sizes_by_hand() -> None:
    tiny = ModelShape((32, 32), (16, 16), (48, 48), 32, 16)
    layout = CacheLayout(1024, n_sink=4, n_window=60, n_ubatch=80, frame=32, type_window="q8_0", n_text_sink=40)
    segments = (Segment(0, "k", 32, "q8_0", "f16"), Segment(0, "k", 32, "q4_0"), Segment(0, "v", 32, "q5_0", "f16"))
    assert plain_bytes_per_token([32, 32], [16, 16], "f16") == 192
    assert coef_bytes_per_token(segments) == 34 + 18 + 22
    assert (layout.n_cell, layout.n_transit, layout.n_slot, layout.n_exact) == (160, 64, 1024, 96)
    assert predict_parts(tiny, [(0, 1)], segments, layout) == {
        "K coefficients": (34 + 18) * 1024,
        "V coefficients": 22 * 1024,
        "bases and means": 2 * (64 * 32 + 32 * 32) + 64 * 34 + 4 * (96 + 96),
        "sinks and window": 96 * 34 // 32 * 160,
    }
    assert transit_bytes(tiny, layout) == 96 * 34 // 32 * 64


def test_slots_hold_all_chunks_and_a_cut_one() -> None:
    layout = CacheLayout(8192, n_sink=4, n_window=64, frame=64)
    # 8124 tokens are 127 chunks, and one more
    assert layout.n_slot == 128 * 64
    assert dataclasses.replace(layout, n_ctx=8192 + 5).n_slot == 33 * 256


# ---- plans


@pytest.mark.parametrize("ratio", [3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("n_ctx", [2048, 8192, 65536])
def test_a_ratio_counts_everything(ratio: float, n_ctx: int) -> None:
    try:
        found = plan("ratio", ratio, n_ctx)
    except OptionError:
        assert n_ctx == 2048 and ratio > 5
        return
    assert ratio <= found.ratio < 1.03 * ratio
    assert found.total_bytes == sum(found.parts.values())
    check_rules(statistics(), found.segments)


def test_a_budget_is_kept_and_used() -> None:
    for n_bytes in (5 * MIB, 8 * MIB, 20 * MIB):
        found = plan("budget", n_bytes)
        assert 0.98 * n_bytes < found.total_bytes <= n_bytes
    assert plan("budget", "8MiB") == plan("budget", 8 * MIB)


def test_more_budget_never_predicts_more_distortion_with_the_same_window() -> None:
    fixed: Any = {"n_window": 64, "n_ubatch": 128, "type_window": "q8_0", "work_price": 0}
    found = [plan("budget", n, **fixed).distortion for n in range(4 * MIB, 24 * MIB, MIB)]
    assert all(b <= a for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("quality", list(QUALITIES))
def test_a_quality_is_a_coefficient_ratio(quality: str) -> None:
    found = plan("quality", quality)
    assert QUALITIES[quality] <= found.coef_ratio < 1.02 * QUALITIES[quality]
    assert found.segments == plan("coef_ratio", QUALITIES[quality], 65536).segments
    layout = found.layout
    assert (layout.n_window, layout.n_ubatch, layout.type_window) == (64, 512, "q8_0")


def test_a_quality_is_never_out_of_reach() -> None:
    tiny = ModelShape((32,), (32,), (32,), 32, 32)
    stats = random_statistics([32])
    found = plan_cache(stats, tiny, Wishes(1024, SizeTarget("quality", "low")))
    assert found.coef_ratio < QUALITIES["low"]
    with pytest.raises(OptionError, match=r"coef_ratio 12: out of reach .*fewest bytes per token are 27 \(coef_ratio"):
        plan_cache(stats, tiny, Wishes(1024, SizeTarget("coef_ratio", "12")))


def test_window_follows_the_budget_and_the_micro_batch_does_not() -> None:
    plans = [plan("budget", n) for n in (3 * MIB, 6 * MIB, 8 * MIB, 12 * MIB, 30 * MIB)]
    layouts = [p.layout for p in plans]
    assert {layout.n_ubatch for layout in layouts} == {512}
    types = [layout.type_window for layout in layouts]
    assert types == sorted(types, reverse=True) and set(types) == {"q8_0", "f16"}
    assert all(32 <= layout.n_window <= 64 for layout in layouts)
    for p in plans[1:]:
        assert window_bytes(shape(), p.layout) <= WINDOW_SHARE * p.total_bytes * 1.02
    assert {s.type_basis for p in plans for s in p.segments} == {"q8_0", "q4_0"}


def test_one_token_in_80_can_stay_as_a_sink_unless_a_rank_is_given() -> None:
    for n_ctx in (2048, 65536):
        for kind, value in (("ratio", 3), ("quality", "medium")):
            assert plan(kind, value, n_ctx).layout.n_text_sink == n_ctx // 80
        assert plan("quality", "low", n_ctx, rank=32, types=("q8_0",)).layout.n_text_sink == 0


def test_sinks_give_way_to_a_budget_that_is_out_of_reach_otherwise() -> None:
    n_ctx = 65536
    room = n_ctx // 80
    with pytest.raises(OptionError) as caught:
        plan("ratio", 1000, n_ctx, n_text_sink=room)
    limit = float(re.search(r"ratio ([0-9.]+)\)", str(caught.value))[1])  # type: ignore[index]
    assert plan("ratio", limit, n_ctx).layout.n_text_sink == room
    assert plan("ratio", 1.05 * limit, n_ctx).layout.n_text_sink in (room // 2, room // 4)
    with pytest.raises(OptionError):
        plan("ratio", 1.05 * limit, n_ctx, n_text_sink=room)


def test_what_is_given_wins() -> None:
    given: Any = {"n_sink": 9, "n_text_sink": 50, "n_window": 200, "n_ubatch": 100}
    found = plan("ratio", 4, **given, type_window="f32", type_basis="f16", types=("q5_0",))
    layout = found.layout
    assert (layout.n_sink, layout.n_text_sink, layout.n_window, layout.n_ubatch) == (9, 50, 200, 100)
    assert layout.type_window == "f32"
    assert {(s.type, s.type_basis) for s in found.segments} == {("q5_0", "f16")}
    layout = plan("quality", "high", n_window=200, n_ubatch=100).layout
    assert (layout.n_cell, layout.n_transit) == (384, 96)
    assert plan("ratio", 4, n_batch=96).layout.n_ubatch == 96
    assert plan("quality", "low", n_batch=96).layout.n_ubatch == 96


def test_at_most_as_many_segments_as_asked_for() -> None:
    found = plan("ratio", 6, max_segments=1)
    assert all(len(found.of(g, kind)) == 1 for g in range(3) for kind in KINDS)
    assert found.distortion > plan("ratio", 6).distortion


@pytest.mark.parametrize(
    ("kind", "value", "wishes"),
    [("ratio", 100, {}), ("budget", MIB, {}), ("ratio", 9, {"n_window": 2000}), ("budget", 1, {})],
)
def test_out_of_reach_says_what_is_the_smallest(kind: str, value: float, wishes: Any) -> None:
    with pytest.raises(OptionError) as caught:
        plan(kind, value, **wishes)
    text = str(caught.value)
    assert "\n" not in text
    assert f"{SizeTarget.of(kind, value)}: out of reach at n_ctx 8192" in text
    assert ("a larger n_ctx" in text) == (kind == "ratio" and value < 50)
    assert ("no n_ctx gets beyond 75.85 with coefficients of q8_0" in text) == (value == 100)
    assert ("a smaller n_window than 2000" in text) == bool(wishes)
    found = re.search(r"takes (\d+) bytes .*ratio ([\d.]+)\)", text)
    assert found is not None
    smallest = plan("budget", int(found[1]), **wishes)
    assert smallest.total_bytes <= int(found[1]) < 1.01 * smallest.total_bytes
    plan("ratio", float(found[2]), **wishes)
    with pytest.raises(OptionError):
        plan("budget", int(int(found[1]) * 0.99), **wishes)


def test_heads_that_are_no_multiples_of_32() -> None:
    stats, narrow = statistics(embd=96), shape(head=48, embd=96)
    for target in (DEFAULT_TARGET, SizeTarget("ratio", "3")):
        found = plan_cache(stats, narrow, Wishes(8192, target))
        assert found.layout.type_window == "f16"
        assert {s.type_basis for s in found.segments} == {"f16"}
    for wish in ({"type_window": "q8_0"}, {"type_basis": "q5_0"}):
        with pytest.raises(OptionError, match="heads have 48 numbers of K and 48 of V, multiples of 32 expected"):
            plan_cache(stats, narrow, Wishes(8192, **wish))  # type: ignore[arg-type]


def test_the_published_rate() -> None:
    """xKV-4 of Llama-3.1-8B at 64k tokens: coefficients and bases in f16, without exact tokens."""
    embd = (1024,) * 32
    groups = group_layers(range(32), 4)
    spectra: dict[Kind, tuple[np.ndarray, ...]] = {kind: (assumed_spectrum(4096),) * 8 for kind in KINDS}
    stats = Statistics(groups, spectra, dict.fromkeys(KINDS, (1.0,) * 8), 128)
    wishes = Wishes(65536, rank=(384, 576), types=("f16",), type_basis="f16", type_window="f16", online=False)
    found = plan_cache(stats, ModelShape(embd, embd, (4096,) * 32, 128, 128), wishes)
    parts = dict(found.parts)
    assert found.f16_bytes / (found.total_bytes - parts["sinks and window"]) == pytest.approx(8.0, abs=0.05)


def test_full_rank_is_exact() -> None:
    wishes = Wishes(1024, rank="full", types=("f32",), type_window="f32", type_basis="f32")
    found = plan_cache(statistics(), shape(), wishes)
    assert [s.rank for s in found.segments] == [4 * EMBD] * 6
    assert found.distortion == 0
    assert found.parts["bases and means"] == 4 * (6 * (4 * EMBD) ** 2 + N_LAYER * (2 * EMBD + N_HEAD * 64))
    with pytest.raises(OptionError, match=r"types q8_0\+q5_0.*: exactly one expected where a rank is given"):
        plan_cache(statistics(), shape(), Wishes(1024, rank=64))


def test_divergence_needs_a_scale() -> None:
    assert plan("quality", "low").kld is None
    found = plan_cache(statistics(kld_scale=0.5), shape(), Wishes(8192))
    assert found.kld == pytest.approx(0.5 * found.distortion)


def test_a_cap_of_directions() -> None:
    for cap in (64, 96):
        found = plan("ratio", 4, max_rank=cap)
        assert all(sum(s.rank for s in found.of(g, kind)) <= cap for g in range(3) for kind in KINDS)
        for stage in found.stages:
            assert all(s.rank <= cap for s in stage.segments)
        check_rules(capped(cap), found.segments)
    assert plan("ratio", 4, max_rank=512) == plan("ratio", 4)
    assert plan("ratio", 4, max_rank=64).distortion > plan("ratio", 4).distortion


def capped(cap: int) -> Statistics:
    """Groups as narrow as the cap: the end of the directions for `check_rules`."""
    stats = statistics()
    return dataclasses.replace(stats, spectra={k: tuple(s[:cap] for s in stats.spectra[k]) for k in KINDS})


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"n_ubatch": 1024}, "n_ubatch: 1024, expected 1 to n_batch = 512; lower n_ubatch or raise n_batch"),
        ({"n_ubatch": 0}, "n_ubatch: 0, expected 1 to n_batch = 512"),
        ({"n_ubatch": 2048, "n_batch": 4096, "n_ctx": 1000}, "n_ubatch: 2048, expected 1 to n_ctx = 1024"),
        ({"n_seq_max": 0}, "n_seq_max: 0, expected 1 to 256"),
        ({"n_seq_max": 257}, "n_seq_max: 257, expected 1 to 256"),
    ],
)
def test_impossible_wishes(wishes: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        Wishes(**{"n_ctx": 8192, **wishes})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- sequences


def test_sequences_of_one_stream_share_its_tokens() -> None:
    one, many = (CacheLayout(8192, n_text_sink=10, n_seq_max=n, kv_unified=True) for n in (1, 16))
    assert (many.n_stream, many.n_seq, many.n_ctx_seq, many.n_basis_set) == (1, 16, 8192, 1)
    assert (one.n_cell, many.n_cell) == (160, 16 * (4 + 10 + 64 + 64))
    # a chunk to spare for each of them: 127 + 16 of 64 tokens
    assert (one.n_slot, many.n_slot) == (128 * 64, 36 * 256)


def test_streams_have_all_of_their_own() -> None:
    found = CacheLayout(8192, n_text_sink=10, n_seq_max=4)
    alone = CacheLayout(2048, n_text_sink=10)
    assert (found.n_stream, found.n_seq, found.n_ctx_seq, found.n_basis_set) == (4, 1, 2048, 5)
    assert (found.n_cell, found.n_slot, found.n_transit) == (alone.n_cell, alone.n_slot, alone.n_transit)
    assert window_bytes(shape(), found) == 4 * window_bytes(shape(), alone)
    assert transit_bytes(shape(), found) == 4 * transit_bytes(shape(), alone)
    segments = plan("ratio", 4).segments
    stats = statistics()
    many, one = (predict_parts(shape(), stats.layers, segments, x) for x in (found, alone))
    assert many["K coefficients"] == 4 * one["K coefficients"]
    means = 4 * (2 * EMBD + N_HEAD * 64) * N_LAYER
    assert many["bases and means"] - means == 5 * (one["bases and means"] - means)
    assert dataclasses.replace(found, online=False).n_basis_set == 1


def test_contexts_of_streams_are_rounded_up() -> None:
    assert Wishes(5000, n_seq_max=4).n_ctx == 4 * 1280
    assert Wishes(5000, n_seq_max=4, kv_unified=True).n_ctx == 5120


@pytest.mark.parametrize("n_seq_max", [4, 16])
@pytest.mark.parametrize("kv_unified", [False, True])
def test_a_ratio_counts_all_sequences(n_seq_max: int, kv_unified: bool) -> None:
    found = plan("ratio", 4, 32768, n_seq_max=n_seq_max, kv_unified=kv_unified)
    assert 4 <= found.ratio < 4.15
    assert found.f16_bytes == 2 * shape().numbers * 32768
    assert found.layout.n_text_sink == 32768 // 80 // n_seq_max
    assert bool(found.stages) == kv_unified
    with pytest.raises(
        OptionError, match=rf"for {n_seq_max} sequences in .*a smaller n_seq_max than {n_seq_max} helps"
    ):
        plan("ratio", 30, 4096, n_seq_max=n_seq_max, kv_unified=kv_unified)


# ---- group sizes


def test_chunks_follow_the_heads() -> None:
    assert [default_frame(head) for head in (32, 64, 80, 96, 112, 128, 256)] == [64, 64, 64, 64, 128, 128, 128]


def test_groups_are_at_most_4096_numbers_wide() -> None:
    for embd, size in ((192, 5), (1024, 4), (2048, 2), (4096, 1), (8192, 1)):
        assert default_group_size(ModelShape((embd,) * 32, (embd,) * 32, (embd,) * 32, 64, 64)) == size
