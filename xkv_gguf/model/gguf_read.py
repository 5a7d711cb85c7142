"""Bounds-checked reader of GGUF headers.

The ``gguf`` package's own reader trusts lengths in the file: damaged bytes make it raise odd exceptions, loop for hours
or allocate without bound. This one checks every length against the file's size first and raises one exception type.
It reads the header only; tensor data is mapped on demand.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# numbers and bytes of a block, of types that llama.cpp has and a gguf package may not know yet, or has otherwise (q8_1)
_NEWER_SIZES = {9: (32, 36), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)}
TYPE_SIZES: dict[int, tuple[int, int]] = {int(t): size for t, size in GGML_QUANT_SIZES.items()} | _NEWER_SIZES
"""Numbers and bytes of a block of each type that is known."""

_SCALARS: dict[GGUFValueType, tuple[str, int]] = {
    GGUFValueType.UINT8: ("<B", 1),
    GGUFValueType.INT8: ("<b", 1),
    GGUFValueType.UINT16: ("<H", 2),
    GGUFValueType.INT16: ("<h", 2),
    GGUFValueType.UINT32: ("<I", 4),
    GGUFValueType.INT32: ("<i", 4),
    GGUFValueType.FLOAT32: ("<f", 4),
    GGUFValueType.UINT64: ("<Q", 8),
    GGUFValueType.INT64: ("<q", 8),
    GGUFValueType.FLOAT64: ("<d", 8),
    GGUFValueType.BOOL: ("<?", 1),
}


class GgufFormatError(Exception):
    """The bytes are not a GGUF file that can be read; the text is one line without the file's name."""


