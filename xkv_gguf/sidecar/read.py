"""The sidecar file as an object: metadata, and arrays that are read when asked for. FORMAT.md specifies the bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from ..errors import SidecarError, SidecarMismatchError, SidecarVersionError
from ..model.fingerprint import model_fingerprint
from ..model.gguf_read import GgufFormatError, GgufHeader, GgufTensor, read_header, type_name
from ..plan.segments import KINDS, Kind, Statistics
from ..plan.size_target import SizeTarget
from .info import ARCHITECTURE, FILE_TYPE, FORMAT_VERSION, Calibration, Group, SidecarInfo, check_info, tensor_name

REMAKE = "make it again with `xkv-gguf convert MODEL`"

Array = npt.NDArray[Any]


def _string(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


# The file begins with these fields, in this order, in every version of the format: the digest stands at a fixed place
# and damage is found before anything else in the file is believed.
_ARCH_FIELD = _string("general.architecture") + GGUFValueType.STRING.to_bytes(4, "little") + _string(ARCHITECTURE)
_VERSION_FIELD = _string("xkv.format_version") + GGUFValueType.UINT32.to_bytes(4, "little")
_DIGEST_FIELD = _string("xkv.digest") + GGUFValueType.STRING.to_bytes(4, "little") + (64).to_bytes(8, "little")
_ARCH_AT = 24
_VERSION_AT = _ARCH_AT + len(_ARCH_FIELD) + len(_VERSION_FIELD)
DIGEST_AT = _VERSION_AT + 4 + len(_DIGEST_FIELD)
"""Offset of the 64 digest characters in the file."""


@dataclass(frozen=True)
class Sidecar:
    """A validated sidecar file. Arrays are mapped from the file when asked for."""

    path: Path
    info: SidecarInfo
    digest: str
    _header: GgufHeader = field(repr=False)

    def _array(self, group: int, kind: Kind, part: str) -> Array:
        tensor = self._header.tensors[tensor_name(group, kind, part)]
        return _map_tensor(self.path, tensor)

    def basis(self, group: int, kind: Kind) -> Array:
        """First R directions of a group, f16 or f32, shape (R, D): row i is the i-th direction."""
        return self._array(group, kind, "basis")

    def held(self, group: int, kind: Kind) -> int:
        """Directions that the file holds, R."""
        return self._header.tensors[tensor_name(group, kind, "basis")].shape[1]

    def mean(self, group: int, kind: Kind) -> Array:
        """Mean that is subtracted, f32, shape (D,)."""
        return self._array(group, kind, "mean")

    def spectrum(self, group: int, kind: Kind) -> Array:
        """Variance along each direction, f32, shape (D,), descending."""
        return self._array(group, kind, "spectrum")

    def statistics(self) -> Statistics:
        """What a plan needs to know."""
        info = self.info
        spectra: dict[Kind, tuple[Array, ...]] = {
            kind: tuple(
                np.asarray(self.spectrum(g, kind)) if kind in info.kinds(g) else np.zeros(0)
                for g in range(len(info.groups))
            )
            for kind in KINDS
        }
        return Statistics(
            layers=tuple(g.layers for g in info.groups),
            spectra=spectra,
            weights={"k": tuple(g.weight_k for g in info.groups), "v": tuple(g.weight_v for g in info.groups)},
            frame=info.frame,
            kld_scale=info.kld_scale,
            held={
                kind: tuple(self.held(g, kind) if kind in info.kinds(g) else 0 for g in range(len(info.groups)))
                for kind in KINDS
            },
        )

    def check_model(self, model: str | Path) -> None:
        """Check that the sidecar was made for this model file.

        Raises
        ------
        SidecarMismatchError
            It was made for another one.
        ModelError
            The model cannot be read.
        """
        found = model_fingerprint(model)
        if found != self.info.fingerprint:
            raise SidecarMismatchError(
                f"sidecar {self.path}: made for a model with fingerprint {self.info.fingerprint[:12]} "
                f"({self.info.architecture} {self.info.name!r}), but {model} has {found[:12]}; {REMAKE}"
            )


def is_sidecar(path: Path) -> bool:
    """Whether a file begins as a sidecar of any version does; what follows is not read."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_ARCH_AT + len(_ARCH_FIELD))
    except OSError:
        return False
    return head[:4] == b"GGUF" and head[_ARCH_AT:] == _ARCH_FIELD


