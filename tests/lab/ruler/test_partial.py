from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.lab.ruler.partial import Partial, key_of

BASIS = {"model": "ab12", "seed": 0}


def record(index: int) -> dict[str, Any]:
    return {"cache": "f16", "task": "vt", "length": 1024, "index": index, "answer": "eins\nzwei \u2028"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two records."""
    path = tmp_path / "out.json.partial"
    partial = Partial(path, BASIS)
    partial.add(record(0))
    partial.add(record(1))
    return path


def test_records_come_back(path: Path) -> None:
    again = Partial(path, dict(reversed(BASIS.items())))
    assert list(again.records.values()) == [record(0), record(1)]
    again.add(record(2))
    assert len(Partial(path, BASIS).records) == 3
    assert key_of(record(2)) == ("f16", "vt", 1024, 2)
    again.remove()
    assert not path.exists()


def test_a_record_that_was_cut_off_is_dropped(path: Path) -> None:
    path.write_text(path.read_text()[:-9])
    again = Partial(path, BASIS)
    assert list(again.records.values()) == [record(0)]
    again.add(record(1))
    assert len(Partial(path, BASIS).records) == 2


def test_an_empty_file_is_taken(path: Path) -> None:
    path.write_text("")
    partial = Partial(path, BASIS)
    partial.add(record(0))
    assert len(Partial(path, BASIS).records) == 1


def test_another_basis_is_refused(path: Path) -> None:
    with pytest.raises(OptionError, match="holds samples of another model or with other settings; delete it"):
        Partial(path, {**BASIS, "seed": 1})


@pytest.mark.parametrize("line", ["no json\n", "{}\n", "[1]\n"])
def test_a_damaged_file_is_refused(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line)
    with pytest.raises(OptionError, match="is damaged; delete it to start anew"):
        Partial(path, BASIS)


def test_without_a_file_records_are_kept_in_memory() -> None:
    partial = Partial(None, BASIS)
    partial.add(record(0))
    partial.remove()
    assert len(partial.records) == 1
