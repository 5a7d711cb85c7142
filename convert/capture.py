"""Chunk-frame K and V of a plain cache, by the native library: their Gram sums, and they themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from xkv_gguf.convert.engine import Engine
from xkv_gguf.plan.segments import KINDS, Kind
from xkv_gguf.runtime import native

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Sums over tokens of one kind of one group: x x^T in `gram` (D, D), x in `total` (D,)."""

    gram: F64
    total: F64
    n_tokens: int

    def cut(self, part: slice) -> Sums:
        """Sums of a part of the numbers."""
        if part == slice(0, len(self.total)):
            return self
        return Sums(np.ascontiguousarray(self.gram[part, part]), self.total[part].copy(), self.n_tokens)


class Capture:
    """Sums over everything that was added so far. Their size does not depend on the number of tokens.

    Parameters
    ----------
    engine : Engine
        With an open context.
    layers : sequence of sequence of int
        Of each group, ascending.
    dims : dict of str to sequence of int
        Numbers per token of each group, by kind.
    frame, n_sink : int
        Chunk length of the keys' frame; first tokens of each sequence that are left out.
    """

    def __init__(
        self,
        engine: Engine,
        layers: Sequence[Sequence[int]],
        dims: dict[Kind, list[int]],
        frame: int,
        n_sink: int,
    ) -> None:
        self._api = native.native()
        self._dims = dims
        out = self._api.ffi.new("struct xkv_capture **")
        lists = native.layer_lists(self._api, layers)
        status = self._api.lib.xkv_capture_new(
            self._api.context(engine.context_pointer), *lists, len(layers), frame, n_sink, out
        )
        native.check_status(status)
        self._capture: Any = out[0]

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._api.lib.xkv_capture_free(self._capture)
        self._capture = self._api.ffi.NULL

    def add(self, seq: int) -> None:
        """Add the tokens that a sequence holds in the cache now."""
        native.check_status(self._api.lib.xkv_capture_add(self._capture, seq))

    def read(self, group: int, kind: Kind) -> Sums:
        """Sums so far of one kind of one group; the context may be gone."""
        dim = self._dims[kind][group]
        gram, total = np.empty((dim, dim)), np.empty(dim)
        n_tokens = self._api.ffi.new("uint64_t *")
        status = self._api.lib.xkv_capture_read(
            self._capture,
            group,
            KINDS.index(kind),
            self._api.ffi.cast("double *", gram.ctypes.data),
            self._api.ffi.cast("double *", total.ctypes.data),
            n_tokens,
        )
        native.check_status(status)
        return Sums(gram, total, int(n_tokens[0]))

    def drop(self, group: int, kind: Kind) -> None:
        """Free the sums of one kind of one group."""
        native.check_status(self._api.lib.xkv_capture_drop(self._capture, group, KINDS.index(kind)))

    def get(self, seq: int, group: int, kind: Kind, pos: int, n: int) -> F32:
        """What the sums are of, shape (n, D): the numbers of the tokens at `pos` to `pos` + n - 1, sinks excluded."""
        x = np.empty((n, self._dims[kind][group]), np.float32)
        pointer = self._api.ffi.cast("float *", x.ctypes.data)
        where = (seq, group, KINDS.index(kind), pos, n)
        native.check_status(self._api.lib.xkv_capture_get(self._capture, *where, pointer))
        return x

    def put(self, seq: int, group: int, kind: Kind, pos: int, x: F32) -> None:
        """Write other numbers into the cache, see `get`; it rounds them to its type."""
        x = np.ascontiguousarray(x, np.float32)
        pointer = self._api.ffi.cast("float *", x.ctypes.data)
        where = (seq, group, KINDS.index(kind), pos, len(x))
        native.check_status(self._api.lib.xkv_capture_put(self._capture, *where, pointer))
