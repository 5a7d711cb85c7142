"""What a plan does with less than usual, in words: nobody would see it otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .sizes import CacheLayout
from .stages import Stage


class Note(NamedTuple):
    """One line, and whether it costs so much quality that the user is warned of it."""

    text: str
    costs: bool = False


def plan_notes(layout: CacheLayout, stages: Sequence[Stage], n_text_sink: int, with_stages: bool) -> tuple[Note, ...]:
    """Notes on a plan.

    Parameters
    ----------
    layout : CacheLayout
    stages : sequence of Stage
    n_text_sink : int
        Usual room for attention sinks in the text; 0 where it was given.
    with_stages : bool
        Whether stages are wanted.
    """
    found = []
    if layout.n_text_sink < n_text_sink:
        none = layout.n_text_sink == 0
        room = "no room" if none else f"room for {layout.n_text_sink} instead of {n_text_sink} tokens"
        found.append(
            Note(f"{room} for attention sinks in the text, since the cache is small: a larger one loses less", none)
        )
    if with_stages and layout.n_stream > 1:
        found.append(Note("no stages: streams of several sequences have none, and few tokens lose what many do"))
    elif with_stages and all(stage.segments for stage in stages):
        what = "no stage before the full store" if not stages else "no plain stage"
        found.append(Note(f"{what}: short contexts lose more than with a q8_0 cache"))
    return tuple(found)