def file_digest(path: Path) -> str:
    """SHA-256 over a sidecar's bytes with the 64 digest characters read as "0"."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(DIGEST_AT))
        digest.update(b"0" * len(file.read(64)))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _map_tensor(path: Path, tensor: GgufTensor) -> Array:
    dtype = np.dtype("<f2" if tensor.type == GGMLQuantizationType.F16 else "<f4")
    return np.memmap(path, dtype=dtype, mode="r", offset=tensor.offset, shape=tuple(reversed(tensor.shape)))


def _check_frozen_part(path: Path) -> str:
    """Check magic number, digest and version without parsing; return the digest."""
    with path.open("rb") as file:
        head = file.read(DIGEST_AT + 64)
    if head[:4] != b"GGUF":
        raise SidecarError(f"sidecar {path}: is not a GGUF file; {REMAKE}")
    arch = head[_ARCH_AT : _ARCH_AT + len(_ARCH_FIELD)]
    if len(head) == DIGEST_AT + 64 and arch != _ARCH_FIELD:
        raise SidecarError(f"sidecar {path}: is a GGUF file, but not an xkv sidecar; {REMAKE}")
    if len(head) < DIGEST_AT + 64:
        raise SidecarError(
            f"sidecar {path}: is truncated ({len(head)} bytes, at least {DIGEST_AT + 64} expected); {REMAKE}"
        )
    stored = head[DIGEST_AT:]
    found = file_digest(path)
    if stored != found.encode():
        raise SidecarError(f"sidecar {path}: is truncated or damaged (its digest does not match); {REMAKE}")
    at = _ARCH_AT + len(_ARCH_FIELD)
    if head[at:_VERSION_AT] != _VERSION_FIELD or head[_VERSION_AT + 4 : DIGEST_AT] != _DIGEST_FIELD:
        raise SidecarError(f"sidecar {path}: does not begin with its version and digest; {REMAKE}")
    version = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 4], "little")
    if version > FORMAT_VERSION:
        raise SidecarVersionError(
            f"sidecar {path}: has format version {version}, this xkv-gguf reads {FORMAT_VERSION}; "
            "update xkv-gguf or make the sidecar again"
        )
    if version < FORMAT_VERSION:
        raise SidecarVersionError(
            f"sidecar {path}: has format version {version}, which is older than {FORMAT_VERSION}, the one that this "
            f"xkv-gguf reads; {REMAKE}"
        )
    return found


class _Fields:
    """Typed access to metadata; every failure is a ValueError with what was found and expected."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def _get(self, key: str, vtype: GGUFValueType, is_array: bool) -> Any:
        value = self.header.fields.get(key)
        if value is None:
            raise ValueError(f"has no field {key}")
        if value.type != vtype or value.is_array != is_array:
            raise ValueError(f"field {key} has another type than {'an array of ' * is_array}{vtype.name}")
        return value.value

    def u32(self, key: str) -> int:
        return int(self._get(key, GGUFValueType.UINT32, False))

    def u64(self, key: str) -> int:
        return int(self._get(key, GGUFValueType.UINT64, False))

    def f32(self, key: str) -> float:
        return float(self._get(key, GGUFValueType.FLOAT32, False))

    def string(self, key: str) -> str:
        return str(self._get(key, GGUFValueType.STRING, False))

    def array(self, key: str, length: int | None = None) -> list[int]:
        return [int(v) for v in self._entries(key, GGUFValueType.UINT32, length)]

    def floats(self, key: str, length: int) -> list[float]:
        return [float(v) for v in self._entries(key, GGUFValueType.FLOAT32, length)]

    def _entries(self, key: str, vtype: GGUFValueType, length: int | None) -> Any:
        values = self._get(key, vtype, True)
        if length is not None and len(values) != length:
            raise ValueError(f"field {key} has {len(values)} entries, {length} expected")
        return values