@dataclass(frozen=True)
class GgufValue:
    """One metadata value.

    Attributes
    ----------
    type : GGUFValueType
        Type of the value; of the elements for an array.
    value : int, float, bool, str or numpy.ndarray
        Arrays of numbers are 1-d numpy arrays. Arrays of strings are not kept: their value is their length.
    is_array : bool
    """

    type: GGUFValueType
    value: Any
    is_array: bool = False


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes
    ----------
    name : str
    type : int
        Of enum ggml_type; need not be known here: only llama.cpp has to know it.
    shape : tuple of int
        In ggml order, fastest dimension first.
    offset : int
        From the file's start.
    n_bytes : int
        Of a type that is not known, all up to the next tensor.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table of a GGUF file."""

    path: Path
    version: int
    fields: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]
    data_offset: int
    file_size: int

    def scalar(self, key: str, default: Any = None) -> Any:
        """Value of a scalar or string field, `default` when the key is absent or an array."""
        field = self.fields.get(key)
        return default if field is None or field.is_array else field.value


class _Cursor:
    """Reads little-endian values from a buffer and refuses to pass its end."""

    def __init__(self, data: mmap | bytes) -> None:
        self.data = data
        self.size = len(data)
        self.pos = 0

    def take(self, n: int, what: str) -> int:
        """Advance by `n` bytes and return where they began."""
        start = self.pos
        if n > self.size - start:
            raise GgufFormatError(f"ends inside {what}: {self.size} bytes, at least {start + n} expected")
        self.pos = start + n
        return start

    def scalar(self, vtype: GGUFValueType, what: str) -> Any:
        fmt, n = _SCALARS[vtype]
        return struct.unpack_from(fmt, self.data, self.take(n, what))[0]

    def u32(self, what: str) -> int:
        return int(self.scalar(GGUFValueType.UINT32, what))

    def u64(self, what: str) -> int:
        return int(self.scalar(GGUFValueType.UINT64, what))

    def skip_string(self, what: str) -> tuple[int, int]:
        n = self.u64(what)
        return self.take(n, what), n

    def string(self, what: str) -> str:
        start, n = self.skip_string(what)
        try:
            return bytes(self.data[start : start + n]).decode("utf-8")
        except UnicodeDecodeError as err:
            raise GgufFormatError(f"{what} is not UTF-8") from err


def _value_type(raw: int, what: str) -> GGUFValueType:
    try:
        return GGUFValueType(raw)
    except ValueError as err:
        raise GgufFormatError(f"{what} has the unknown type {raw}") from err


def _read_value(cur: _Cursor, key: str) -> GgufValue:
    what = f"the value of {key!r}"
    vtype = _value_type(cur.u32(what), what)
    if vtype == GGUFValueType.STRING:
        return GgufValue(vtype, cur.string(what))
    if vtype != GGUFValueType.ARRAY:
        return GgufValue(vtype, cur.scalar(vtype, what))
    etype = _value_type(cur.u32(what), what)
    n = cur.u64(what)
    if etype == GGUFValueType.STRING:
        if n * 8 > cur.size - cur.pos:
            raise GgufFormatError(f"ends inside {what}: {n} strings cannot fit")
        for _ in range(n):
            cur.skip_string(what)
        return GgufValue(etype, n, is_array=True)
    if etype == GGUFValueType.ARRAY:
        raise GgufFormatError(f"{what} is an array of arrays")
    fmt, size = _SCALARS[etype]
    start = cur.take(n * size, what)
    values = np.frombuffer(cur.data, dtype=np.dtype(fmt), count=n, offset=start).copy()
    return GgufValue(etype, values, is_array=True)


def _read_tensor(cur: _Cursor) -> tuple[str, int, tuple[int, ...], int, int | None]:
    name = cur.string("a tensor's name")
    what = f"the tensor entry {name!r}"
    n_dims = cur.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise GgufFormatError(f"{what} has {n_dims} dimensions, 1 to {MAX_DIMS} expected")
    shape = tuple(cur.u64(what) for _ in range(n_dims))
    ttype = cur.u32(what)
    offset = cur.u64(what)
    if ttype not in TYPE_SIZES:
        return name, ttype, shape, offset, None
    block, block_bytes = TYPE_SIZES[ttype]
    if shape[0] % block:
        raise GgufFormatError(f"{what} has rows of {shape[0]}, a multiple of {block} expected for {type_name(ttype)}")
    return name, ttype, shape, offset, math.prod(shape) // block * block_bytes


def type_name(ttype: int) -> str:
    """Name of a tensor type for people."""
    try:
        return GGMLQuantizationType(ttype).name
    except ValueError:
        return f"type {ttype}"


def _parse(path: Path, data: mmap | bytes) -> GgufHeader:
    cur = _Cursor(data)
    start = cur.take(4, "the magic number")
    if bytes(data[start : start + 4]) != MAGIC:
        raise GgufFormatError("does not begin with the GGUF magic number")
    version = cur.u32("the version")
    if version not in VERSIONS:
        big_endian = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise GgufFormatError(f"is GGUF version {version}{big_endian}, 2 or 3 expected")
    n_tensors = cur.u64("the tensor count")
    n_fields = cur.u64("the field count")
    # the smallest entry of either table takes more than 12 bytes
    if (n_tensors + n_fields) * 12 > cur.size:
        raise GgufFormatError(f"claims {n_tensors} tensors and {n_fields} fields, more than {cur.size} bytes can hold")
    fields: dict[str, GgufValue] = {}
    for _ in range(n_fields):
        key = cur.string("a field's key")
        if key in fields:
            raise GgufFormatError(f"has the field {key!r} twice")
        fields[key] = _read_value(cur, key)
    entries = [_read_tensor(cur) for _ in range(n_tensors)]

    align_field = fields.get("general.alignment")
    alignment = DEFAULT_ALIGNMENT
    if align_field is not None:
        alignment = align_field.value if align_field.type == GGUFValueType.UINT32 and not align_field.is_array else 0
    if alignment <= 0 or alignment & (alignment - 1):
        raise GgufFormatError("has an alignment that is not a power of two")
    data_offset = (cur.pos + alignment - 1) // alignment * alignment
    begins = sorted({data_offset + offset for _, _, _, offset, _ in entries} | {cur.size})
    tensors: dict[str, GgufTensor] = {}
    for name, ttype, shape, offset, size in entries:
        if name in tensors:
            raise GgufFormatError(f"has the tensor {name!r} twice")
        if offset % alignment:
            raise GgufFormatError(f"has the tensor {name!r} at an unaligned offset")
        begin = data_offset + offset
        n_bytes = size if size is not None else begins[min(bisect(begins, begin), len(begins) - 1)] - begin
        if n_bytes < 0 or begin + n_bytes > cur.size:
            raise GgufFormatError(
                f"ends inside the tensor {name!r}: {cur.size} bytes, at least {begin + max(n_bytes, 0)} expected"
            )
        tensors[name] = GgufTensor(name, ttype, shape, begin, n_bytes)
    return GgufHeader(path, version, fields, tensors, data_offset, cur.size)


def read_header(path: Path) -> GgufHeader:
    """Read the metadata and the tensor table of a GGUF file.

    Raises
    ------
    GgufFormatError
        Whatever is wrong with the bytes, in one line without the file's name.
    OSError
        The file cannot be opened.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise GgufFormatError("is empty")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _parse(path, data)
