from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType

from xkv_gguf.errors import OptionError, SidecarError, SidecarMismatchError, SidecarVersionError
from xkv_gguf.model.fingerprint import model_fingerprint
from xkv_gguf.plan.segments import KINDS
from xkv_gguf.sidecar import write
from xkv_gguf.sidecar.info import Calibration, Group, sidecar_beside, tensor_name
from xkv_gguf.sidecar.read import DIGEST_AT, read_sidecar
from xkv_gguf.sidecar.write import write_sidecar

from ..small_sidecar import small_arrays, small_info

GOLDEN = Path(__file__).parent / "data" / "golden-v5.sidecar"

Reseal = Callable[[Path, bytes], None]


def refused(path: Path, match: str, kind: type[SidecarError] = SidecarError) -> None:
    with pytest.raises(kind, match=match) as err:
        read_sidecar(path)
    assert "\n" not in str(err.value)
    assert str(path) in str(err.value)


def field_at(data: bytes, key: str) -> int:
    """Offset of a scalar field's value."""
    needle = struct.pack("<Q", len(key)) + key.encode()
    assert data.count(needle) == 1
    return data.index(needle) + len(needle) + 4


def array_at(data: bytes, key: str) -> int:
    """Offset of an array field's first entry."""
    return field_at(data, key) + 12


def put(data: bytes, at: int, value: float, fmt: str = "<I") -> bytes:
    return data[:at] + struct.pack(fmt, value) + data[at + struct.calcsize(fmt) :]


def test_golden_bytes(sidecar_file: Path) -> None:
    assert sidecar_file.read_bytes() == GOLDEN.read_bytes()


def test_golden_file_reads_back() -> None:
    found = read_sidecar(GOLDEN)
    assert found.info == small_info()
    arrays = small_arrays(found.info)
    for g in range(2):
        for kind in KINDS:
            np.testing.assert_array_equal(found.basis(g, kind), arrays[tensor_name(g, kind, "basis")])
            np.testing.assert_array_equal(found.mean(g, kind), arrays[tensor_name(g, kind, "mean")])
            np.testing.assert_array_equal(found.spectrum(g, kind), arrays[tensor_name(g, kind, "spectrum")])
    assert found.basis(0, "k").dtype == np.float16
    assert GOLDEN.read_bytes()[DIGEST_AT : DIGEST_AT + 64].decode() == found.digest


def test_reference_reader_agrees() -> None:
    reader = GGUFReader(GOLDEN)
    names = [t.name for t in reader.tensors]
    assert names[:3] == ["group.0.k.basis", "group.0.k.mean", "group.0.k.spectrum"]
    assert list(reader.tensors[0].data.shape) == [32, 48]
    weights = reader.fields["xkv.group.weight_v"]
    assert [float(weights.parts[i][0]) for i in weights.data] == [0.25, 2.0]
    assert reader.fields["xkv.group.weight_v"].types == [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]
    assert reader.fields["xkv.plan.value"].contents() == "6.5"
    assert reader.fields["xkv.embd_k"].types == [GGUFValueType.ARRAY, GGUFValueType.UINT32]


def test_f32_basis_and_empty_name(tmp_path: Path) -> None:
    info = small_info(name="")
    arrays = {k: v.astype(np.float32) for k, v in small_arrays(info).items()}
    write_sidecar(tmp_path / "a", info, arrays)
    found = read_sidecar(tmp_path / "a")
    assert found.info.name == ""
    assert found.basis(1, "v").dtype == np.float32


def test_statistics() -> None:
    found = read_sidecar(GOLDEN)
    stats = found.statistics()
    assert (stats.layers, stats.frame, stats.kld_scale) == (((0, 1), (2,)), 32, 0.125)
    assert stats.weights == {"k": (1.5, 1.0), "v": (0.25, 2.0)}
    sources = [(g, kind) for g in range(2) for kind in KINDS]
    assert [stats.dim(*source) for source in sources] == [48, 32, 24, 16]
    assert (
        [stats.most(*source) for source in sources] == [found.held(*source) for source in sources] == [32, 32, 24, 16]
    )
    np.testing.assert_array_equal(stats.spectra["k"][1], found.spectrum(1, "k"))