def _parse_info(f: _Fields) -> SidecarInfo:
    n_layer = f.u32("xkv.layer_count")
    embd = {kind: tuple(f.array(f"xkv.embd_{kind}", n_layer)) for kind in KINDS}
    scale = {kind: tuple(f.floats(f"xkv.scale_{kind}", n_layer)) for kind in KINDS}
    count = f.array("xkv.group.count")
    n_group = len(count)
    layers = iter(f.array("xkv.group.layers", sum(count)))
    weights = [f.floats(f"xkv.group.weight_{kind}", n_group) for kind in KINDS]
    if f.string("general.type") != FILE_TYPE:
        raise ValueError(f"has general.type {f.string('general.type')!r}, {FILE_TYPE!r} expected")
    text = f.string("xkv.settings")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ValueError("field xkv.settings is not JSON") from err
    if not isinstance(settings, dict):
        raise ValueError("field xkv.settings is not a JSON object")
    return SidecarInfo(
        fingerprint=f.string("xkv.model.fingerprint"),
        architecture=f.string("xkv.model.architecture"),
        name=f.string("xkv.model.name"),
        embd_k=embd["k"],
        embd_v=embd["v"],
        group_size=f.u32("xkv.group_size"),
        frame=f.u32("xkv.frame"),
        n_sink=f.u32("xkv.n_sink"),
        groups=tuple(Group(tuple(islice(layers, n)), *row) for n, *row in zip(count, *weights, strict=True)),
        calibration=Calibration(
            source=f.string("xkv.calibration.source"),
            tokens=f.u64("xkv.calibration.tokens"),
            seed=f.u64("xkv.calibration.seed"),
            n_ctx=f.u32("xkv.calibration.n_ctx"),
            text_sha256=f.string("xkv.calibration.text_sha256"),
        ),
        settings=settings,
        target=SizeTarget(f.string("xkv.plan.knob"), f.string("xkv.plan.value")),
        n_ctx=f.u32("xkv.plan.n_ctx"),
        kld_scale=f.f32("xkv.kld_scale"),
        scale_k=scale["k"],
        scale_v=scale["v"],
    )


def _check_tensors(path: Path, header: GgufHeader, info: SidecarInfo) -> None:
    floats = (GGMLQuantizationType.F16, GGMLQuantizationType.F32)
    expected: dict[str, tuple[tuple[int, ...], tuple[GGMLQuantizationType, ...]]] = {}
    for g in range(len(info.groups)):
        for kind in info.kinds(g):
            dim = info.dim(g, kind)
            basis = header.tensors.get(tensor_name(g, kind, "basis"))
            rank = basis.shape[1] if basis is not None and len(basis.shape) == 2 else dim
            expected[tensor_name(g, kind, "basis")] = ((dim, min(max(rank, 1), dim)), floats)
            expected[tensor_name(g, kind, "mean")] = ((dim,), floats[1:])
            expected[tensor_name(g, kind, "spectrum")] = ((dim,), floats[1:])
    unknown = sorted(set(header.tensors) - set(expected))
    if unknown:
        raise ValueError(f"has the unknown tensor {unknown[0]}")
    for name, (shape, types) in expected.items():
        tensor = header.tensors.get(name)
        if tensor is None:
            raise ValueError(f"has no tensor {name}")
        if tensor.shape != shape or tensor.type not in types:
            raise ValueError(
                f"tensor {name} is {type_name(tensor.type)} {list(tensor.shape)}, "
                f"{' or '.join(t.name for t in types)} {list(shape)} expected"
            )
        if not name.endswith("basis"):
            values = _map_tensor(path, tensor)
            if not np.isfinite(values).all():
                raise ValueError(f"tensor {name} holds values that are not finite")
            if name.endswith("spectrum") and ((values < 0).any() or (np.diff(values) > 0).any()):
                raise ValueError(f"tensor {name} does not descend to 0")


def read_sidecar(path: str | Path) -> Sidecar:
    """Open a sidecar and check all of it.

    Every byte is read once, for the digest.

    Raises
    ------
    SidecarError
        The file is missing, is not a sidecar, is truncated or damaged, or holds impossible values.
    SidecarVersionError
        It has a newer or an older format version.
    """
    path = Path(path)
    try:
        digest = _check_frozen_part(path)
        header = read_header(path)
        info = _parse_info(_Fields(header))
        check_info(info)
        _check_tensors(path, header, info)
    except FileNotFoundError as err:
        raise SidecarError(f"sidecar {path}: no such file; make it with `xkv-gguf convert MODEL`") from err
    except OSError as err:
        raise SidecarError(f"sidecar {path}: cannot be read ({err.strerror or err})") from err
    except (GgufFormatError, ValueError) as err:
        raise SidecarError(f"sidecar {path}: {err}; {REMAKE}") from err
    return Sidecar(path, info, digest, header)
