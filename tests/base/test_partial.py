"""The file that keeps finished parts of a run while others are computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkv_gguf.base.partial import Partial
from xkv_gguf.errors import OptionError

PARTS = [{"cache": "f16", "kld_mean": 0.0}, [0.25, 1e-9], [[1, 2], [3]]]


def test_finished_parts_are_there_again(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    first = Partial(out, "eval", {"model": "m"})
    for number, part in enumerate(PARTS):
        first.put(part, number=number, text="t")
    assert (first.n_put, first.n_taken) == (3, 0)
    again = Partial(out, "eval", {"model": "m"})
    assert [again.get(text="t", number=number) for number in range(3)] == PARTS
    assert (again.n_put, again.n_taken) == (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.partial"]
    again.remove()
    assert Partial(out, "eval", {"model": "m"}).get(number=0, text="t") is None


def test_a_part_depends_on_everything(tmp_path: Path) -> None:
    Partial(tmp_path / "out", "eval", {"model": "m"}).put(1, number=0)
    for basis, what in (
        ({"model": "m"}, {"number": 1}),
        ({"model": "m"}, {"number": "0"}),
        ({"model": "m"}, {"number": 0, "text": "t"}),
        ({"model": "n"}, {"number": 0}),
        ({}, {"number": 0}),
    ):
        partial = Partial(tmp_path / "out", "eval", basis)
        assert partial.get(**what) is None and partial.n_taken == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": "other", "parts": {}}', b"\xff"])
def test_a_file_that_is_something_else_is_not_overwritten(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.json.partial"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="expected 'xkv-gguf eval, partial, 2'; remove it to start anew"):
        Partial(tmp_path / "out.json", "eval")
    assert path.read_bytes() == content


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "out.json.partial").mkdir()
    with pytest.raises(OptionError, match=r"out\.json\.partial: cannot be read \(Is a directory\)"):
        Partial(tmp_path / "out.json", "eval")


def test_another_basis_is_refused_where_parts_must_not_mix(tmp_path: Path) -> None:
    first = Partial(tmp_path / "out", "ruler", {"model": "m", "seed": 0}, mixed=False)
    first.put(1, index=0)
    again = Partial(tmp_path / "out", "ruler", {"seed": 0, "model": "m"}, mixed=False)
    assert again.get(index=0) == 1
    with pytest.raises(OptionError, match="holds parts of another model or with other settings; remove it"):
        Partial(tmp_path / "out", "ruler", {"model": "m", "seed": 1}, mixed=False)


def test_without_a_file_parts_are_kept_in_memory() -> None:
    partial = Partial(None, "ruler")
    partial.put({"answer": "eins\nzwei \u2028"}, index=0)
    partial.remove()
    assert partial.path is None and partial.get(index=0) == {"answer": "eins\nzwei \u2028"}
