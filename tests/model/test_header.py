"""Headers that state absurd sizes are refused before anything is planned or loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from xkv_gguf.errors import ModelError
from xkv_gguf.model.file import open_model
from xkv_gguf.model.fingerprint import MOST
from xkv_gguf.sidecar.find import find_sidecar


@pytest.mark.parametrize(
    "name",
    ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "rope.dimension_count"],
)
def test_absurd_sizes(name: str, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in (MOST[name], MOST[name] + 1, 2**31 - 1, 2**32 - 1):
        path.write_bytes(tiny_model.read_bytes())
        reader = GGUFReader(path, "r+")
        reader.fields[f"llama.{name}"].parts[-1][0] = size
        del reader
        if size == MOST[name]:
            open_model(path)
            continue
        with pytest.raises(ModelError) as caught:
            open_model(path)
        expected = f"model {path}: states {name} {size}, expected at most {MOST[name]}; the file is damaged"
        assert str(caught.value) == expected


def test_all_files_count(tiny_model: Path) -> None:
    assert open_model(tiny_model).n_bytes == tiny_model.stat().st_size


def test_a_name_that_is_not_utf8(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    path.write_bytes(tiny_model.read_bytes())
    with pytest.raises(ModelError, match=r"llama\.cpp takes paths in UTF-8 only; rename it or its folder$") as caught:
        open_model(path)
    str(caught.value).encode()  # it can be printed


def test_a_sidecar_beside_the_file_that_a_link_names(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_model("blob.gguf")
    link = tmp_path / "links" / "model.gguf"
    link.parent.mkdir()
    link.symlink_to(model)
    assert find_sidecar(link) is None
    beside = tmp_path / "blob.xkv.gguf"
    beside.touch()
    assert find_sidecar(link) == beside
