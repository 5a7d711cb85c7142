from __future__ import annotations

import numpy as np
import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.plan.group_choice import Candidate, choose, within_reach
from xkv_gguf.plan.groups import LayerGroups, group_layers
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.plan.sizes import (
    ModelShape,
)
from xkv_gguf.plan.wishes import Wishes


def candidates(sizes: list[int], n_layer: int = 12) -> tuple[ModelShape, list[Candidate]]:
    whole = ModelShape((32,) * n_layer, (64,) * n_layer, (64,) * n_layer, 32, 32)
    captured = LayerGroups.of(group_layers(range(n_layer), sizes[-1]), whole.embd_k, whole.embd_v)
    return whole, [Candidate.of(size, captured, whole) for size in sizes]


def test_smaller_groups_lie_inside_captured_ones() -> None:
    _, (two, five, ten) = candidates([2, 5, 10], 32)
    for found, n in ((ten, 8), (five, 4), (two, 2)):
        assert found.groups.layers == tuple(tuple(range(il, il + n)) for il in range(0, 32, n))
    assert five.inside == (0, 0, 1, 1, 2, 2, 3, 3)
    assert five.start == {"k": (0, 128) * 4, "v": (0, 256) * 4}


def test_sums_are_cut_out_of_those_that_were_captured() -> None:
    from xkv_gguf.convert.capture import Sums

    _, (two, four) = candidates([2, 4], 4)
    x = np.random.default_rng(0).standard_normal((50, 4 * 32))
    sums = Sums(x.T @ x, x.sum(0), 50)
    part = sums.cut(two.part(1, "k"))
    np.testing.assert_allclose(part.gram, x[:, 64:].T @ x[:, 64:])
    np.testing.assert_allclose(part.total, x[:, 64:].sum(0))
    assert sums.cut(four.part(0, "k")) is sums


def test_the_smallest_size_near_the_best_is_chosen() -> None:
    assert choose({2: 0.30, 5: 0.12, 10: 0.10}) == 5
    assert choose({2: 0.11, 5: 0.12, 10: 0.10}) == 2
    assert choose({2: 0.30, 5: 0.20, 10: 0.10}) == 10


def test_candidates_that_cannot_meet_the_size_target_are_left_out() -> None:
    whole, found = candidates([2, 4, 12])
    # few large groups need fewer bytes at least
    kept = within_reach(found, whole, Wishes(8192, SizeTarget("coef_ratio", "25")), 64)
    assert 0 < len(kept) < 3
    with pytest.raises(OptionError, match="out of reach"):
        within_reach(found, whole, Wishes(8192, SizeTarget("coef_ratio", "900")), 64)
