"""What a conversion can be asked for, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xkv_gguf.convert.text import MIN_TOKENS
from xkv_gguf.errors import OptionError
from xkv_gguf.plan.groups import FRAMES, MAX_DIM, default_group_size, group_layers
from xkv_gguf.plan.segments import KINDS
from xkv_gguf.plan.size_target import DEFAULT_TARGET, SizeTarget
from xkv_gguf.plan.sizes import PLAN_CTX, ModelShape
from xkv_gguf.runtime.threads import default_threads

AUTO_SIZES = (2, 5, 10)
"""Group sizes that "auto" chooses from."""

TOKENS = 10240
"""Calibration tokens by default, where groups are narrow enough for them."""

PER_NUMBER = 4
"""Tokens per number of the widest group, by default."""

THOROUGH_TOKENS = 24576
"""Calibration tokens of a thorough conversion, and the most by default."""

N_SCORE = 64
"""Tokens that are scored for a weight by default."""

THOROUGH_SCORE = 128
MAX_SCORE = 160
BASIS_TYPES = ("f16", "f32")
WEIGH = ("groups", "layers", "none")


@dataclass(frozen=True)
class Settings:
    """Settings of one conversion.

    Attributes
    ----------
    group_size : int or "auto", optional
        Most layers that share coefficients. None is `default_group_size` of the model. "auto" takes the smallest of
        `AUTO_SIZES` that comes close to the best one's predicted distortion.
    target : SizeTarget
        What caches are planned for unless their user says otherwise.
    n_ctx : int, optional
        Context in tokens that the size target is meant for. None is `PLAN_CTX`, or that of a smaller model.
    frame : int, optional
        Chunk length of the keys' frame in tokens. None is `default_frame` of the model's heads.
    n_sink : int
        First tokens of each sequence to leave out; the cache keeps them exact.
    data : tuple of Path
        Plain text files. Empty: the package's texts.
    tokens : int, optional
        Calibration tokens, about. None is `TOKENS`, or more for wide groups, see `n_token`.
    seed : int
    basis_type : str
        f16, or f32 for tests of exactness.
    weigh : str
        What is weighed by what its loss costs: "groups", "layers" one by one, whose K and V are scaled then, or
        "none": all count the same.
    n_score : int
        Tokens of each text that are scored for a weight.
    threads : int

    Raises
    ------
    OptionError
        A value is impossible for any model.
    """

    group_size: int | Literal["auto"] | None = None
    target: SizeTarget = DEFAULT_TARGET
    n_ctx: int | None = None
    frame: int | None = None
    n_sink: int = 4
    data: tuple[Path, ...] = ()
    tokens: int | None = None
    seed: int = 0
    basis_type: str = "f16"
    weigh: str = "groups"
    n_score: int = N_SCORE
    threads: int = field(default_factory=default_threads)

    def __post_init__(self) -> None:
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise OptionError(f"group size {self.group_size}: at least 1, or auto, expected")
        if self.n_ctx is not None and not 1 <= self.n_ctx < 1 << 31:
            raise OptionError(f"n_ctx {self.n_ctx}: at least 1 expected")
        if self.frame is not None and self.frame not in FRAMES:
            raise OptionError(f"frame {self.frame}: one of {', '.join(map(str, FRAMES))} expected")
        if not 0 <= self.n_sink <= MIN_TOKENS // 4:
            raise OptionError(f"sinks {self.n_sink}: 0 to {MIN_TOKENS // 4} expected")
        if self.tokens is not None and not MIN_TOKENS <= self.tokens < 1 << 40:
            raise OptionError(f"calibration tokens {self.tokens}: at least {MIN_TOKENS} expected")
        if not 0 <= self.seed < 1 << 63:
            raise OptionError(f"seed {self.seed}: 0 to {(1 << 63) - 1} expected")
        if self.basis_type not in BASIS_TYPES:
            raise OptionError(f"basis type {self.basis_type!r}: one of {', '.join(BASIS_TYPES)} expected")
        if self.weigh not in WEIGH:
            raise OptionError(f"weigh {self.weigh!r}: one of {', '.join(WEIGH)} expected")
        if not 1 <= self.n_score <= MAX_SCORE:
            raise OptionError(f"scored tokens {self.n_score}: 1 to {MAX_SCORE} expected")
        if self.threads < 1:
            raise OptionError(f"threads {self.threads}: at least 1 expected")

    def record(self, group_size: int | None = None, frame: int | None = None) -> dict[str, Any]:
        """What a sidecar says about its making: everything that decides its content, and no paths.

        `group_size` and `frame` are what the defaults come to for the model.
        """
        return {
            "basis_type": self.basis_type,
            "data": [path.name for path in self.data],
            "frame": self.frame if self.frame is not None else frame,
            "group_size": self.group_size if self.group_size is not None else group_size,
            "n_score": self.n_score,
            "n_sink": self.n_sink,
            "seed": self.seed,
            "tokens": self.tokens,
            "weigh": self.weigh,
        }

    def n_token(self, widest: int) -> int:
        """Calibration tokens for groups of at most `widest` numbers: enough of them to tell their directions apart."""
        if self.tokens is not None:
            return self.tokens
        return min(max(TOKENS, PER_NUMBER * widest), THOROUGH_TOKENS)

    def group_sizes(self, shape: ModelShape) -> list[int]:
        """Group sizes to try for a model, ascending; one unless "auto"."""
        if self.group_size is None:
            return [default_group_size(shape)]
        if self.group_size != "auto":
            return [self.group_size]
        sizes = [n for n in AUTO_SIZES if n <= len(shape.layers) and _widest_group(n, shape) <= MAX_DIM]
        return sizes or [1]

    def plan_ctx(self, n_ctx_train: int) -> int:
        """Context that the size target is meant for."""
        if self.n_ctx is not None:
            return self.n_ctx
        return min(PLAN_CTX, n_ctx_train) if n_ctx_train > 0 else PLAN_CTX


def _widest_group(size: int, shape: ModelShape) -> int:
    """Most numbers per token of K or of V among groups of at most `size` layers."""
    return max(shape.dim(kind, layers) for kind in KINDS for layers in group_layers(shape.layers, size))
