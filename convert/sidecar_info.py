"""What a sidecar holds besides arrays: names, layers, groups, ranks and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xkv_gguf.convert.plan import RANK_STEP
from xkv_gguf.convert.sizes import GroupShape

FORMAT_VERSION = 1
ARCHITECTURE = "xkv"
FILE_TYPE = "xkv-sidecar"
SUFFIX = ".xkv.gguf"
FRAMES = (32, 64, 128, 256)

Kind = Literal["k", "v"]
KINDS: tuple[Kind, ...] = ("k", "v")


@dataclass(frozen=True)
class Group:
    """Consecutive layers `first` .. `first + count - 1` and the ranks planned for them."""

    first: int
    count: int
    rank_k: int
    rank_v: int


@dataclass(frozen=True)
class Calibration:
    """Where the statistics come from.

    Attributes
    ----------
    source : str
        "self" (text written by the model) or "files".
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
    """Everything in a sidecar but the arrays. `embd_k` and `embd_v` are K and V numbers per token, by layer."""

    fingerprint: str
    architecture: str
    name: str
    embd_k: tuple[int, ...]
    embd_v: tuple[int, ...]
    group_size: int
    frame: int
    n_sink: int
    groups: tuple[Group, ...]
    ratio: float
    calibration: Calibration
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return len(self.embd_k)

    def dim(self, group: int, kind: Kind) -> int:
        """Numbers per token of one kind of a group: D."""
        g = self.groups[group]
        return sum((self.embd_k if kind == "k" else self.embd_v)[g.first : g.first + g.count])

    @property
    def shapes(self) -> tuple[GroupShape, ...]:
        """Dimensions and planned ranks by group, for `sizes`."""
        return tuple(
            GroupShape(self.dim(i, "k"), self.dim(i, "v"), g.rank_k, g.rank_v) for i, g in enumerate(self.groups)
        )


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
    if info.n_layer < 1 or any(e < 1 for e in (*info.embd_k, *info.embd_v)):
        raise ValueError("has no layers, or layers without K or V")
    if len(info.embd_k) != len(info.embd_v):
        raise ValueError(f"has {len(info.embd_k)} layers with K and {len(info.embd_v)} with V")
    if not 1 <= info.group_size <= info.n_layer:
        raise ValueError(f"has group size {info.group_size}, 1 to {info.n_layer} expected")
    if info.frame not in FRAMES:
        raise ValueError(f"has frame {info.frame}, one of 32, 64, 128 and 256 expected")
    if not 0 <= info.ratio < 1e6:
        raise ValueError(f"has ratio {info.ratio}")
    if info.calibration.source not in ("self", "files"):
        raise ValueError(f"has calibration source {info.calibration.source!r}, 'self' or 'files' expected")
    layer = 0
    for i, g in enumerate(info.groups):
        if g.first != layer or not 1 <= g.count <= info.group_size:
            raise ValueError(
                f"group {i} has layers {g.first} to {g.first + g.count - 1}, "
                f"1 to {info.group_size} layers from {layer} on expected"
            )
        layer += g.count
    if layer != info.n_layer:
        raise ValueError(f"has groups for {layer} layers, {info.n_layer} expected")
    for i, s in enumerate(info.shapes):
        for kind, rank, dim in (("K", s.rank_k, s.dim_k), ("V", s.rank_v, s.dim_v)):
            if rank != dim and not (0 < rank < dim and rank % RANK_STEP == 0):
                raise ValueError(
                    f"group {i} has {kind} rank {rank}, a multiple of {RANK_STEP} below {dim}, or {dim}, expected"
                )
