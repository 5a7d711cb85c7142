"""What a sidecar holds besides arrays: names, layers, groups, weights, the size target and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..plan.groups import FRAMES
from ..plan.segments import KINDS, Kind, Layers
from ..plan.size_target import DEFAULT_TARGET, SizeTarget
from ..plan.sizes import PLAN_CTX

FORMAT_VERSION = 5
ARCHITECTURE = "xkv"
FILE_TYPE = "xkv-sidecar"
SUFFIX = ".xkv.gguf"


@dataclass(frozen=True)
class Group:
    """Layers, ascending, and what a unit of relative distortion of their K and of their V costs."""

    layers: Layers
    weight_k: float = 1.0
    weight_v: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Where the statistics come from.

    Attributes
    ----------
    source : str
        "package" (texts of the package, and by the model where they are too few), "self" (by the model alone) or
        "files".
    tokens : int
        Tokens that were captured, sinks left out.
    seed, n_ctx : int
        Seed of sampling or of the choice of passages; tokens per sequence.
    text_sha256 : str
        SHA-256 over the token ids in order, as little-endian int32.
    """

    source: str
    tokens: int
    seed: int
    n_ctx: int
    text_sha256: str


@dataclass(frozen=True)
class SidecarInfo:
    """Everything in a sidecar but the arrays.

    Attributes
    ----------
    fingerprint, architecture, name : str
        Of the model.
    embd_k, embd_v : tuple of int
        K and V numbers per token, by layer; both 0 for a layer that has none in the cache, and is in no group. V alone
        0 where it is the first numbers of each head of K, as in latents (MLA), and has no arrays of its own.
    group_size : int
        Most layers in a group.
    frame, n_sink : int
        Tokens per chunk; first tokens that were left out.
    groups : tuple of Group
    calibration : Calibration
    settings : mapping
        Of the conversion, for people.
    target : SizeTarget
        What a cache is planned for unless its user says otherwise.
    n_ctx : int
        Context that the user had in mind, in tokens, rounded up as a context's is.
    kld_scale : float
        Mean divergence of the next-token distribution in nats per unit of distortion; 0 when unknown.
    scale_k, scale_v : tuple of float
        By layer: what K and V are multiplied by where they are stored. Empty is 1 everywhere.
    """

    fingerprint: str
    architecture: str
    name: str
    embd_k: tuple[int, ...]
    embd_v: tuple[int, ...]
    group_size: int
    frame: int
    n_sink: int
    groups: tuple[Group, ...]
    calibration: Calibration
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: SizeTarget = DEFAULT_TARGET
    n_ctx: int = PLAN_CTX
    kld_scale: float = 0.0
    scale_k: tuple[float, ...] = ()
    scale_v: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("scale_k", "scale_v"):
            object.__setattr__(self, name, getattr(self, name) or (1.0,) * self.n_layer)

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return len(self.embd_k)

    def scales(self, kind: Kind) -> tuple[float, ...]:
        """By layer."""
        return self.scale_k if kind == "k" else self.scale_v

    def dim(self, group: int, kind: Kind) -> int:
        """Numbers per token of one kind of a group: D."""
        embd = self.embd_k if kind == "k" else self.embd_v
        return sum(embd[il] for il in self.groups[group].layers)

    def kinds(self, group: int) -> tuple[Kind, ...]:
        """What a group has arrays of: K, and V unless it is a part of K."""
        return tuple(kind for kind in KINDS if self.dim(group, kind) > 0)


def tensor_name(group: int, kind: str, part: str) -> str:
    """Name of an array in the file; `part` is "basis", "mean" or "spectrum"."""
    return f"group.{group}.{kind}.{part}"


def sidecar_beside(model: str | Path) -> Path:
    """Where a model's sidecar is looked for first: MODEL.xkv.gguf beside MODEL.gguf."""
    model = Path(model)
    stem = model.name[: -len(".gguf")] if model.name.endswith(".gguf") else model.name
    return model.with_name(stem + SUFFIX)


def check_info(info: SidecarInfo) -> None:
    """Check that the values of a sidecar are possible ones.

    Raises
    ------
    ValueError
        What was found and expected, in one line without the file's name.
    """
    if len(info.embd_k) != len(info.embd_v):
        raise ValueError(f"has {len(info.embd_k)} layers with K and {len(info.embd_v)} with V")
    for layer, (k, v) in enumerate(zip(info.embd_k, info.embd_v, strict=True)):
        if k < 1 <= v:
            raise ValueError(f"layer {layer} has {k} numbers of K and {v} of V, none without K expected")
    if not any(info.embd_k):
        raise ValueError(f"has {info.n_layer} layers and none with K and V, at least one expected")
    for kind, scales in (("K", info.scale_k), ("V", info.scale_v)):
        if len(scales) != info.n_layer:
            raise ValueError(f"has {len(scales)} scales of {kind}, {info.n_layer} expected")
        for layer, scale in enumerate(scales):
            if not 0 < np.float32(scale) < np.inf:
                raise ValueError(f"layer {layer} has {kind} scale {scale:g}, a finite number above 0 expected")
    if not 1 <= info.group_size <= info.n_layer:
        raise ValueError(f"has group size {info.group_size}, 1 to {info.n_layer} expected")
    if info.frame not in FRAMES:
        raise ValueError(f"has frame {info.frame}, one of 32, 64, 128 and 256 expected")
    if info.n_ctx < 1:
        raise ValueError(f"has a plan for a context of {info.n_ctx} tokens, at least 1 expected")
    # as it is read back: f32
    if not 0 <= np.float32(info.kld_scale) < np.inf:
        raise ValueError(f"has divergence scale {info.kld_scale:g}, 0 or a finite number above expected")
    if info.calibration.source not in ("package", "self", "files"):
        raise ValueError(f"has calibration source {info.calibration.source!r}, 'package', 'self' or 'files' expected")
    left = {il for il, embd in enumerate(info.embd_k) if embd > 0}
    for i, g in enumerate(info.groups):
        own = set(g.layers)
        if not 1 <= len(g.layers) <= info.group_size:
            raise ValueError(f"group {i} has {len(g.layers)} layers, 1 to {info.group_size} expected")
        if list(g.layers) != sorted(own) or not own <= left:
            raise ValueError(
                f"group {i} has layers {', '.join(map(str, g.layers))}, "
                "ascending ones with K and V expected that are in no other group"
            )
        if len({info.embd_v[il] > 0 for il in own}) > 1:
            raise ValueError(f"group {i} has layers with V and without, one of both expected")
        left -= own
    if left:
        raise ValueError(f"has no group for layer {min(left)}")
    for i, g in enumerate(info.groups):
        for kind, weight in (("K", g.weight_k), ("V", g.weight_v)):
            if not 0 < np.float32(weight) < np.inf:
                raise ValueError(f"group {i} has {kind} weight {weight:g}, a finite number above 0 expected")