def test_check_model(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model()
    info = small_info(fingerprint=model_fingerprint(model))
    write_sidecar(tmp_path / "s", info, small_arrays(info))
    read_sidecar(tmp_path / "s").check_model(model)
    with pytest.raises(SidecarMismatchError, match="made for a model with fingerprint"):
        read_sidecar(tmp_path / "s").check_model(make_model("other.gguf", seed=1))


def test_beside() -> None:
    assert sidecar_beside("a/b.Q4_1.gguf") == Path("a/b.Q4_1.xkv.gguf")
    assert sidecar_beside("a/b") == Path("a/b.xkv.gguf")


# ---- malformed files


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "none.xkv.gguf", "no such file; make it with")


def test_folder(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04" * 100])
def test_not_gguf(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(data)
    refused(path, "is not a GGUF file")


def test_model_given_as_sidecar(make_model: Callable[..., Path]) -> None:
    refused(make_model(), "not an xkv sidecar")


def test_truncated_everywhere(sidecar_file: Path) -> None:
    data = sidecar_file.read_bytes()
    for size in [*range(4, 400, 13), *range(400, len(data), 509), len(data) - 1]:
        sidecar_file.write_bytes(data[:size])
        refused(sidecar_file, "truncated")


def test_bit_flip_anywhere(sidecar_file: Path) -> None:
    data = sidecar_file.read_bytes()
    rng = np.random.default_rng(4)
    positions = [*range(DIGEST_AT + 80), *rng.integers(0, len(data), 300)]
    for at in positions:
        bad = bytearray(data)
        bad[at] ^= 1 << int(rng.integers(8))
        sidecar_file.write_bytes(bad)
        refused(sidecar_file, "sidecar")


def test_appended_bytes(sidecar_file: Path) -> None:
    sidecar_file.write_bytes(sidecar_file.read_bytes() + b"\0")
    refused(sidecar_file, "digest does not match")


def test_newer_version(sidecar_file: Path, reseal: Reseal) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, field_at(data, "xkv.format_version"), 6))
    refused(sidecar_file, "format version 6, this xkv-gguf reads 5; update xkv-gguf", SidecarVersionError)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4])
def test_older_version(sidecar_file: Path, reseal: Reseal, version: int) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, field_at(data, "xkv.format_version"), version))
    match = f"format version {version}, which is older than 5, .*make it again with `xkv-gguf convert MODEL`"
    refused(sidecar_file, match, SidecarVersionError)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("xkv.frame", 0, "frame 0, one of 32"),
        ("xkv.frame", 96, "frame 96, one of 32"),
        ("xkv.frame", 512, "frame 512, one of 32"),
        ("xkv.group_size", 0, "group size 0"),
        ("xkv.group_size", 4, "group size 4"),
        ("xkv.group_size", 1, "group 0 has 2 layers, 1 to 1 expected"),
        ("xkv.layer_count", 0, "expected"),
        ("xkv.layer_count", 4, "field xkv.embd_k has 3 entries, 4 expected"),
        ("xkv.plan.n_ctx", 0, "a plan for a context of 0 tokens"),
    ],
)
def test_impossible_value(sidecar_file: Path, reseal: Reseal, key: str, value: int, match: str) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, field_at(data, key), value))
    refused(sidecar_file, match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("xkv.group.layers", 1, "group 0 has layers 1, 1, ascending ones"),
        ("xkv.group.layers", 9, "group 0 has layers 9, 1"),
        ("xkv.group.count", 0, "field xkv.group.layers has 3 entries, 1 expected"),
        ("xkv.embd_k", 0, "layer 0 has 0 numbers of K and 16 of V"),
        ("xkv.embd_k", 25, "tensor group.0.k.basis is F16"),
    ],
)
def test_impossible_array(sidecar_file: Path, reseal: Reseal, key: str, value: int, match: str) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, array_at(data, key), value))
    refused(sidecar_file, match)


