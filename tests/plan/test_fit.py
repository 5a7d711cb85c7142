"""The longest context and the largest cache that fit, over sizes that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xkv_gguf.plan.fit import SOLVE_BYTES, Taken, largest_budget, longest, renewal_bytes
from xkv_gguf.plan.segments import Segment
from xkv_gguf.plan.sizes import CTX_STEP, ModelShape

MOST = 1 << 20


def line(n_ctx: int) -> int:
    return 5_000_000 + 700 * n_ctx


def stairs(n_ctx: int) -> int:
    return 5_000_000 + 9_000_000 * (n_ctx // 7168)


def cliff(n_ctx: int) -> int:
    return 1000 + n_ctx + (n_ctx > 5000) * 10**9


class Counted:
    """A size that counts how often it is asked for."""

    def __init__(self, size: Callable[[int], int | None]) -> None:
        self.size, self.calls = size, 0

    def __call__(self, n_ctx: int) -> int | None:
        self.calls += 1
        return self.size(n_ctx)


@pytest.mark.parametrize("size", [line, stairs, cliff])
@pytest.mark.parametrize("memory", [5_500_000, 50_000_000, 350_000_000])
def test_the_longest_is_the_last_step_that_fits(size: Callable[[int], int], memory: int) -> None:
    found = longest(size, memory, MOST)
    assert found is not None and found % CTX_STEP == 0
    assert size(found) <= memory
    assert found == MOST or size(found + CTX_STEP) > memory


def test_straight_lines_take_few_sizes() -> None:
    size = Counted(line)
    longest(size, 350_000_000, MOST)
    assert size.calls <= 6


def test_steps_take_no_more_than_halving_some_times() -> None:
    size = Counted(cliff)
    assert longest(size, 10**6, MOST) == 4864
    assert size.calls <= 60


def test_enough_is_enough() -> None:
    size = Counted(line)
    assert longest(size, 10**12, 131000) == 131072
    assert size.calls == 2


def test_nothing_fits() -> None:
    assert longest(line, 5_000_000, MOST) is None


def test_short_contexts_can_be_out_of_reach() -> None:
    def size(n_ctx: int) -> int | None:
        return line(n_ctx) if n_ctx >= 2048 else None

    assert longest(size, line(4096), MOST) == 4096
    assert longest(size, line(2048) - 1, MOST) is None
    assert longest(lambda n_ctx: None, 10**9, MOST) is None


def test_the_budget_is_what_is_left() -> None:
    """What is beside the cache grows with it, and a plan takes a little less than its budget."""
    asked = []

    def take(budget: int) -> tuple[int, int]:
        asked.append(budget)
        cache = budget // 1000 * 1000
        return cache, cache + 50_000 + cache // 10

    found = largest_budget(take, 200_000, 10**6)
    assert found is not None and found == asked[-1]
    assert 0.97 * 200_000 <= take(found)[1] <= 200_000


def test_a_budget_has_an_end() -> None:
    def take(budget: int) -> tuple[int, int]:
        return budget, budget + 50_000

    assert largest_budget(take, 10**9, 10**6) == 10**6
    assert largest_budget(take, 50_000, 10**6) is None


def test_a_smaller_cache_can_have_less_beside_it() -> None:
    def take(budget: int) -> tuple[int, int]:
        return budget, budget + 1000 + (budget > 300) * 500

    assert largest_budget(take, 1200, 1000) == 200


def test_what_is_out_of_reach_is_left_to_the_caller() -> None:
    def take(budget: int) -> tuple[int, int]:
        if budget < 500:
            raise ValueError(budget)
        return budget, budget + 100

    with pytest.raises(ValueError, match="300"):
        largest_budget(take, 400, 1000)


def test_renewals_are_two_f32_bases_of_the_widest_group_and_eigenproblems() -> None:
    shape = ModelShape((64,) * 3, (64,) * 3, (64,) * 3, 32, 32)
    stage = tuple(Segment(g, kind, 32, "q8_0", "q8_0") for g in (0, 1) for kind in ("k", "v"))
    full = (*stage[:3], Segment(1, "v", 96, "q8_0", "q8_0"))
    assert renewal_bytes(shape, ((0, 1), (2,)), [stage]) == SOLVE_BYTES + 8 * 2 * 32 * 128
    assert renewal_bytes(shape, ((0,), (1, 2)), [stage, full]) == SOLVE_BYTES + 8 * (32 + 96) * 128


def test_sums() -> None:
    taken = Taken(100, 20, 3, 4)
    assert (taken.allocated, taken.total) == (123, 127)
