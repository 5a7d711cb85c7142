"""The file that keeps finished parts of a run while others are computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkv_gguf._partial import Partial, part_key
from xkv_gguf.errors import OptionError

PARTS = [{"cache": "f16", "kld_mean": 0.0}, [0.25, 1e-9], [[1, 2], [3]]]


def test_keys_are_of_everything_and_of_no_order() -> None:
    assert part_key(a=1, b="x") == part_key(b="x", a=1)
    assert len({part_key(a=1), part_key(a=2), part_key(b=1), part_key(a="1")}) == 4


def test_finished_parts_are_there_again(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    first = Partial(out, "eval")
    for number, part in enumerate(PARTS):
        first.put(f"key {number}", part)
    again = Partial(out, "eval")
    assert [again.get(f"key {number}") for number in range(3)] == PARTS
    assert again.get("key 3") is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.partial"]
    again.remove()
    assert Partial(out, "eval").get("key 0") is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": "other", "parts": {}}', b"\xff"])
def test_a_file_that_is_something_else_is_not_overwritten(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.json.partial"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="does not hold what an interrupted run of eval has done; remove it"):
        Partial(tmp_path / "out.json", "eval")
    assert path.read_bytes() == content
