"""Plans for layers whose V is the first numbers of K: all bytes are K's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xkv_gguf.plan.cache_plan import plan_cache
from xkv_gguf.plan.groups import LayerGroups, group_layers
from xkv_gguf.plan.segments import Statistics, assumed_spectrum, distortion, same_rank, sources
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.plan.sizes import ModelShape, known_shape, mean_bytes
from xkv_gguf.plan.wishes import Wishes
from xkv_gguf.plan.work import Attention, decode_work, work_charges

N_LAYER, LATENT, EMBD, N_HEAD = 8, 512, 576, 16
SHAPE = ModelShape((EMBD,) * N_LAYER, (0,) * N_LAYER, (N_HEAD * LATENT,) * N_LAYER, EMBD, LATENT)
GROUPS = group_layers(range(N_LAYER), 4)


def statistics() -> Statistics:
    return Statistics(
        layers=GROUPS,
        spectra={
            "k": tuple(assumed_spectrum(4 * EMBD) for _ in GROUPS),
            "v": tuple(assumed_spectrum(0) for _ in GROUPS),
        },
        weights={"k": (1.0, 1.0), "v": (1.0, 1.0)},
        frame=128,
    )


@pytest.mark.parametrize("target", ["ratio", "coef_ratio"])
def test_a_ratio_is_of_what_llama_cpp_keeps(target: str) -> None:
    plan = plan_cache(statistics(), SHAPE, Wishes(32768, SizeTarget(target, "6")))
    assert plan.f16_bytes_per_token == 2 * N_LAYER * EMBD
    assert {segment.kind for segment in plan.segments} == {"k"}
    assert {segment.kind for stage in plan.stages for segment in stage.segments} <= {"k"}
    assert plan.parts["V coefficients"] == 0
    assert getattr(plan, target) == pytest.approx(6, rel=0.02)
    assert 0 < plan.distortion < 1


def test_means_are_ks_alone() -> None:
    assert mean_bytes(SHAPE) == 4 * N_LAYER * EMBD
    with_v = replace(SHAPE, embd_v=(LATENT,) * N_LAYER)
    assert mean_bytes(with_v) == 4 * N_LAYER * (EMBD + LATENT + N_HEAD * LATENT)


def test_sources_and_kinds() -> None:
    assert sources(statistics()) == [(0, "k"), (1, "k")]
    groups = LayerGroups.of(GROUPS, SHAPE.embd_k, SHAPE.embd_v)
    assert [groups.kinds(g) for g in range(2)] == [("k",), ("k",)]


def test_all_directions_lose_nothing() -> None:
    segments = same_rank(statistics(), None, "f32", "f32")
    assert [(s.group, s.kind, s.rank) for s in segments] == [(0, "k", 4 * EMBD), (1, "k", 4 * EMBD)]
    assert distortion(statistics(), segments) == 0


def test_a_pair_of_ranks_is_ks_first() -> None:
    assert [s.rank for s in same_rank(statistics(), (384, 576), "f16", "f16")] == [384, 384]


def test_directions_of_k_do_the_work_of_both() -> None:
    """A score, a share of the sum and the way to the frame, for every head; stock ops take all directions."""
    segments = same_rank(statistics(), 256, "f16", "f16")
    work = decode_work(SHAPE, GROUPS, segments, 128, Attention(lead=128))
    assert work.multiply_adds == 256 * N_HEAD * N_LAYER * (2 + EMBD / 128)
    charge = work_charges(SHAPE, GROUPS, 128, Attention(lead=128), 512)[0, "k"]
    assert charge.within == charge.beyond > 0
    assert set(work_charges(SHAPE, GROUPS, 128, Attention(), 512)) >= {(0, "k"), (1, "k")}


def test_without_the_models_file() -> None:
    shape = known_shape(None, SHAPE.embd_k, SHAPE.embd_v)
    assert (shape.head_k, shape.head_v) == (EMBD, EMBD)
    assert mean_bytes(shape) == mean_bytes(SHAPE)
