"""What a conversion measures about its groups, or about single layers: see `sensitivity`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from xkv_gguf.base.partial import Partial
from xkv_gguf.convert import sensitivity
from xkv_gguf.convert.calibrate import TextInfo
from xkv_gguf.convert.capture import Sums
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.estimate import n_solvers
from xkv_gguf.convert.layer_scales import group_weights, layer_scales, scaled
from xkv_gguf.convert.sensitivity import Sensitivity
from xkv_gguf.convert.solve import Basis, Solver
from xkv_gguf.plan.group_choice import Candidate
from xkv_gguf.plan.groups import LayerGroups
from xkv_gguf.plan.segments import KINDS, Kind, Segment, Statistics
from xkv_gguf.plan.sizes import ModelShape
from xkv_gguf.sidecar.info import Group, SidecarInfo, tensor_name

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LayerWeights:
    """What single layers cost, and the scales that make their errors weigh the same, by layer."""

    found: Sensitivity
    scales: dict[Kind, tuple[float, ...]]

    def scale(self, groups: LayerGroups, group: int, kind: Kind, sums: Sums) -> Sums:
        """Sums of scaled numbers, of a captured group."""
        return scaled(sums, [self.scales[kind][il] for il in groups.layers[group]], groups.sizes(group, kind))

    def add_to(self, info: SidecarInfo) -> SidecarInfo:
        """The information with scales, and with the weights of its groups."""
        weights, mean = group_weights(self.found.weights, info.groups)
        return replace(
            _with_weights(info, Sensitivity(weights, self.found.kld_scale * mean)),
            scale_k=self.scales["k"],
            scale_v=self.scales["v"],
        )


def basis_arrays(bases: Mapping[tuple[int, Kind], Basis]) -> dict[str, Array]:
    """Arrays of a sidecar from bases by group and kind."""
    arrays: dict[str, Array] = {}
    for (g, kind), basis in bases.items():
        arrays[tensor_name(g, kind, "basis")] = basis.basis
        arrays[tensor_name(g, kind, "mean")] = basis.mean.astype(np.float32)
        arrays[tensor_name(g, kind, "spectrum")] = basis.spectrum.astype(np.float32)
    return arrays


def weigh_groups(
    engine: Engine,
    info: SidecarInfo,
    bases: Mapping[tuple[int, Kind], Basis],
    shape: ModelShape,
    text: TextInfo,
    n_score: int,
    partial: Partial,
    show_progress: bool,
) -> SidecarInfo:
    """Add measured weights; the same information where the text is too short or the model too small for it."""
    found = _measure(engine, info, bases, shape, text, n_score, partial, show_progress)
    return _with_weights(info, found) if found else info


def weigh_layers(
    engine: Engine,
    info: SidecarInfo,
    captured: LayerGroups,
    sums: Mapping[tuple[int, Kind], Sums],
    shape: ModelShape,
    text: TextInfo,
    n_score: int,
    partial: Partial,
    show_progress: bool,
) -> LayerWeights | None:
    """Weigh layers one by one; None where the text is too short, the model too small, or all of it is noise.

    `info` is that of the conversion, its groups do not matter; `sums` are by captured group and kind.
    """
    single = Candidate.of(1, captured, shape)
    widest = max(*info.embd_k, *info.embd_v)
    with Solver[tuple[int, Kind]](n_solvers(widest, engine.n_threads), "f16", lambda: None) as solver:
        for layer, inside in enumerate(single.inside):
            for kind in single.groups.kinds(layer):
                part = sums[inside, kind].cut(single.part(layer, kind))
                solver.submit((layer, kind), part.gram, part.total, part.n_tokens, f"{kind.upper()} of layer {layer}")
        bases = solver.results()
    alone = replace(info, group_size=1, groups=tuple(map(Group, single.groups.layers)))
    found = _measure(engine, alone, bases, shape, text, n_score, partial, show_progress)
    if found is None or not found.kld_scale > 0:
        return None
    # by layer of the model; those that the cache does not hold weigh nothing in no group
    place = {layers[0]: i for i, layers in enumerate(single.groups.layers)}
    weights: dict[Kind, tuple[float, ...]] = {}
    variances: dict[Kind, list[float]] = {}
    for kind in KINDS:
        held = [(place.get(il, -1), kind) for il in range(info.n_layer)]
        weights[kind] = tuple(found.weights[kind][i] if i >= 0 else 1.0 for i, _ in held)
        variances[kind] = [float(bases[key].spectrum.sum()) if key in bases else 0.0 for key in held]
    return LayerWeights(replace(found, weights=weights), layer_scales(weights, variances))


def _measure(
    engine: Engine,
    info: SidecarInfo,
    bases: Mapping[tuple[int, Kind], Basis],
    shape: ModelShape,
    text: TextInfo,
    n_score: int,
    partial: Partial,
    show_progress: bool,
) -> Sensitivity | None:
    groups = LayerGroups.of([g.layers for g in info.groups], info.embd_k, info.embd_v)
    weights = (1.0,) * len(info.groups)
    stats = Statistics(
        layers=groups.layers,
        spectra={
            kind: tuple(bases[g, kind].spectrum if (g, kind) in bases else np.zeros(0) for g in range(len(info.groups)))
            for kind in KINDS
        },
        weights=dict.fromkeys(KINDS, weights),
        frame=info.frame,
        held={
            kind: tuple(len(bases[g, kind].basis) if (g, kind) in bases else 0 for g in range(len(info.groups)))
            for kind in KINDS
        },
    )
    if not sensitivity.measurable(text.kept, stats):
        return None

    def remembered(segments: Sequence[Segment], compute: Callable[[], list[float]]) -> list[float]:
        # of other text, the same segments have other bases
        what = {"text": text.sha256, "segments": [astuple(segment) for segment in segments]}
        found: list[float] | None = partial.get(**what)
        if found is None:
            found = compute()
            partial.put(found, **what)
        return found

    with tqdm(total=sensitivity.n_run(stats), desc="weighing", unit="cache", disable=not show_progress) as bar:
        return sensitivity.measure(
            engine, groups, bases, stats, info.n_sink, n_score, shape, text.kept, bar.update, remembered
        )


def _with_weights(info: SidecarInfo, found: Sensitivity) -> SidecarInfo:
    groups = tuple(
        replace(group, weight_k=weight_k, weight_v=weight_v)
        for group, weight_k, weight_v in zip(info.groups, found.weights["k"], found.weights["v"], strict=True)
    )
    return replace(info, groups=groups, kld_scale=found.kld_scale)
