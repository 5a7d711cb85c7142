"""What a conversion takes, told and checked before it begins: memory beside the model, and time.

Memory is bounded by doing less at a time: fewer sequences side by side, sums of fewer groups in one run over the text,
fewer eigenproblems. What is left is the bases, at least one group's sums, and one eigenproblem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from xkv_gguf.base.memory import free_memory
from xkv_gguf.base.text import format_bytes
from xkv_gguf.convert.engine import Engine
from xkv_gguf.errors import OutOfMemoryError
from xkv_gguf.plan.groups import LayerGroups
from xkv_gguf.plan.segments import KINDS
from xkv_gguf.plan.sizes import padded_ctx

KV_BYTES = 768 << 20
"""Most that the cache of the sequences side by side takes, where two of them fit."""

SUM_BYTES = 9 << 28
"""Most that the sums of one run over the text take, where one group's fit."""

SOLVE_BYTES = 5 << 28
"""Most that eigenproblems in work take, where one fits."""

FIXED_BYTES = 512 << 20
"""Compute buffers of the model, and what Python's libraries take."""

FLOPS = 15e9
"""Of one thread in matrix products and in an eigenproblem's; roughly."""

F16, F32, F64 = 2, 4, 8


def sum_bytes(dim: int) -> int:
    """Bytes of the native sums of one kind of one group: half a matrix."""
    return F32 * dim * (dim + 1) // 2


def solve_bytes(dim: int) -> int:
    """Bytes of an eigenproblem in work: covariance, LAPACK's copy, and its work space of two matrices and more."""
    return 5 * F64 * dim * dim


def n_solvers(widest: int, threads: int) -> int:
    """Eigenproblems to solve at a time, of groups of at most `widest` numbers."""
    return max(1, min(threads, SOLVE_BYTES // solve_bytes(widest)))


def split_runs(groups: LayerGroups) -> Iterator[range]:
    """Consecutive groups whose sums fit into memory together, at least one at a time."""
    start, taken = 0, 0
    for g in range(len(groups.layers)):
        own = sum(sum_bytes(groups.dims[kind][g]) for kind in KINDS)
        if g > start and taken + own > SUM_BYTES:
            yield range(start, g)
            start, taken = g, 0
        taken += own
    yield range(start, len(groups.layers))


@dataclass(frozen=True)
class Work:
    """What a conversion does, as far as its time and memory depend on it.

    Attributes
    ----------
    groups : LayerGroups
        As they are captured.
    threads : int
    n_seq, n_len : int
        Sequences side by side, tokens of each.
    n_token : int
        Calibration tokens.
    n_weigh : int
        Tokens that are run for weights.
    keep_sums : bool
        Whether the sums of all groups are kept until layers are weighed.
    """

    groups: LayerGroups
    threads: int
    n_seq: int
    n_len: int
    n_token: int
    n_weigh: int
    keep_sums: bool

    @property
    def dims(self) -> list[int]:
        """Numbers per token of K and of V of all groups."""
        return [dim for kind in KINDS for dim in self.groups.dims[kind] if dim > 0]

    def memory(self) -> int:
        """Bytes beside the model, at most."""
        numbers = sum(map(sum, self.groups.embd.values()))
        cache = F16 * numbers * self.n_seq * padded_ctx(self.n_len)
        sums = max(
            sum(sum_bytes(self.groups.dims[k][g]) for k in KINDS for g in run) for run in split_runs(self.groups)
        )
        widest = max(self.dims)
        bases = sum(F16 * dim * dim for dim in self.dims)
        whole = sum(F64 * dim * dim for dim in self.dims) if self.keep_sums else 0
        # a basis takes the place of its sums, which are not smaller
        several = len(list(split_runs(self.groups))) > 1
        solving = n_solvers(widest, self.threads) * solve_bytes(widest) + F64 * widest * widest
        return FIXED_BYTES + whole + max(cache + sums + bases * several, max(bases, sums) + solving)

    def seconds(self, rate: float) -> float:
        """Time, about, for a model that runs `rate` tokens in a second."""
        n_run = len(list(split_runs(self.groups)))
        products = sum(2.0 * dim * dim * self.n_token for dim in self.dims)
        problems = sum(9.0 * dim**3 for dim in self.dims)
        solving = problems / n_solvers(max(self.dims), self.threads) + products / self.threads
        return (self.n_token * n_run + self.n_weigh) / rate + solving / FLOPS

    def check_memory(self, model: Path) -> None:
        """Refuse what does not fit.

        Raises
        ------
        OutOfMemoryError
            More is needed than is free.
        """
        needed, free = self.memory(), free_memory()
        if free is not None and needed > free:
            raise OutOfMemoryError(
                f"model {model}: calibration takes {format_bytes(needed)} beside the model, {format_bytes(free)} are "
                "free; a smaller --group-size, or --weigh none, takes less"
            )

    def told(self, rate: float) -> str:
        """The line that says what a conversion takes."""
        return (
            f"calibration takes {format_time(self.seconds(rate))}, about, at {rate:.0f} tokens a second, and at most "
            f"{format_bytes(self.memory())} beside the model"
        )


N_TRY = 5
"""Batches that are timed at most. Others on the machine only ever slow one down, so that the fastest one counts."""

TRY_SECONDS = 2.0
"""Time after which no further one is timed."""


def measure_rate(engine: Engine, n_seq: int) -> float:
    """Tokens that the model runs in a second: the fastest of a few short batches, after a first one that warms up."""
    engine.open_context(n_seq, N_TRY + 1)
    token = engine.bos() or [0]
    fastest = math.inf
    first = perf_counter()
    for position in range(N_TRY + 1):
        start = perf_counter()
        engine.decode(token * n_seq, range(n_seq), [position] * n_seq, outputs=True)
        engine.logits(n_seq)
        end = perf_counter()
        if position > 0:
            fastest = min(fastest, end - start)
            if end - first > TRY_SECONDS:
                break
    engine.close_context()
    return n_seq / fastest


def format_time(seconds: float) -> str:
    """A time for people: "40 s", "3 minutes", "2.5 hours"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
