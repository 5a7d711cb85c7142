"""The context of llama_cpp with failures that say why."""

from __future__ import annotations

import os
from typing import Any

from ..errors import DecodeError, OutOfMemoryError
from . import native
from .api import internals, llama_cpp

# what llama_decode returns when no cells are left, and when a buffer cannot be allocated
STATUS_FULL = 1
STATUS_ALLOC = -2


class CheckedContext(internals.LlamaContext):
    """`llama_cpp`'s context; an operation that the cache refuses raises instead of passing unnoticed.

    An object of the parent class becomes one by `take`: `llama_cpp.Llama` makes its context itself.

    Attributes
    ----------
    pid : int
        The process that made it. One forked from it has no threads to compute with.
    """

    pid: int

    @classmethod
    def take(cls, context: Any) -> None:
        """Make an object of the parent class one of this class."""
        context.__class__ = cls
        context.pid = os.getpid()

    def decode(self, batch: Any) -> None:
        """Evaluate a batch.

        Raises
        ------
        DecodeError
            The context is full, a token does not exist, the cache refused, or this is a forked process.
        OutOfMemoryError
            There is no memory for it.
        """
        if os.getpid() != self.pid:
            raise DecodeError(
                f"process {os.getpid()} was forked from {self.pid}, which made this Llama; make one after the fork"
            )
        code = llama_cpp.llama_decode(self.ctx, batch.batch)
        if code == 0:
            return
        refusal = native.take_refusal(self.ctx)
        if code == STATUS_ALLOC and refusal is None:
            refusal = OutOfMemoryError("out of memory")
        why = str(refusal) if refusal else f"status {code}"
        if code == STATUS_FULL:
            why = f"the context of {self.n_ctx()} tokens is full"
        kind = OutOfMemoryError if isinstance(refusal, OutOfMemoryError) else DecodeError
        raise kind(f"a batch of {batch.n_tokens()} tokens cannot be evaluated: {why}")

    def kv_cache_clear(self) -> None:
        """Empty the cache."""
        super().kv_cache_clear()  # type: ignore[no-untyped-call]
        self._raise_refusal()

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Remove the positions p0 to p1 - 1 of a sequence; False where the model cannot take back that much."""
        removed = bool(super().kv_cache_seq_rm(seq_id, p0, p1))
        if not removed:
            self._raise_refusal()
        return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        """Let a second sequence share positions of a first one."""
        super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)
        self._raise_refusal()

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        """Remove all sequences but one."""
        super().kv_cache_seq_keep(seq_id)
        self._raise_refusal()

    def kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """Move positions p0 to p1 - 1 of a sequence, as at a full context after others were removed."""
        super().kv_cache_seq_shift(seq_id, p0, p1, shift)
        self._raise_refusal()

    def _raise_refusal(self) -> None:
        refusal = native.take_refusal(self.ctx)
        if refusal:
            raise refusal
