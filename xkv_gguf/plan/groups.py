"""Groups of consecutive layers that share coefficients, and the chunks that their keys are rotated by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError
from .segments import Kind

GROUP_SIZE = 5
MAX_DIM = 4096
"""Most numbers per token of a group by default: the work of a basis grows with their cube, its bytes by the square."""

FRAME = 64
WIDE_FRAME = 128
WIDE_HEAD = 96
"""Numbers of a head beyond which chunks are `WIDE_FRAME` tokens: queries are turned and projected once per chunk, which
is ``head / frame`` of the work of scores; longer frames make keys harder to compress."""

FRAMES = (32, 64, 128, 256)
"""Chunk lengths that a cache can have, in tokens."""


def default_frame(head_k: int) -> int:
    """Tokens per chunk for heads of `head_k` numbers of K."""
    return FRAME if head_k <= WIDE_HEAD else WIDE_FRAME


def default_group_size(embd_k: Sequence[int], embd_v: Sequence[int]) -> int:
    """Most layers in a group for layers of these K and V numbers per token: `GROUP_SIZE`, fewer where they are wide."""
    widest = max(*embd_k, *embd_v)
    return max(1, min(GROUP_SIZE, len(embd_k), MAX_DIM // widest))


def group_layers(n_layer: int, group_size: int) -> tuple[list[int], list[int]]:
    """Split layers into consecutive groups of at most `group_size`, as even as can be.

    Returns
    -------
    first, count : list of int
        First layer and number of layers of each group. 32 layers in groups of 5 give 5 5 5 5 4 4 4.

    Raises
    ------
    OptionError
        `group_size` is not in 1 .. `n_layer`.
    """
    if not 1 <= group_size <= n_layer:
        raise OptionError(f"group size {group_size}: 1 to {n_layer} (the model's layers) expected")
    n_group = -(-n_layer // group_size)
    small, extra = divmod(n_layer, n_group)
    count = [small + (i < extra) for i in range(n_group)]
    first = [sum(count[:i]) for i in range(n_group)]
    return first, count


@dataclass(frozen=True)
class LayerGroups:
    """Consecutive groups of layers, and the numbers per token of groups and of layers by kind."""

    first: list[int]
    count: list[int]
    dims: dict[Kind, list[int]]
    embd: dict[Kind, tuple[int, ...]]

    @classmethod
    def of(cls, first: list[int], count: list[int], embd_k: Sequence[int], embd_v: Sequence[int]) -> LayerGroups:
        """Add up the dimensions."""

        def dims(embd: Sequence[int]) -> list[int]:
            return [sum(embd[f : f + c]) for f, c in zip(first, count, strict=True)]

        return cls(first, count, {"k": dims(embd_k), "v": dims(embd_v)}, {"k": tuple(embd_k), "v": tuple(embd_v)})

    @property
    def layers(self) -> list[range]:
        """Layers of each group."""
        return [range(f, f + c) for f, c in zip(self.first, self.count, strict=True)]

    def name(self, group: int) -> str:
        """Layers of a group for people: "0-4"."""
        return f"{self.first[group]}-{self.first[group] + self.count[group] - 1}"
