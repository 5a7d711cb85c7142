"""What the front needs to know of a model file before llama.cpp sees it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError, ModelError, OptionTypeError
from .fingerprint import model_shards, read_model_header
from .gguf_read import GgufFormatError, read_header


@dataclass(frozen=True)
class ModelFile:
    """A GGUF model whose header was read and found sound.

    Attributes
    ----------
    path : Path
    architecture : str
    n_ctx_train : int
        Context that the model was trained with; 0 when the file does not say.
    n_bytes : int
        Of all its files.
    """

    path: Path
    architecture: str
    n_ctx_train: int
    n_bytes: int


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read the header of a GGUF model, and of all files of a split one.

    Raises
    ------
    ModelError
        The file is missing, is not GGUF, is truncated, or is no language model.
    OptionTypeError
        It is no path.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise OptionTypeError(f"model {path!r}: expected the path of a GGUF file")
    if not name or "\0" in name:
        raise ModelError(f"model {name!r}: expected the path of a GGUF file")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"model {name!r}: llama.cpp takes paths in UTF-8 only; rename it or its folder") from error
    file = Path(name)
    header = read_model_header(file)
    shards = model_shards(file, header)
    arch = str(header.scalar("general.architecture"))
    n_ctx_train = header.scalar(f"{arch}.context_length", 0)
    return ModelFile(
        path=file,
        architecture=arch,
        n_ctx_train=n_ctx_train if isinstance(n_ctx_train, int) else 0,
        n_bytes=sum(shard.file_size for shard in shards),
    )


def check_adapter(path: str | os.PathLike[str]) -> None:
    """Check that a file is a GGUF adapter.

    Raises
    ------
    AdapterError
        It is missing, is not GGUF, or is something else.
    """
    try:
        header = read_header(Path(path))
    except OSError as error:
        raise AdapterError(f"lora_path {path}: cannot be read ({error.strerror or error})") from error
    except GgufFormatError as error:
        raise AdapterError(f"lora_path {path}: {error}; a GGUF adapter is expected") from error
    if header.scalar("general.type") != "adapter":
        raise AdapterError(
            f"lora_path {path}: general.type is {header.scalar('general.type')!r}, 'adapter' expected; "
            "convert the adapter with llama.cpp's convert_lora_to_gguf.py"
        )