def test_layers_in_any_groups(tmp_path: Path) -> None:
    """Groups need not be neighbours, and a layer without K and V is in none."""
    info = small_info(
        embd_k=(24, 0, 16, 24), embd_v=(8, 0, 8, 8), groups=(Group((0, 3)), Group((2,))), scale_k=(), scale_v=()
    )
    arrays = small_arrays(info)
    path = tmp_path / "s.xkv.gguf"
    write_sidecar(path, info, arrays)
    found = read_sidecar(path)
    assert found.info == info
    assert found.info.dim(0, "k") == 48
    for groups, match in (
        ((Group((0, 3)),), "no group for layer 2"),
        ((Group((0, 3)), Group((1, 2))), "group 1 has layers 1, 2"),
        ((Group((3, 0)), Group((2,))), "group 0 has layers 3, 0"),
        ((Group((0, 3)), Group((2,)), Group(())), "group 2 has 0 layers"),
    ):
        with pytest.raises(ValueError, match=match):
            write_sidecar(path, dataclasses.replace(info, groups=groups), arrays)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weight(sidecar_file: Path, reseal: Reseal, value: float) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, array_at(data, "xkv.group.weight_v"), value, "<f"))
    refused(sidecar_file, f"group 0 has V weight {value:g}, a finite number above 0 expected")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scale(sidecar_file: Path, reseal: Reseal, value: float) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, array_at(data, "xkv.scale_k"), value, "<f"))
    refused(sidecar_file, f"layer 0 has K scale {value:g}, a finite number above 0 expected")


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_impossible_divergence_scale(sidecar_file: Path, reseal: Reseal, value: float) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, field_at(data, "xkv.kld_scale"), value, "<f"))
    refused(sidecar_file, f"divergence scale {value:g}, 0 or a finite number above expected")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"ratio", b"ratia", "plan 'ratia': one of ratio, coef_ratio, budget, quality expected"),
        (b"6.5", b"six", "ratio: 'six', expected a number of 1 or more"),
        (b"6.5", b"0.0", "ratio: '0.0', expected a number of 1 or more"),
        (b"6.5", b"nan", "ratio: 'nan', expected a number of 1 or more"),
    ],
)
def test_impossible_size_target(sidecar_file: Path, reseal: Reseal, old: bytes, new: bytes, match: str) -> None:
    data = sidecar_file.read_bytes()
    old, new = (len(text).to_bytes(8, "little") + text for text in (old, new))
    assert data.count(old) == 1
    reseal(sidecar_file, data.replace(old, new))
    refused(sidecar_file, match)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_absurd_array_length(sidecar_file: Path, reseal: Reseal, length: int) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, put(data, array_at(data, "xkv.embd_k") - 8, length, "<Q"))
    refused(sidecar_file, "ends inside the value of 'xkv.embd_k'")


@pytest.mark.parametrize(("at", "match"), [(8, "claims"), (16, "claims")])
def test_absurd_counts(sidecar_file: Path, reseal: Reseal, at: int, match: str) -> None:
    reseal(sidecar_file, put(sidecar_file.read_bytes(), at, 2**60, "<Q"))
    refused(sidecar_file, match)


def test_missing_field(sidecar_file: Path, reseal: Reseal) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, data.replace(b"xkv.settings", b"xkv.settingz"))
    refused(sidecar_file, "has no field xkv.settings")


def test_field_of_another_type(sidecar_file: Path, reseal: Reseal) -> None:
    data = sidecar_file.read_bytes()
    at = field_at(data, "xkv.frame")
    reseal(sidecar_file, put(data, at - 4, int(GGUFValueType.INT32)))
    refused(sidecar_file, "field xkv.frame has another type than UINT32")


def test_settings_that_are_not_json(sidecar_file: Path, reseal: Reseal) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, data.replace(b'{"data"', b'["data"'))
    refused(sidecar_file, "xkv.settings is not JSON")


def test_missing_and_unknown_tensor(sidecar_file: Path, reseal: Reseal) -> None:
    data = sidecar_file.read_bytes()
    reseal(sidecar_file, data.replace(b"group.1.v.mean", b"group.7.v.mean"))
    refused(sidecar_file, "unknown tensor group.7.v.mean")
    reseal(sidecar_file, data.replace(b"group.1.v.mean", b"group.1.v.basis"[:14]))
    refused(sidecar_file, "tensor")


