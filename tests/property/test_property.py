"""Random operations: an xkv cache of full rank goes on as a plain cache does, whatever was done to both."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ..native.harness import F32, lib
from . import pair, rig
from .options import FAMILIES
from .pair import LIMITS, STORED, Pair, Row
from .run import run

N_SEQUENCE = 16
"""Of each family; `make test-property` runs 10 000."""
MOST_SEEDS = 4
N_UNTIL_FOUND = 100

ALL = {"decode", "remove", "copy", "keep", "clear", "save", "load", STORED}
MOVED = {"shift", "copy of a part"}
OPERATIONS = {
    "gqa": ALL | MOVED | {"divide"},
    "hybrid": ALL,
    "windowed": ALL | MOVED,
    "latents": ALL | MOVED | {"divide"},
}
"""That are done in every family."""


@pytest.fixture(autouse=True, scope="module")
def closed() -> Iterator[None]:
    yield
    rig.close_rig()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_cache(family: str) -> None:
    """Seeds of a few sequences each, until every operation was done."""
    before = rig.rig().tally.done.copy()
    done: Counter[str] = Counter()
    for number in range(MOST_SEEDS):
        run(family, number, N_SEQUENCE, few=True)
        done = rig.rig().tally.done - before
        if set(done) >= OPERATIONS[family]:
            return
    pytest.fail(f"{OPERATIONS[family] - set(done)} were never done: {done}")


@pytest.mark.parametrize("words", LIMITS.values(), ids=LIMITS)
def test_limits_are_those_of_the_library(words: tuple[str, ...], repo_root: Path) -> None:
    """A text that is no more would let nothing through, and nobody would see it."""
    text = "".join(path.read_text() for path in sorted((repo_root / "native").rglob("*.cpp")))
    text = re.sub(r'"\n\s*"', "", text)
    assert re.search(r"%\w+".join(map(re.escape, words)), text), words


def other_token(patch: pytest.MonkeyPatch) -> None:
    """Read by xkv in place of one in a hundred."""
    plain_run = Pair._run

    def changed(self: Pair, ctx: Any, rows: list[Row]) -> tuple[int, F32]:
        if ctx is self.xkv:
            rows = [replace(row, number=row.number + (row.number % 100 == 99)) for row in rows]
        return plain_run(self, ctx, rows)

    patch.setattr(Pair, "_run", changed)


def kept_position(patch: pytest.MonkeyPatch) -> None:
    """The last one of a part that is removed."""
    remove = lib.llama_memory_seq_rm
    patch.setattr(lib, "llama_memory_seq_rm", lambda mem, seq, p0, p1: remove(mem, seq, p0, p1 - (p1 > 0)))


def lost_copy(patch: pytest.MonkeyPatch) -> None:
    """By xkv, which copies after the plain cache does."""
    copy, calls = lib.llama_memory_seq_cp, itertools.count()
    patch.setattr(lib, "llama_memory_seq_cp", lambda *given: copy(*given) if next(calls) % 2 == 0 else None)


def lost_state(patch: pytest.MonkeyPatch) -> None:
    """States of all sequences are not loaded, and those of one are."""
    load = pair.load
    patch.setattr(pair, "load", lambda ctx, data, seq: load(ctx, data, seq) if seq is not None else True)


def lost_directions(patch: pytest.MonkeyPatch) -> None:
    """32 of each basis."""
    cache_params = rig.cache_params

    def changed(*given: Any) -> Any:
        params = cache_params(*given)
        return replace(params, segments=tuple(replace(s, rank=s.rank - 32) for s in params.segments))

    patch.setattr(rig, "cache_params", changed)


FAULTS = (other_token, kept_position, lost_copy, lost_state, lost_directions)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    rig.close_rig()
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        run("gqa", 1, N_UNTIL_FOUND, few=True, shrink=False)
    rig.close_rig()
