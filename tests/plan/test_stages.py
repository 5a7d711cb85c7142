"""Stages before a store is full: within its bytes, and better the fewer tokens there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from xkv_gguf.plan.cache_plan import plan_cache
from xkv_gguf.plan.coef_types import TYPES
from xkv_gguf.plan.segments import KINDS, stored_rank
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.plan.sizes import SLOT_PAD, predict_parts, store_bytes
from xkv_gguf.plan.stages import GROWTH
from xkv_gguf.plan.wishes import Wishes

from .test_cache_plan import plan, shape, statistics


@pytest.mark.parametrize(
    ("kind", "value", "n_ctx"),
    [("ratio", 4, 8192), ("ratio", 10, 32768), ("coef_ratio", 12, 8192), ("quality", "low", 4096)],
)
def test_they_take_no_more_than_the_full_store(kind: str, value: Any, n_ctx: int) -> None:
    stats = statistics()
    found = plan(kind, value, n_ctx)
    assert found.stages
    full = found.total_bytes - predict_parts(shape(), stats.layers, (), found.layout)["sinks and window"]
    losses = []
    for stage in found.stages:
        assert stage.n_slot % SLOT_PAD == 0
        losses.append(stage.distortion(stats))
        if not stage.segments:
            assert stage is found.stages[0]
            assert stage.n_slot * shape().numbers * TYPES[stage.type].bytes < full
            continue
        parts = predict_parts(shape(), stats.layers, stage.segments, found.layout)
        coef = (parts["K coefficients"] + parts["V coefficients"]) * stage.n_slot / found.layout.n_slot
        assert coef + parts["bases and means"] <= full
    sizes = [stage.n_slot for stage in found.stages] + [found.layout.n_slot]
    assert all(a < b for a, b in pairwise(sizes))
    # the plain stage is as long as it fits, which may be nearly as long as the full store
    grown = sizes[1:] if len(sizes) == 2 and not found.stages[0].segments else sizes
    assert all(b >= GROWTH * a for a, b in pairwise(grown))
    assert all(a <= b for a, b in pairwise([*losses, found.distortion]))


@pytest.mark.parametrize("wishes", [{"stages": False}, {"rank": 64, "types": ("q8_0",)}, {"n_ctx": 500}])
def test_none(wishes: dict[str, Any]) -> None:
    """On request, where ranks are given, and where the store is small."""
    assert plan("coef_ratio", 10, **wishes).stages == ()


@pytest.mark.parametrize("head", [32, 48])
def test_a_plain_stage_needs_heads_of_whole_blocks(head: int) -> None:
    found = plan_cache(statistics(embd=96), shape(head=head, embd=96), Wishes(8192, SizeTarget("coef_ratio", "12")))
    assert found.stages
    assert [not stage.segments for stage in found.stages] == [i == 0 and head == 32 for i in range(len(found.stages))]


def test_a_device_keeps_its_bytes_in_every_stage() -> None:
    """Groups differ in what they are worth: bytes of one device must not go to groups of another."""
    stats = statistics()
    n_layer = len(shape().embd_k)
    first = stats.layers[0]
    places = tuple(0 if layer in first else 1 for layer in range(n_layer))
    wishes = Wishes(8192, SizeTarget("coef_ratio", "12"), places=places)
    found = plan_cache(stats, shape(), wishes)
    assert any(stage.segments for stage in found.stages)
    for device in (0, 1):
        groups = [g for g, layers in enumerate(stats.layers) if places[layers[0]] == device]
        full = store_bytes(shape(), stats.layers, found.segments, found.layout, groups)
        numbers = sum(shape().dim(kind, stats.layers[g]) for g in groups for kind in KINDS)
        for stage in found.stages:
            if stage.segments:
                own = [s for s in stage.segments if s.group in groups]
                coef = sum(stored_rank(s) * TYPES[s.type].bytes for s in own) * stage.n_slot
                bases = sum(
                    shape().dim(s.kind, stats.layers[s.group]) * stored_rank(s) * TYPES[s.type_basis].bytes for s in own
                )
                assert 0.8 * full < coef + bases <= full
            else:
                assert stage.n_slot * numbers * TYPES[stage.type].bytes <= full
    alone = plan_cache(stats, shape(), replace(wishes, places=()))
    assert found.segments == alone.segments
    assert [stage.n_slot for stage in found.stages if stage.segments] == [
        stage.n_slot for stage in alone.stages if stage.segments
    ]
