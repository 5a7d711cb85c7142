"""Sidecars of layers whose V is a part of K."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from xkv_gguf.sidecar.read import read_sidecar
from xkv_gguf.sidecar.write import write_sidecar

from ..small_sidecar import small_arrays, small_info
from .test_sidecar import Reseal, array_at, put, refused


def test_without_v(tmp_path: Path) -> None:
    info = small_info(embd_v=(0, 0, 0), scale_v=())
    write_sidecar(tmp_path / "s", info, small_arrays(info))
    found = read_sidecar(tmp_path / "s")
    assert found.info == info
    assert [found.info.kinds(g) for g in range(2)] == [("k",), ("k",)]
    assert {t.name.split(".")[2] for t in GGUFReader(tmp_path / "s").tensors} == {"k"}
    stats = found.statistics()
    assert [(stats.dim(g, "v"), stats.most(g, "v")) for g in range(2)] == [(0, 0), (0, 0)]


def test_v_in_some_groups_only(tmp_path: Path) -> None:
    info = small_info(embd_v=(16, 16, 0))
    write_sidecar(tmp_path / "s", info, small_arrays(info))
    assert [read_sidecar(tmp_path / "s").info.kinds(g) for g in range(2)] == [("k", "v"), ("k",)]


@pytest.mark.parametrize(
    ("embd_k", "embd_v", "match"),
    [
        ((24, 24, 24), (16, 0, 16), "group 0 has layers with V and without"),
        ((24, 24, 0), (16, 16, 16), "layer 2 has 0 numbers of K and 16 of V, none without K expected"),
    ],
)
def test_impossible_kinds_of_layers(
    embd_k: tuple[int, ...], embd_v: tuple[int, ...], match: str, tmp_path: Path
) -> None:
    info = small_info(embd_k=embd_k, embd_v=embd_v)
    with pytest.raises(ValueError, match=match):
        write_sidecar(tmp_path / "s", info, small_arrays(info))


def test_arrays_of_v_that_is_a_part_of_k(tmp_path: Path, reseal: Reseal) -> None:
    """A file of both kinds whose layers say that there is no V."""
    info = small_info()
    write_sidecar(tmp_path / "s", info, small_arrays(info))
    data = (tmp_path / "s").read_bytes()
    at = array_at(data, "xkv.embd_v")
    for il in range(3):
        data = put(data, at + 4 * il, 0)
    reseal(tmp_path / "s", data)
    refused(tmp_path / "s", "unknown tensor group.0.v.basis")
