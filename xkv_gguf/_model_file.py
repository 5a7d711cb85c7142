"""What the front needs to know of a model file before llama.cpp sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .convert.fingerprint import model_shards, read_model_header
from .convert.gguf_read import GgufFormatError, GgufHeader, read_header
from .convert.plan import bytes_per_coef
from .errors import ModelError


@dataclass(frozen=True)
class ModelFile:
    """A GGUF model whose header was read and found sound.

    Attributes
    ----------
    path : Path
    architecture : str
    n_ctx_train : int
        Context that the model was trained with; 0 when the file does not say.
    kv_numbers : int
        Numbers per token that a plain cache keeps, K and V of all layers; 0 when the file does not say or the
        architecture keeps something else.
    """

    path: Path
    architecture: str
    n_ctx_train: int
    kv_numbers: int

    def plain_bytes(self, kv_mode: str, n_ctx: int) -> int:
        """Bytes of a plain cache for `n_ctx` tokens; 0 when unknown."""
        return int(self.kv_numbers * bytes_per_coef(kv_mode) * n_ctx)


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read the header of a GGUF model, and of all files of a split one.

    Raises
    ------
    ModelError
        The file is missing, is not GGUF, is truncated, or is no language model.
    """
    try:
        name = os.fspath(path)
    except TypeError as error:
        raise ModelError(f"model {path!r}: expected the path of a GGUF file") from error
    if not isinstance(name, str) or not name or "\0" in name:
        raise ModelError(f"model {name!r}: expected the path of a GGUF file")
    file = Path(name)
    header = read_model_header(file)
    model_shards(file, header)
    arch = str(header.scalar("general.architecture"))
    n_ctx_train = header.scalar(f"{arch}.context_length", 0)
    return ModelFile(
        path=file,
        architecture=arch,
        n_ctx_train=n_ctx_train if isinstance(n_ctx_train, int) else 0,
        kv_numbers=_kv_numbers(header, arch),
    )


def check_adapter(path: str | os.PathLike[str]) -> None:
    """Check that a file is a GGUF adapter.

    Raises
    ------
    ModelError
        It is missing, is not GGUF, or is something else.
    """
    try:
        header = read_header(Path(path))
    except OSError as error:
        raise ModelError(f"lora_path {path}: cannot be read ({error.strerror})") from error
    except GgufFormatError as error:
        raise ModelError(f"lora_path {path}: {error}; a GGUF adapter is expected") from error
    if header.scalar("general.type") != "adapter":
        raise ModelError(
            f"lora_path {path}: general.type is {header.scalar('general.type')!r}, 'adapter' expected; "
            "convert the adapter with llama.cpp's convert_lora_to_gguf.py"
        )


def _kv_numbers(header: GgufHeader, arch: str) -> int:
    """Numbers of K and V per token by the usual metadata; 0 for latents, recurrent parts, or gaps."""
    other_kinds = (f"{arch}.attention.kv_lora_rank", f"{arch}.ssm.")
    if any(key.startswith(other_kinds) for key in header.fields):
        return 0
    value = _Ints({key.removeprefix(f"{arch}."): field.value for key, field in header.fields.items()})
    n_layer, n_embd, n_head = (value.one(key) for key in ("block_count", "embedding_length", "attention.head_count"))
    if not (n_layer and n_embd and n_head):
        return 0
    head_k = value.one("attention.key_length") or n_embd // n_head
    head_v = value.one("attention.value_length") or n_embd // n_head
    heads = value.per_layer("attention.head_count_kv", n_layer) or n_layer * n_head
    return heads * (head_k + head_v)


@dataclass(frozen=True)
class _Ints:
    """Whole numbers of a header, which may be one for all layers or one for each."""

    fields: Mapping[str, Any]

    def one(self, key: str) -> int:
        value = self.fields.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    def per_layer(self, key: str, n_layer: int) -> int:
        """Sum over the layers."""
        value = self.fields.get(key)
        if isinstance(value, np.ndarray) and value.size == n_layer and value.dtype.kind in "iu":
            return int(value.sum())
        return n_layer * self.one(key)
