"""The hash that ties a sidecar to the model it was calibrated on."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from ..errors import ModelError
from .gguf_read import GgufFormatError, GgufHeader, read_header

SAMPLE_BYTES = 4096
INTEGERS = {
    kind
    for kind in GGUFValueType
    if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)
}
_SHARD = re.compile(r"^(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


MOST = {
    "block_count": 512,  # LLAMA_MAX_LAYERS: llama.cpp aborts the process above
    "embedding_length": 1 << 18,
    "feed_forward_length": 1 << 22,
    "attention.head_count": 1 << 14,
    "attention.head_count_kv": 1 << 14,
    "attention.key_length": 1 << 16,
    "attention.value_length": 1 << 16,
    "rope.dimension_count": 1 << 16,
}
"""The most that a header may state, some ten times what models have: a damaged one costs no hours of planning."""


def read_model_header(path: Path) -> GgufHeader:
    """Read the header of a model file.

    Raises
    ------
    ModelError
        The file is missing, is not GGUF, is truncated, or is no language model.
    """
    header = _read(path, f"model {path}: no such file")
    arch = header.scalar("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise ModelError(f"model {path}: has no general.architecture; a GGUF model file is expected")
    if arch == "xkv":
        raise ModelError(f"model {path}: is an xkv sidecar; name the model file instead")
    for name, most in MOST.items():
        field = header.fields.get(f"{arch}.{name}")
        # of each layer, or of all
        if field is not None and field.type in INTEGERS and np.max(field.value, initial=0) > most:
            found = int(np.max(field.value))
            raise ModelError(f"model {path}: states {name} {found}, expected at most {most}; the file is damaged")
    return header


def model_shards(path: Path, header: GgufHeader) -> list[GgufHeader]:
    """Headers of all files of a split model, in order; one element for a model in one file.

    Raises
    ------
    ModelError
        `path` is not the first shard, or a shard is missing or damaged.
    """
    count = header.scalar("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return [header]
    match = _SHARD.match(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelError(f"model {path}: is split in {count} files, but is not named NAME-00001-of-{count:05d}.gguf")
    if int(match["no"]) != 1:
        raise ModelError(f"model {path}: is part {int(match['no'])} of {count}; name the first part")
    rest = [path.with_name(f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]
    shards = [header]
    for shard in rest:
        shards.append(_read(shard, f"model {path}: its part {shard.name} is missing"))
    return shards


def _read(path: Path, missing: str) -> GgufHeader:
    try:
        return read_header(path)
    except FileNotFoundError as err:
        raise ModelError(missing) from err
    except OSError as err:
        raise ModelError(f"model {path}: cannot be read ({err.strerror or err})") from err
    except GgufFormatError as err:
        raise ModelError(f"model {path}: {err}; a GGUF model file is expected") from err


def model_fingerprint(path: str | Path) -> str:
    """SHA-256 over the model's tensor table and both ends of every tensor's data.

    Parameters
    ----------
    path : str or Path
        GGUF model; of a split model, its first file.

    Returns
    -------
    str
        64 hexadecimal digits. FORMAT.md says exactly which bytes are hashed. Metadata (name, chat template) does not
        count: it may be edited without making the sidecar useless.

    Raises
    ------
    ModelError
        A file is missing or is not a GGUF model.
    """
    path = Path(path)
    parts = []
    for header in model_shards(path, read_model_header(path)):
        parts += [(tensor, header.path) for tensor in header.tensors.values()]
    parts.sort(key=lambda part: part[0].name.encode())
    digest = hashlib.sha256()
    for tensor, file_path in parts:
        name = tensor.name.encode()
        digest.update(struct.pack("<Q", len(name)) + name)
        digest.update(struct.pack("<II", int(tensor.type), len(tensor.shape)))
        digest.update(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape))
        n = min(SAMPLE_BYTES, tensor.n_bytes)
        with file_path.open("rb") as file:
            file.seek(tensor.offset)
            digest.update(file.read(n))
            file.seek(tensor.offset + tensor.n_bytes - n)
            digest.update(file.read(n))
    return digest.hexdigest()
