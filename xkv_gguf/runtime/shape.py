"""What of a model an xkv cache holds, as llama.cpp makes it of the file; no weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, UnsupportedError
from ..plan.sizes import ModelShape
from . import log, native
from .api import llama_cpp as lib

LOAD_MODE_NONE = 0
"""Of enum llama_load_mode: weights are read, not mapped, and then without memory for them not at all."""


MOST_NUMBERS = 1 << 17
"""Of K or V per token and layer, some ten times what models have: a plan of more would take hours."""


@dataclass(frozen=True)
class Layer:
    """A layer that the cache holds. Sizes are numbers per token, or of a head.

    Attributes
    ----------
    layer : int
        Of the model.
    embd_k, embd_v : int
    head_k, head_v : int
    n_head : int
        Heads of queries.
    sinks : bool
        Whether a logit without a value takes part in the softmax.
    """

    layer: int
    embd_k: int
    embd_v: int
    head_k: int
    head_v: int
    n_head: int
    sinks: bool


@contextmanager
def peek(path: str | os.PathLike[str], **fields: Any) -> Iterator[int]:
    """Open a model file without its weights; yields the llama_model.

    Parameters
    ----------
    path : str or path
    **fields
        Of llama_model_params.

    Raises
    ------
    ModelError, UnsupportedError
        llama.cpp cannot read it, or does not know its architecture.
    """
    params = lib.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = LOAD_MODE_NONE
    for name, value in fields.items():
        setattr(params, name, value)
    with log.collect(quiet=True) as lines:
        model = lib.llama_model_load_from_file(os.fspath(path).encode(), params)
    if not model:
        why = log.reason(lines)
        kind = UnsupportedError if "unknown model architecture" in why else ModelError
        raise kind(f"model {path}: llama.cpp cannot load it: {why or 'no reason given'}")
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def file_shape(path: str | os.PathLike[str]) -> ModelShape:
    """See `model_shape`, of a file.

    Raises
    ------
    ModelError
        llama.cpp cannot read it.
    UnsupportedError
        An xkv cache cannot be used with the model; the text says why.
    """
    with peek(path) as model:
        return model_shape(model)


def find_shape(path: str | os.PathLike[str]) -> ModelShape | None:
    """See `file_shape`; None where it raises."""
    try:
        return file_shape(path)
    except (ModelError, UnsupportedError):
        return None


def held_layers(model: int) -> list[Layer]:
    """Layers of a loaded model that an xkv cache holds.

    Raises
    ------
    UnsupportedError
        An xkv cache cannot be used with the model; the text says why.
    """
    native.check_model(model)
    api = native.native()
    pointer = api.model(model)
    count = api.ffi.new("uint32_t *", 0)
    native.check_status(api.lib.xkv_model_layers(pointer, api.ffi.NULL, count))
    layers = api.ffi.new("struct xkv_layer_info[]", count[0])
    native.check_status(api.lib.xkv_model_layers(pointer, layers, count))
    return [
        Layer(one.il, one.n_embd_k, one.n_embd_v, one.n_embd_head_k, one.n_embd_head_v, one.n_head, bool(one.sinks))
        for one in layers
    ]


def model_shape(model: int) -> ModelShape:
    """Sizes of a loaded model's layers; 0 for those that the cache does not hold.

    Raises
    ------
    UnsupportedError
        An xkv cache cannot be used with the model; the text says why.
    ModelError
        A layer is wider than any.
    """
    held = {one.layer: one for one in held_layers(model)}
    for one in held.values():
        if max(one.embd_k, one.embd_v) > MOST_NUMBERS:
            raise ModelError(
                f"layer {one.layer}: {one.embd_k} numbers of K and {one.embd_v} of V per token, expected at most "
                f"{MOST_NUMBERS}; the file is damaged"
            )
    n_layer = int(lib.llama_model_n_layer(model))
    first = next(iter(held.values()))
    layers = [held.get(il) for il in range(n_layer)]
    return ModelShape(
        embd_k=tuple(one.embd_k if one else 0 for one in layers),
        embd_v=tuple(one.embd_v if one else 0 for one in layers),
        embd_out=tuple(one.n_head * one.head_v if one else 0 for one in layers),
        head_k=first.head_k,
        head_v=first.head_v,
    )
