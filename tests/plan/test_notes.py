"""What a plan does with less than usual is told."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_gguf.plan.notes import plan_notes
from xkv_gguf.plan.segments import Segment
from xkv_gguf.plan.sizes import CacheLayout
from xkv_gguf.plan.stages import Stage

PLAIN = Stage(512)
LATER = Stage(1024, (Segment(0, "k", 32, "q8_0", "q8_0"),))


@pytest.mark.parametrize(
    ("n_text_sink", "usual", "stages", "more", "expected"),
    [
        (51, 51, [PLAIN, LATER], {}, []),
        (25, 51, [PLAIN], {}, [("room for 25 instead of 51 tokens for attention sinks", False)]),
        (0, 51, [PLAIN], {}, [("no room for attention sinks in the text", True)]),
        (0, 0, [PLAIN], {}, []),
        (0, 0, [LATER], {}, [("no plain stage: short contexts lose more", False)]),
        (0, 0, [], {}, [("no stage before the full store", False)]),
        (0, 0, [], {"n_seq_max": 2}, [("no stages: streams of several sequences", False)]),
    ],
)
def test_notes(n_text_sink: int, usual: int, stages: Any, more: Any, expected: list[tuple[str, bool]]) -> None:
    layout = CacheLayout(4096, 4, 64, frame=64, n_text_sink=n_text_sink, **more)
    found = plan_notes(layout, stages, usual, True)
    assert len(found) == len(expected)
    for note, (begins, costs) in zip(found, expected, strict=True):
        assert note.text.startswith(begins) and note.costs is costs
    assert all("stage" not in note.text for note in plan_notes(layout, stages, usual, False))
