from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from xkv_gguf.errors import ModelError
from xkv_gguf.model.fingerprint import model_fingerprint, read_model_header
from xkv_gguf.model.gguf_read import TYPE_SIZES, GgufFormatError, read_header
from xkv_gguf.runtime import loader

MakeModel = Callable[..., Path]


def test_is_the_specified_hash(make_model: MakeModel) -> None:
    path = make_model()
    digest = hashlib.sha256()
    for t in sorted(GGUFReader(path).tensors, key=lambda t: t.name):
        name = t.name.encode()
        shape = [int(n) for n in t.shape]
        data = t.data.tobytes()
        digest.update(struct.pack("<Q", len(name)) + name + struct.pack("<II", t.tensor_type, len(shape)))
        digest.update(struct.pack(f"<{len(shape)}Q", *shape) + data[:4096] + data[-4096:])
    assert model_fingerprint(path) == digest.hexdigest()


def test_metadata_does_not_count_but_weights_do(make_model: MakeModel) -> None:
    one = model_fingerprint(make_model("a.gguf"))
    assert model_fingerprint(make_model("b.gguf", title="renamed")) == one
    assert model_fingerprint(make_model("c.gguf", seed=1)) != one


def test_header_agrees_with_the_reference_reader(make_model: MakeModel) -> None:
    path = make_model()
    ours, theirs = read_header(path), GGUFReader(path)
    assert set(ours.fields) == {k for k in theirs.fields if not k.startswith("GGUF.")}
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.offset, mine.n_bytes, list(mine.shape)) == (t.data_offset, t.n_bytes, list(t.shape))
    assert ours.scalar("general.name") == "toy"
    assert ours.fields["tokenizer.ggml.tokens"].value == 3


def retype(path: Path, name: str, ttype: int) -> None:
    """Give a tensor of two dimensions another type, in the table alone."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", ttype)
    path.write_bytes(data)


@pytest.mark.parametrize("ttype", [max(TYPE_SIZES) + 1, 31, 0xFFFFFFFF])
def test_types_that_only_the_library_knows(ttype: int, make_model: MakeModel) -> None:
    """Whether a tensor's type can be run is llama.cpp's to say: the header is read, and a sidecar can be tied to it."""
    path = make_model()
    before = read_header(path)
    for name, n_bytes in {"blk.1.attn_k.weight": 64 * 64 * 4, "token_embd.weight": 3 * 64 * 2}.items():
        retype(path, name, ttype)
        tensor = read_model_header(path).tensors[name]
        assert (tensor.type, tensor.n_bytes, tensor.offset) == (ttype, n_bytes, before.tensors[name].offset)
    assert len(model_fingerprint(path)) == 64
    with path.open("r+b") as file:
        file.truncate(before.tensors["token_embd.weight"].offset - 1)
    with pytest.raises(ModelError, match="ends inside the tensor"):
        read_model_header(path)


def test_sizes_of_types_are_the_librarys() -> None:
    """All that it has, so that a newer gguf package reads no other bytes for a fingerprint."""
    loader.load()
    base = ctypes.CDLL(str(next(loader.LIB_DIR.glob("libggml-base.*"))))
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    sizes = {t: (base.ggml_blck_size(t), base.ggml_type_size(t)) for t in range(max(TYPE_SIZES) + 1)}
    assert {t: size for t, size in sizes.items() if size[0] > 0} == TYPE_SIZES


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf: no such file"):
        model_fingerprint(tmp_path / "none.gguf")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        model_fingerprint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"GG", b"hello, this is no model at all", b"GGUF" + bytes(4)])
def test_not_a_gguf(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="a GGUF model file is expected") as err:
        model_fingerprint(path)
    assert "\n" not in str(err.value)


def test_sidecar_given_as_model(sidecar_file: Path) -> None:
    with pytest.raises(ModelError, match="is an xkv sidecar"):
        read_model_header(sidecar_file)


def test_truncated_anywhere(make_model: MakeModel, tmp_path: Path) -> None:
    data = make_model().read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 600, 7), *range(600, len(data) - 64, 1009)]:
        path.write_bytes(data[:size])
        with pytest.raises(ModelError):
            model_fingerprint(path)


def test_damaged_header_never_raises_anything_else(make_model: MakeModel, tmp_path: Path) -> None:
    data = make_model().read_bytes()
    path = tmp_path / "bad.gguf"
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(600):
        bad = bytearray(data)
        for at in rng.integers(0, 560, size=rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        path.write_bytes(bad)
        try:
            read_header(path)
        except GgufFormatError as err:
            refused += 1
            assert "\n" not in str(err)
    assert refused > 100


def test_split_model(make_model: MakeModel, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    def shard(no: int) -> Path:
        path = tmp_path / f"m-{no:05d}-of-00002.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"blk.{no}.weight", np.full((32,), no, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    first = shard(1)
    with pytest.raises(ModelError, match=r"part m-00002-of-00002\.gguf is missing"):
        model_fingerprint(first)
    second = shard(2)
    assert len(model_fingerprint(first)) == 64
    with pytest.raises(ModelError, match="is part 2 of 2; name the first part"):
        model_fingerprint(second)
    with pytest.raises(ModelError, match="is not named"):
        model_fingerprint(first.rename(tmp_path / "other.gguf"))
