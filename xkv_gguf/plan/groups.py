"""Groups of layers that share coefficients, and the chunks that their keys are rotated by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..errors import OptionError
from .segments import KINDS, Kind, Layers
from .sizes import ModelShape

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


def default_group_size(shape: ModelShape) -> int:
    """Most layers in a group: `GROUP_SIZE`, fewer where layers are wide."""
    widest = max(*shape.embd_k, *shape.embd_v)
    return max(1, min(GROUP_SIZE, len(shape.layers), MAX_DIM // widest))


def group_layers(layers: Sequence[int], group_size: int) -> tuple[Layers, ...]:
    """Split layers, in their order, into groups of at most `group_size`, as even as can be.

    32 layers in groups of 5 give 5 5 5 5 4 4 4.

    Raises
    ------
    OptionError
        `group_size` is not between 1 and the number of layers.
    """
    if not 1 <= group_size <= len(layers):
        raise OptionError(f"group size {group_size}: 1 to {len(layers)} (layers that the cache holds) expected")
    n_group = -(-len(layers) // group_size)
    small, extra = divmod(len(layers), n_group)
    ends = list(accumulate(small + (i < extra) for i in range(n_group)))
    return tuple(tuple(layers[a:b]) for a, b in zip([0, *ends], ends, strict=False))


def name_layers(layers: Sequence[int]) -> str:
    """Ascending layers for people: "0-4", or "3, 7, 11" where they are not consecutive."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


@dataclass(frozen=True)
class LayerGroups:
    """The layers of each group, ascending, and the numbers per token of groups and of layers by kind."""

    layers: tuple[Layers, ...]
    dims: dict[Kind, list[int]]
    embd: dict[Kind, tuple[int, ...]]

    @classmethod
    def of(cls, layers: Sequence[Layers], embd_k: Sequence[int], embd_v: Sequence[int]) -> LayerGroups:
        """Add up the dimensions."""

        def dims(embd: Sequence[int]) -> list[int]:
            return [sum(embd[il] for il in group) for group in layers]

        return cls(tuple(layers), {"k": dims(embd_k), "v": dims(embd_v)}, {"k": tuple(embd_k), "v": tuple(embd_v)})

    def kinds(self, group: int) -> tuple[Kind, ...]:
        """What is kept of a group: K, and V unless it is a part of K."""
        return tuple(kind for kind in KINDS if self.dims[kind][group] > 0)

    def sizes(self, group: int, kind: Kind) -> list[int]:
        """Numbers per token of each layer of a group."""
        return [self.embd[kind][il] for il in self.layers[group]]

    def name(self, group: int) -> str:
        """Layers of a group for people, see `name_layers`."""
        return name_layers(self.layers[group])
