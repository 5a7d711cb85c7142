"""States of contexts through llama.cpp's C API."""

from __future__ import annotations

import ctypes

from .harness import Context, lib


def save(ctx: Context, seq: int | None = None) -> bytes:
    """All sequences, or one."""
    size = lib.llama_state_get_size(ctx.ptr) if seq is None else lib.llama_state_seq_get_size(ctx.ptr, seq)
    data = (ctypes.c_uint8 * size)()
    if seq is None:
        n = lib.llama_state_get_data(ctx.ptr, data, size)
    else:
        n = lib.llama_state_seq_get_data(ctx.ptr, data, size, seq)
    assert n > 0
    return bytes(data[:n])


def load(ctx: Context, data: bytes, seq: int | None = None) -> bool:
    """Whether it was taken."""
    given = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    if seq is None:
        return bool(lib.llama_state_set_data(ctx.ptr, given, len(data)) == len(data))
    return bool(lib.llama_state_seq_set_data(ctx.ptr, given, len(data), seq) == len(data))
