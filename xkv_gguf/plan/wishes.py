"""What is asked of a plan of a cache, checked where it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import OptionError
from .coef_types import DEFAULT_TYPES
from .segments import MAX_SEGMENTS
from .size_target import DEFAULT_TARGET, SizeTarget
from .sizes import padded_ctx
from .work import DEFAULT_ATTENTION, Attention

N_BATCH = 512
MAX_SEQ = 256
"""Most sequences that llama.cpp allows."""

Rank = int | tuple[int, int] | Literal["full"]


@dataclass(frozen=True)
class Wishes:
    """What is asked of a plan; None leaves it to the plan.

    Attributes
    ----------
    n_ctx : int
        Context in tokens; rounded up as a context's is, see `sizes.padded_ctx`.
    target : SizeTarget
    n_sink, n_text_sink, n_window, n_ubatch : int
        Tokens that stay exact at the start, as attention sinks in the text, and of late, and of a micro-batch.
    n_batch : int
        The most that n_ubatch can be.
    n_seq_max : int
        Most sequences.
    kv_unified : bool
        Whether they share the context; else each has a stream of its own.
    type_window, type_basis : str
    types : tuple of str
        Coefficient types that may be used, by descending bytes.
    max_segments : int
        Most segments of one kind of one group.
    rank : int, pair of int, or "full"
        The same number of directions everywhere, or one for K and one for V, in the one type of `types`; takes the
        place of `target`, and has no stages.
    stages : bool
        Whether few tokens get the bytes of many.
    online : bool
        Whether bases follow the prompt.
    attention : Attention
        How few queries meet stored tokens, which decides what a direction's work is.
    work_price : float, optional
        How much the work of directions counts beside their bytes, see `work.work_charges`: 0 for nothing.
    max_rank : int, optional
        Most directions of one kind of one group.
    places : tuple of int
        The device of each layer, see `placement.Placement.layers`; empty where all are on one.

    Raises
    ------
    OptionError
        The micro-batch does not fit, or there are too few or too many sequences.
    """

    n_ctx: int
    target: SizeTarget = DEFAULT_TARGET
    n_sink: int = 4
    n_text_sink: int | None = None
    n_window: int | None = None
    n_ubatch: int | None = None
    n_batch: int = N_BATCH
    n_seq_max: int = 1
    kv_unified: bool = False
    type_window: str | None = None
    type_basis: str | None = None
    types: tuple[str, ...] = DEFAULT_TYPES
    max_segments: int = MAX_SEGMENTS
    rank: Rank | None = None
    stages: bool = True
    online: bool = True
    attention: Attention = DEFAULT_ATTENTION
    work_price: float | None = None
    max_rank: int | None = None
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n_seq_max <= MAX_SEQ:
            raise OptionError(f"n_seq_max: {self.n_seq_max}, expected 1 to {MAX_SEQ}")
        n_stream = 1 if self.kv_unified else self.n_seq_max
        object.__setattr__(self, "n_ctx", padded_ctx(self.n_ctx, n_stream))
        most = min(self.n_batch, self.n_ctx)
        if self.n_ubatch is not None and not 1 <= self.n_ubatch <= most:
            # n_batch is lowered to n_ctx before it comes here, so that raising it would not help
            what = "n_batch" if self.n_batch < self.n_ctx else "n_ctx"
            raise OptionError(
                f"n_ubatch: {self.n_ubatch}, expected 1 to {what} = {most}; lower n_ubatch or raise {what}"
            )
