from __future__ import annotations

import numpy as np
import pytest

from xkv_gguf.convert import plan
from xkv_gguf.convert.sizes import CacheLayout, GroupShape, coef_bytes_per_token, plain_bytes_per_token, predict_parts
from xkv_gguf.errors import OptionError


def spectrum(dim: int, decay: float) -> plan.Spectrum:
    values: plan.Spectrum = np.exp(-decay * np.arange(dim))
    return values


def test_groups_are_even_and_cover_all_layers() -> None:
    assert plan.group_layers(32, 5) == ([0, 5, 10, 15, 20, 24, 28], [5, 5, 5, 5, 4, 4, 4])
    assert plan.group_layers(30, 5) == ([0, 5, 10, 15, 20, 25], [5] * 6)
    assert plan.group_layers(3, 3) == ([0], [3])


@pytest.mark.parametrize("size", [0, -1, 31])
def test_impossible_group_size(size: int) -> None:
    with pytest.raises(OptionError, match=f"group size {size}: 1 to 30"):
        plan.group_layers(30, size)


def test_rank_goes_where_the_energy_is() -> None:
    flat, steep = spectrum(256, 0.001), spectrum(256, 0.2)
    rank_k, rank_v = plan.plan_ranks([steep, flat], [flat, steep], 3.0, 1.0625, 1.0625)
    assert rank_k[0] == rank_v[1] <= 64
    assert rank_k[1] > 96
    assert rank_v[0] > 96


@pytest.mark.parametrize("ratio", [2.0, 3.7, 5.0, 11.0])
@pytest.mark.parametrize("types", [("q8_0", "q8_0"), ("f16", "q4_0")])
def test_budget_is_kept_and_used(ratio: float, types: tuple[str, str]) -> None:
    rng = np.random.default_rng(1)
    spectra = [np.sort(rng.exponential(size=320))[::-1] for _ in range(6)]
    bpc_k, bpc_v = (plan.bytes_per_coef(t) for t in types)
    rank_k, rank_v = plan.plan_ranks(spectra[:3], spectra[3:], ratio, bpc_k, bpc_v)
    spent = sum(rank_k) * bpc_k + sum(rank_v) * bpc_v
    budget = 2.0 * 320 * 6 / ratio
    assert spent <= budget * (1 + 1e-9)
    assert spent > budget - 32 * max(bpc_k, bpc_v)
    assert all(r % 32 == 0 and 32 <= r <= 320 for r in rank_k + rank_v)


def test_greedy_is_optimal_on_a_small_case() -> None:
    rng = np.random.default_rng(2)
    spectra = [np.sort(rng.exponential(size=96))[::-1] for _ in range(4)]
    rank_k, rank_v = plan.plan_ranks(spectra[:2], spectra[2:], 3.0, 1.0, 1.0)
    budget = sum(rank_k) + sum(rank_v)
    kept = sum(plan.energy_kept(s, r) for s, r in zip(spectra, rank_k + rank_v, strict=True))
    steps = [32, 64, 96]
    best = max(
        sum(plan.energy_kept(s, r) for s, r in zip(spectra, ranks, strict=True))
        for ranks in np.array(np.meshgrid(steps, steps, steps, steps)).reshape(4, -1).T.tolist()
        if sum(ranks) <= budget
    )
    assert kept == pytest.approx(best)


def test_dimension_that_is_no_multiple_of_32() -> None:
    rank_k, rank_v = plan.plan_ranks([spectrum(80, 0.01)], [spectrum(24, 0.01)], 1.0, 2.0, 2.0)
    assert (rank_k, rank_v) == ([80], [24])


@pytest.mark.parametrize("ratio", [1.8, 60.3, 0.0, -1.0, float("nan"), float("inf")])
def test_ratio_that_cannot_be_met(ratio: float) -> None:
    with pytest.raises(OptionError, match=r"1\.883 \(full rank\) to 56\.470 \(rank 32 everywhere\)"):
        plan.plan_ranks([spectrum(960, 0.01)], [spectrum(960, 0.01)], ratio, 34 / 32, 34 / 32)


def test_printed_ends_of_the_range_work() -> None:
    spectra = [spectrum(960, 0.01)]
    assert plan.plan_ranks(spectra, spectra, 1.883, 34 / 32, 34 / 32)[0][0] >= 928
    assert plan.plan_ranks(spectra, spectra, 56.470, 34 / 32, 34 / 32) == ([32], [32])


def test_zero_spectrum_keeps_everything() -> None:
    assert plan.energy_kept(np.zeros(64), 32) == 1.0
    assert plan.plan_ranks([np.zeros(64)], [spectrum(64, 1.0)], 4 / 3, 2.0, 2.0) in (([32], [64]), ([64], [32]))


def test_check_rank() -> None:
    plan.check_rank(64, 96, "rank")
    plan.check_rank(80, 80, "rank")
    for rank in (0, -32, 33, 112):
        with pytest.raises(OptionError, match=f"rank {rank}: a multiple of 32 below 96, or 96"):
            plan.check_rank(rank, 96, "rank")


def test_unknown_coefficient_type() -> None:
    with pytest.raises(OptionError, match="'q3_k': one of f32, f16, q8_0"):
        plan.bytes_per_coef("q3_k")


def test_sizes_by_hand() -> None:
    groups = [GroupShape(dim_k=64, dim_v=32, rank_k=32, rank_v=32)]
    layout = CacheLayout(n_sink=4, n_window=60, n_block=64, n_ubatch=120, frame=32)
    assert plain_bytes_per_token([32, 32], [16, 16], "f16") == 192
    assert coef_bytes_per_token(groups, "q8_0", "q8_0") == 68
    assert predict_parts(groups, layout, 1024) == {
        "K coefficients": 34 * 1024,
        "V coefficients": 34 * 1024,
        "bases and means": 4 * 64 * 36 + 2 * 32 * 32 + 4 * 96,
        "sinks and window": 2 * 96 * 256,
    }
