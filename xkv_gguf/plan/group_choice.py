"""Which group size a conversion takes: candidates from one capture, compared by their predicted distortion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import OptionError
from .cache_plan import plan_cache
from .groups import LayerGroups, group_layers
from .segments import KINDS, Kind, Layers, Statistics
from .sizes import ModelShape
from .wishes import Wishes

NEAR_BEST = 1.25
"""Times the best candidate's distortion that a smaller group size may have: small groups are faster."""


@dataclass(frozen=True)
class Candidate:
    """Groups of at most `size` layers, each inside one of the groups that were captured.

    Attributes
    ----------
    size : int
    groups : LayerGroups
    inside : tuple of int
        The captured group of each group.
    start : dict of str to tuple of int
        By kind: where the group's numbers begin among those of the captured group.
    """

    size: int
    groups: LayerGroups
    inside: tuple[int, ...]
    start: dict[Kind, tuple[int, ...]]

    @classmethod
    def of(cls, size: int, captured: LayerGroups, shape: ModelShape) -> Candidate:
        """Split captured groups evenly into groups of at most `size` layers."""
        groups: list[Layers] = []
        inside: list[int] = []
        start: dict[Kind, tuple[int, ...]] = {"k": (), "v": ()}
        for g, layers in enumerate(captured.layers):
            parts = group_layers(layers, min(size, len(layers)))
            groups += parts
            inside += [g] * len(parts)
            for kind in KINDS:
                start[kind] += tuple(shape.dim(kind, layers[: layers.index(part[0])]) for part in parts)
        return cls(size, LayerGroups.of(groups, shape.embd_k, shape.embd_v), tuple(inside), start)

    def part(self, group: int, kind: Kind) -> slice:
        """The group's numbers among those of the captured group that holds it."""
        at = self.start[kind][group]
        return slice(at, at + self.groups.dims[kind][group])

    def statistics(self, spectra: Mapping[tuple[int, Kind], np.ndarray] | None, frame: int) -> Statistics:
        """What a plan needs; flat spectra where there are none yet. Groups weigh as much as they have layers."""
        n_layer = sum(map(len, self.groups.layers))
        weights = tuple(len(layers) / n_layer for layers in self.groups.layers)
        return Statistics(
            layers=self.groups.layers,
            spectra={
                kind: tuple(
                    np.ones(dim) if spectra is None or dim == 0 else spectra[g, kind]
                    for g, dim in enumerate(self.groups.dims[kind])
                )
                for kind in KINDS
            },
            weights=dict.fromkeys(KINDS, weights),
            frame=frame,
        )


def within_reach(candidates: Sequence[Candidate], shape: ModelShape, wishes: Wishes, frame: int) -> list[Candidate]:
    """Candidates for which the size target can be met, which spectra do not decide.

    Raises
    ------
    OptionError
        There is none; the text is that of the last one.
    """
    found = []
    refused: OptionError | None = None
    for candidate in candidates:
        try:
            plan_cache(candidate.statistics(None, frame), shape, wishes)
            found.append(candidate)
        except OptionError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return found


def choose(distortions: Mapping[int, float]) -> int:
    """The smallest group size whose distortion is at most `NEAR_BEST` times the least."""
    least = min(distortions.values())
    return min(size for size, value in distortions.items() if value <= NEAR_BEST * least)


def predicted_distortion(statistics: Statistics, shape: ModelShape, wishes: Wishes) -> float:
    """Predicted distortion at the size that is asked for, mean over the layers."""
    return plan_cache(replace(statistics, kld_scale=0.0), shape, wishes).distortion
