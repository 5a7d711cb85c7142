"""Sidecars with random rotations for bases: exactness must not depend on calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from xkv_gguf.plan.segments import KINDS, Segment
from xkv_gguf.runtime.native import ScopeParams
from xkv_gguf.sidecar.info import Calibration, Group, SidecarInfo, tensor_name
from xkv_gguf.sidecar.write import write_sidecar

N_SINK = 4
N_WINDOW = 40
MEAN_SIZE = {"k": 0.5, "v": 0.5}
# for scopes that no context is made in: a context's are `harness.places`
PLACES = {"n_keep": 256, "n_cell": 512, "n_slot": 1024}


@dataclass(frozen=True)
class Bases:
    """A sidecar on disk and its content: `basis[kind][g]` [D, D], `mean[kind][g]` [D]; by layer `scale[kind]`."""

    path: Path
    frame: int
    groups: tuple[tuple[int, ...], ...]
    basis: dict[str, list[np.ndarray]]
    mean: dict[str, list[np.ndarray]]
    scale: dict[str, tuple[float, ...]]

    def params(
        self,
        rank: int | None = None,
        type_coef: str = "f32",
        n_absorb: int = 8,
        n_text_sink: int = 0,
        online: bool = False,
        calibrated: bool = True,
        n_prior: int = 1000,
        fused: bool = True,
        types: tuple[tuple[int, str], ...] = (),
    ) -> ScopeParams:
        """Cache parameters.

        Every rank is `rank`, or full, in one type; or the directions are split as `types` says: (rank, type).
        """
        segments = []
        for g in range(len(self.groups)):
            for kind in KINDS:
                dim = len(self.basis[kind][g])
                if dim == 0:
                    continue
                rows = types or ((min(rank or dim, dim), type_coef),)
                segments += [Segment(g, kind, n, t, "f32") for n, t in rows]
        return ScopeParams(
            segments=tuple(segments),
            sidecar=str(self.path) if calibrated else None,
            **PLACES,
            n_sink=N_SINK,
            n_text_sink=n_text_sink,
            n_window=N_WINDOW,
            n_absorb=n_absorb,
            online=online,
            n_prior=n_prior,
            fused=fused,
            layers=() if calibrated else self.groups,
            frame=0 if calibrated else self.frame,
        )


def write_random(
    path: Path,
    n_layer: int,
    n_embd: tuple[int, int] | Sequence[tuple[int, int]],
    group_size: int,
    frame: int,
    seed: int = 0,
    widest: float = 1.25,
    held: int | None = None,
    fall: float = 0.0,
    layers: Sequence[int] | None = None,
    mean_size: Mapping[str, float] = MEAN_SIZE,
) -> Bases:
    """Write a sidecar for a model whose K and V have the numbers `n_embd` per token of every layer held, or of each.

    Scales of layers are between 1 / `widest` and `widest`. The file holds the first `held` directions, or all.
    Variances fall from 2 to 1, or as this power of the direction's number. `layers` are those that the cache holds, or
    all. V without numbers is a part of K. Means are of the sizes `mean_size`, by kind: 0 for V of models with sinks.
    """
    rng = np.random.default_rng(seed)
    left = tuple(range(n_layer) if layers is None else layers)
    groups = tuple(left[f : f + group_size] for f in range(0, len(left), group_size))
    by_layer = [n_embd] * len(left) if isinstance(n_embd[0], int) else n_embd
    embd = dict(zip(left, cast("Sequence[tuple[int, int]]", by_layer), strict=True))
    basis: dict[str, list[np.ndarray]] = {"k": [], "v": []}
    mean: dict[str, list[np.ndarray]] = {"k": [], "v": []}
    arrays: dict[str, np.ndarray] = {}
    for g, group in enumerate(groups):
        for place, kind in enumerate(KINDS):
            dim = sum(embd[il][place] for il in group)
            spectrum = np.arange(1, dim + 1) ** -fall if fall else np.linspace(2.0, 1.0, dim)
            basis[kind].append(np.linalg.qr(rng.normal(size=(dim, dim)))[0].astype(np.float32))
            mean[kind].append(rng.normal(0, mean_size[kind], dim).astype(np.float32))
            if dim > 0:
                arrays[tensor_name(g, kind, "basis")] = basis[kind][g][:held]
                arrays[tensor_name(g, kind, "mean")] = mean[kind][g]
                arrays[tensor_name(g, kind, "spectrum")] = spectrum.astype(np.float32)
    scale = {kind: tuple((widest ** rng.uniform(-1, 1, n_layer)).astype(np.float32).tolist()) for kind in KINDS}
    info = SidecarInfo(
        fingerprint="0" * 64,
        architecture="test",
        name="test",
        embd_k=tuple(embd.get(il, (0, 0))[0] for il in range(n_layer)),
        embd_v=tuple(embd.get(il, (0, 0))[1] for il in range(n_layer)),
        group_size=group_size,
        frame=frame,
        n_sink=N_SINK,
        groups=tuple(map(Group, groups)),
        calibration=Calibration("self", 1, 0, 1, "0" * 64),
        scale_k=scale["k"],
        scale_v=scale["v"],
    )
    write_sidecar(path, info, arrays)
    return Bases(path, frame, groups, basis, mean, scale)
