"""Sidecars that the front refuses: damaged, of another version, of another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xkv_gguf import Llama
from xkv_gguf.errors import SidecarError, SidecarMismatchError, SidecarVersionError
from xkv_gguf.sidecar.info import FORMAT_VERSION
from xkv_gguf.sidecar.read import DIGEST_AT, file_digest, read_sidecar

from .refused import refused


def damaged(sidecar: Path, to: Path, change: Callable[[bytearray], None], sign: bool = False) -> dict[str, str]:
    """Options with a changed copy of the sidecar; with `sign`, its digest fits again."""
    data = bytearray(sidecar.read_bytes())
    change(data)
    to.write_bytes(data)
    if sign:
        data[DIGEST_AT : DIGEST_AT + 64] = file_digest(to).encode()
        to.write_bytes(data)
    return {"sidecar": str(to)}


def test_a_truncated_sidecar(demo_model: Path, sidecar: Path, tmp_path: Path) -> None:
    for size in (3, 100, sidecar.stat().st_size - 1):
        options = damaged(sidecar, tmp_path / "t.xkv.gguf", lambda data, size=size: data.__delitem__(slice(size, None)))
        with pytest.raises(SidecarError, match=r"truncated|not a GGUF") as caught:
            Llama(demo_model, xkv=options)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit(demo_model: Path, sidecar: Path, tmp_path: Path) -> None:
    def flip(data: bytearray) -> None:
        data[len(data) // 2] ^= 16

    options = damaged(sidecar, tmp_path / "f.xkv.gguf", flip)
    refused(SidecarError, "truncated or damaged", lambda: Llama(demo_model, xkv=options))


def test_a_newer_sidecar(demo_model: Path, sidecar: Path, tmp_path: Path) -> None:
    key = b"xkv.format_version"

    def renumber(data: bytearray) -> None:
        data[data.index(key) + len(key) + 4] = 99

    options = damaged(sidecar, tmp_path / "n.xkv.gguf", renumber, sign=True)
    refused(SidecarVersionError, "format version 99", lambda: Llama(demo_model, xkv=options))


def test_an_older_sidecar(demo_model: Path, sidecar: Path, tmp_path: Path) -> None:
    key = b"xkv.format_version"

    def renumber(data: bytearray) -> None:
        data[data.index(key) + len(key) + 4] = 1

    options = damaged(sidecar, tmp_path / "o.xkv.gguf", renumber, sign=True)
    refused(SidecarVersionError, f"is older than {FORMAT_VERSION}", lambda: Llama(demo_model, xkv=options))


def test_the_sidecar_of_another_model(demo_model: Path, sidecar: Path, tmp_path: Path) -> None:
    fingerprint = read_sidecar(sidecar).info.fingerprint.encode()

    def rename(data: bytearray) -> None:
        at = data.index(fingerprint)
        data[at : at + 8] = b"00000000"

    options = damaged(sidecar, tmp_path / "o.xkv.gguf", rename, sign=True)
    refused(SidecarMismatchError, "made for a model with fingerprint 00000000", lambda: Llama(demo_model, xkv=options))