def test_tensor_of_another_type(sidecar_file: Path, reseal: Reseal) -> None:
    data = sidecar_file.read_bytes()
    at = data.index(b"group.0.k.basis") + len("group.0.k.basis") + 4 + 16
    assert data[at : at + 4] == struct.pack("<I", 1)
    reseal(sidecar_file, put(data, at, 30))  # bf16 has the same size
    refused(sidecar_file, r"tensor group.0.k.basis is BF16 \[48, 32\], F16 or F32 \[48, 32\] expected")


@pytest.mark.parametrize(("rows", "found"), [(0, 0), (49, 49), (2**40, 2**40)])
def test_impossible_number_of_directions(sidecar_file: Path, reseal: Reseal, rows: int, found: int) -> None:
    """None, more than there are numbers, or more than the file has room for."""
    data = sidecar_file.read_bytes()
    at = data.index(b"group.0.k.basis") + len("group.0.k.basis") + 4 + 8
    assert data[at : at + 8] == struct.pack("<Q", 32)
    reseal(sidecar_file, put(data, at, rows, "<Q"))
    refused(sidecar_file, rf"tensor group\.0\.k\.basis is F16 \[48, {found}\]|tensor|dimension")


@pytest.mark.parametrize(("value", "match"), [(float("nan"), "not finite"), (-1.0, "does not descend")])
def test_impossible_spectrum(sidecar_file: Path, reseal: Reseal, value: float, match: str) -> None:
    data = sidecar_file.read_bytes()
    at = data.index(struct.pack("<4f", *np.exp2(-np.arange(4, dtype=np.float32) / 4)))
    reseal(sidecar_file, data[: at + 4] + struct.pack("<f", value) + data[at + 8 :])
    refused(sidecar_file, match)


def test_fuzz_behind_a_valid_digest(sidecar_file: Path, reseal: Reseal) -> None:
    """Random damage with a matching digest is read or refused, but raises nothing else."""
    data = sidecar_file.read_bytes()
    rng = np.random.default_rng(5)
    header_end = 2200
    n_refused = 0
    for _ in range(800):
        bad = bytearray(data[: int(rng.integers(250, len(data)))] if rng.random() < 0.1 else data)
        for at in rng.integers(24, min(header_end, len(bad)), size=rng.integers(1, 5)):
            bad[at] = rng.choice([0, 1, 2, 8, 9, 127, 128, 255, int(rng.integers(256))])
        reseal(sidecar_file, bytes(bad))
        try:
            read_sidecar(sidecar_file)
        except SidecarError as err:
            n_refused += 1
            assert "\n" not in str(err)
    assert n_refused > 400


# ---- writing


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    info = small_info()
    for name in ("a", "b"):
        write_sidecar(tmp_path / name, info, small_arrays(info))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_write_leaves_the_old_file(sidecar_file: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    before = sidecar_file.read_bytes()

    def fail(path: Path) -> str:
        raise error

    monkeypatch.setattr(write, "file_digest", fail)
    info = small_info(name="new")
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else SidecarError):
        write_sidecar(sidecar_file, info, small_arrays(info))
    assert list(sidecar_file.parent.iterdir()) == [sidecar_file]
    assert sidecar_file.read_bytes() == before


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    info = small_info()
    with pytest.raises(OptionError, match=r"the folder .*none does not exist"):
        write_sidecar(tmp_path / "none" / "s", info, small_arrays(info))
    with pytest.raises(OptionError, match="is a folder"):
        write_sidecar(tmp_path, info, small_arrays(info))


@pytest.mark.parametrize(
    "changes",
    [
        {"frame": 33},
        {"groups": (Group((0, 1)),)},
        {"groups": (Group((0, 1), 0.0), Group((2,)))},
        {"groups": (Group((0, 1)), Group((2,), 1.0, float("nan")))},
        {"calibration": Calibration("web", 1, 0, 1, "")},
        {"kld_scale": float("nan")},
        {"n_ctx": 0},
    ],
)
def test_impossible_values_are_not_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    info = small_info(**changes)
    with pytest.raises(ValueError):
        write_sidecar(tmp_path / "s", info, small_arrays(small_info()))
    assert not (tmp_path / "s").exists()
