"""What a conversion can be asked for, checked when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xkv_gguf.convert.plan import BYTES_PER_COEF
from xkv_gguf.convert.sidecar_info import FRAMES
from xkv_gguf.convert.text import MIN_TOKENS
from xkv_gguf.errors import OptionError

GROUP_SIZE = 5
RATIO = 7.0
FRAME = 64
TOKENS = 24576
BASIS_TYPES = ("f16", "f32")


def default_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """Settings of one conversion.

    Attributes
    ----------
    group_size : int, optional
        Most layers that share coefficients. None is `GROUP_SIZE`, or all layers of a smaller model.
    ratio : float, optional
        f16 bytes per token over coefficient bytes per token. None is `RATIO`, or the nearest that a tiny model allows.
    rank_k, rank_v : int, optional
        Ranks of every group (at most its dimension), both or neither; they take the place of a ratio.
    type_coef : str
        Coefficient type that the ratio counts with.
    frame : int
        Chunk length of the keys' frame in tokens.
    n_sink : int
        First tokens of each sequence to leave out; the cache keeps them exact.
    data : tuple of Path
        Plain text files. Empty: the model writes its own text.
    tokens : int
        Calibration tokens, about.
    seed : int
    basis_type : str
        f16, or f32 for tests of exactness.
    threads : int

    Raises
    ------
    OptionError
        A value is impossible for any model.
    """

    group_size: int | None = None
    ratio: float | None = None
    rank_k: int | None = None
    rank_v: int | None = None
    type_coef: str = "q8_0"
    frame: int = FRAME
    n_sink: int = 4
    data: tuple[Path, ...] = ()
    tokens: int = TOKENS
    seed: int = 0
    basis_type: str = "f16"
    threads: int = field(default_factory=default_threads)

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise OptionError(f"group size {self.group_size}: at least 1 expected")
        if self.ratio is not None and not 0 < self.ratio < 1e6:
            raise OptionError(f"ratio {self.ratio:g}: a number above 0 expected")
        if (self.rank_k is None) != (self.rank_v is None):
            raise OptionError("ranks: both of K and V expected, or neither")
        if self.rank_k is not None and self.ratio is not None:
            raise OptionError("ranks and ratio: one of them expected, they decide the same thing")
        for name, rank in (("rank of K", self.rank_k), ("rank of V", self.rank_v)):
            if rank is not None and rank < 1:
                raise OptionError(f"{name} {rank}: at least 1 expected")
        if self.type_coef not in BYTES_PER_COEF:
            raise OptionError(f"coefficient type {self.type_coef!r}: one of {', '.join(BYTES_PER_COEF)} expected")
        if self.frame not in FRAMES:
            raise OptionError(f"frame {self.frame}: one of {', '.join(map(str, FRAMES))} expected")
        if not 0 <= self.n_sink <= MIN_TOKENS // 4:
            raise OptionError(f"sinks {self.n_sink}: 0 to {MIN_TOKENS // 4} expected")
        if not MIN_TOKENS <= self.tokens < 1 << 40:
            raise OptionError(f"calibration tokens {self.tokens}: at least {MIN_TOKENS} expected")
        if not 0 <= self.seed < 1 << 63:
            raise OptionError(f"seed {self.seed}: 0 to {(1 << 63) - 1} expected")
        if self.basis_type not in BASIS_TYPES:
            raise OptionError(f"basis type {self.basis_type!r}: one of {', '.join(BASIS_TYPES)} expected")
        if self.threads < 1:
            raise OptionError(f"threads {self.threads}: at least 1 expected")

    def record(self, n_layer: int) -> dict[str, Any]:
        """What a sidecar says about its making: everything that decides its content, and no paths."""
        return {
            "basis_type": self.basis_type,
            "data": [path.name for path in self.data],
            "frame": self.frame,
            "group_size": self.groups_of(n_layer),
            "n_sink": self.n_sink,
            "rank_k": self.rank_k,
            "rank_v": self.rank_v,
            "ratio": self.ratio,
            "seed": self.seed,
            "tokens": self.tokens,
            "type_coef": self.type_coef,
        }

    def groups_of(self, n_layer: int) -> int:
        """Group size for a model."""
        return self.group_size if self.group_size is not None else min(GROUP_SIZE, n_layer)
