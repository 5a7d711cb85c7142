"""Neighbouring layers merged without a low-rank form, as a baseline: MiniCache (Liu et al. 2024, arXiv 2405.14366).

Of each pair of layers from the middle of the model on, a token keeps one direction, between those of the two layers,
and both lengths (section 4.2); the tokens whose directions are farthest apart stay as they are (section 4.3). It is
done to what an f16 cache holds after the prompt, so it shows what is lost and computes what would be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..plan.segments import KINDS
from ..report import KvPart, KvReport

if TYPE_CHECKING:
    from ..llama import Llama

F32 = npt.NDArray[np.float32]

MIDDLE = 0.6
"""Where the merged direction lies between the first layer's (0) and the second's (1)."""

KEPT = 0.05
"""Share of the range of angles, at its wide end, within which tokens stay as they are."""

FRAME = 64


@dataclass
class _Bytes:
    """f16 numbers that the merged layers would keep, and those they have."""

    kept: float = 0.0
    plain: int = 0


def merge(first: F32, second: F32) -> tuple[F32, F32, npt.NDArray[np.bool_]]:
    """What two layers read back after they were merged.

    Parameters
    ----------
    first, second : array, shape (n, D)
        K or V of both layers.

    Returns
    -------
    tuple of two arrays of shape (n, D), and of n bools
        The layers, and which tokens stayed as they are.
    """
    length = np.linalg.norm(first, axis=1, keepdims=True), np.linalg.norm(second, axis=1, keepdims=True)
    a, b = first / np.maximum(length[0], 1e-12), second / np.maximum(length[1], 1e-12)
    angle = np.arccos(np.clip((a * b).sum(1, keepdims=True), -1.0, 1.0))
    sine = np.sin(angle)
    near = sine < 1e-4
    arc = (np.sin((1 - MIDDLE) * angle) * a + np.sin(MIDDLE * angle) * b) / np.where(near, 1.0, sine)
    between = np.where(near, (1 - MIDDLE) * a + MIDDLE * b, arc)
    far = angle[:, 0] >= angle.max() - KEPT * (angle.max() - angle.min())
    return (
        np.where(far[:, None], first, length[0] * between).astype(np.float32),
        np.where(far[:, None], second, length[1] * between).astype(np.float32),
        far,
    )


class MergedLayers:
    """Merges the layers of an f16 cache; call it when the prompt was read.

    Parameters
    ----------
    llm : Llama
        With kv_mode f16.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._bytes = _Bytes()

    def __call__(self) -> None:
        """Exchange K and V of the tokens in the cache for what is left of them."""
        from ..convert.capture import Capture
        from ..runtime.shape import model_shape

        shape = model_shape(self._llm._model.model)
        layers = shape.layers
        dims: Any = {"k": [shape.embd_k[il] for il in layers], "v": [shape.embd_v[il] for il in layers]}
        context: Any = _Context(self._llm)
        n = self._llm.n_tokens
        with Capture(context, [[il] for il in layers], dims, FRAME, 0) as capture:
            for kind in KINDS if any(dims["v"]) else KINDS[:1]:  # V that is a part of K goes with it
                for g in _pairs(len(layers)):
                    pair = capture.get(0, g, kind, 0, n), capture.get(0, g + 1, kind, 0, n)
                    *merged, far = merge(*pair)
                    for place, x in enumerate(merged):
                        capture.put(0, g + place, kind, 0, x)
                    n_far = int(far.sum())
                    self._bytes.plain += 2 * n * dims[kind][g]
                    self._bytes.kept += (n - n_far) * (dims[kind][g] + 2) + 2 * n_far * dims[kind][g]

    def report(self, report: KvReport) -> KvReport:
        """The report of the f16 cache with the bytes that its tokens would take merged."""
        n_plain = sum(part.bytes for part in report.parts) / 2 / report.n_ctx * self._llm.n_tokens
        share = 1.0 - (self._bytes.plain - self._bytes.kept) / n_plain
        return replace(report, parts=tuple(KvPart(part.name, int(part.bytes * share)) for part in report.parts))


class _Context:
    """What capture needs of an engine."""

    def __init__(self, llm: Llama) -> None:
        import ctypes

        self.context_pointer = ctypes.cast(llm._ctx.ctx, ctypes.c_void_p).value


def _pairs(n_layer: int) -> Sequence[int]:
    """The first of each pair of neighbours, from the middle on."""
    return range(n_layer - n_layer // 2 // 2 * 2, n_layer - 1, 2)
