"""Coefficient types in numpy: what a value is after it was stored. q2_0 and q1_0 as the native library encodes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

F32 = npt.NDArray[np.float32]


def stored(values: F32, type_name: str) -> F32:
    """Values after a round trip through a type; each row is a multiple of its block."""
    if type_name == "f32":
        return values
    if type_name == "f16":
        return values.astype(np.float16).astype(np.float32)
    if type_name == "q2_0":
        return _two_bits(values.reshape(-1, 64)).reshape(values.shape)
    if type_name == "q1_0":
        blocks = values.reshape(-1, 128)
        size = _half(np.abs(blocks).mean(axis=1, keepdims=True))
        signed: F32 = np.where(blocks >= 0, size, -size).astype(np.float32).reshape(values.shape)
        return signed
    kind = GGMLQuantizationType[type_name.upper()]
    result: F32 = dequantize(quantize(values, kind), kind)
    return result


def _two_bits(blocks: F32) -> F32:
    """Levels -1, 0, 1, 2 times d, with the d, of either sign, that has the least error."""
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    best: Any = None
    best_error = np.full((len(blocks), 1), np.inf)
    for step in np.linspace(0.2, 0.9, 71):
        for sign in (-1.0, 1.0):
            d = _half(sign * step * peak)
            safe = np.where(d == 0, 1, d)
            found = d * np.clip(np.round(blocks / safe), -1, 2)
            error = ((found - blocks) ** 2).sum(axis=1, keepdims=True)
            best = found if best is None else np.where(error < best_error, found, best)
            best_error = np.minimum(error, best_error)
    return np.asarray(best, dtype=np.float32)


def _half(values: Any) -> Any:
    return values.astype(np.float16).astype(np.float32)
