"""On which device each layer is, and how groups of layers and borders between devices come together. Pure functions.

The coefficients of a group of layers are one tensor, and every layer of the group reads them: on another device, they
would travel there for every token. So a border between two devices has to be one between groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .segments import Layers

HOST = -1
"""Layers that are on no device of their own: the CPU's."""


@dataclass(frozen=True)
class Placement:
    """How a model's layers are divided.

    Attributes
    ----------
    n_layer : int
    n_gpu_layers : int
        The last so many layers are on devices; the output counts as one more.
    counts : tuple of int
        Of these, those of each device, in llama.cpp's order of devices.
    """

    n_layer: int
    n_gpu_layers: int
    counts: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first layer that is on a device."""
        return self.n_layer + 1 - self.n_gpu_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The device of each layer by its index, or HOST."""
        found = [HOST] * self.first
        for device, count in enumerate(self.counts):
            found += [device] * count
        return tuple(found[: self.n_layer])

    @property
    def borders(self) -> tuple[int, ...]:
        """The first layer of each device that has layers."""
        ends = accumulate((self.first, *self.counts[:-1]))
        return tuple(end for end, count in zip(ends, self.counts, strict=True) if count)


def place_layers(n_layer: int, n_gpu_layers: int, shares: Sequence[float]) -> Placement:
    """Divide layers as llama.cpp does (`llama_model_base::load_tensors`).

    Parameters
    ----------
    n_layer : int
    n_gpu_layers : int
        Layers that are on devices, counted from the end, the output included; below 0 all.
    shares : sequence of float
        Of each device: `tensor_split`, or free memory where none is given. Without devices all layers are the host's.

    Returns
    -------
    Placement
    """
    total = sum(shares)
    if not shares or total <= 0:
        return Placement(n_layer, 0, tuple(0 for _ in shares))
    n_gpu_layers = n_layer + 1 if n_gpu_layers < 0 else min(n_gpu_layers, n_layer + 1)
    ends = [end / total for end in accumulate(shares)]
    counts = [0] * len(shares)
    for i in range(n_gpu_layers):
        device = next((d for d, end in enumerate(ends) if end > i / n_gpu_layers), len(ends) - 1)
        counts[device] += 1
    return Placement(n_layer, n_gpu_layers, tuple(counts))


def at_group_borders(placement: Placement, groups: Sequence[Layers]) -> Placement:
    """Move borders between devices to where they cut no group; the nearest such place, the earlier of two.

    Parameters
    ----------
    placement : Placement
    groups : sequence of tuple of int
        Layers of each group.

    Returns
    -------
    Placement
        The same one where no border cuts a group. The output stays where it was.
    """
    n_layer = placement.n_layer
    free = [
        border for border in range(n_layer + 1) if all(max(group) < border or min(group) >= border for group in groups)
    ]

    def nearest(border: int) -> int:
        # behind the last layer there is the output, which no group has
        return border if border > n_layer else min(free, key=lambda place: (abs(place - border), place))

    first = nearest(placement.first) if placement.n_gpu_layers else n_layer + 1
    ends = [nearest(end) for end in accumulate((placement.first, *placement.counts))][1:]
    counts = []
    begin = first
    for end in ends:
        counts.append(max(0, end - begin))
        begin = max(begin, end)
    return Placement(n_layer, n_layer + 1 - first, tuple(counts))
