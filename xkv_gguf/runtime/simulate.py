"""What a model and its contexts take, as llama.cpp finds it out without memory for them (no_alloc)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from . import log, native
from .api import llama_cpp as lib
from .devices import DevicePart, context_devices
from .shape import peek

MODEL_FIELDS = ("split_mode", "main_gpu")
CONTEXT_FIELDS = ("n_ctx", "n_batch", "n_ubatch", "type_k", "type_v", "offload_kqv", "op_offload", "swa_full")
ALL_LAYERS = 2**31 - 1


@dataclass(frozen=True)
class ContextSizes:
    """Bytes that a context and its model would take.

    Attributes
    ----------
    parts, scratch : mapping of str to int
        As `kv_report` has them.
    devices : tuple of DevicePart
    """

    parts: Mapping[str, int]
    scratch: Mapping[str, int]
    devices: tuple[DevicePart, ...]

    @property
    def weights(self) -> int:
        """Bytes of the model's tensors."""
        return sum(part.weights for part in self.devices)


@contextmanager
def model_without_memory(path: Path, settings: Mapping[str, Any]) -> Iterator[int]:
    """Open a model whose layers are divided as arguments of `Llama` say; yields the llama_model.

    Raises
    ------
    ModelError, UnsupportedError
        See `shape.peek`.
    """
    fields = {name: settings[name] for name in MODEL_FIELDS if settings.get(name) is not None}
    n_gpu_layers = settings.get("n_gpu_layers", 0)
    fields["n_gpu_layers"] = n_gpu_layers if n_gpu_layers >= 0 else ALL_LAYERS
    if settings.get("tensor_split") is not None:
        split = settings["tensor_split"]
        fields["tensor_split"] = (ctypes.c_float * max(len(split), int(lib.llama_max_devices())))(*split)
    with peek(path, **fields) as model:
        yield model


def context_sizes(model: int, settings: Mapping[str, Any], xkv: native.ScopeParams | None = None) -> ContextSizes:
    """What a context takes that is made with arguments of `Llama`.

    Parameters
    ----------
    model : int
        A llama_model that was opened by `model_without_memory`.
    settings : mapping
    xkv : ScopeParams, optional
        Of an xkv cache.

    Raises
    ------
    UnsupportedError
        llama.cpp cannot make such a context.
    """
    params = lib.llama_context_default_params()
    for name in CONTEXT_FIELDS:
        if settings.get(name) is not None:
            setattr(params, name, settings[name])
    params.n_ubatch = min(params.n_batch, params.n_ubatch)
    flash = settings.get("flash_attn", True)
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    native.clear_last_error()
    scope = native.scope(xkv) if xkv is not None else nullcontext()
    with scope, log.collect(quiet=True) as lines:
        ctx = lib.llama_init_from_model(model, params)
        if not ctx:
            why = (xkv and native.last_error()) or log.reason(lines) or "no reason given"
            raise UnsupportedError(f"llama.cpp cannot make a context of {params.n_ctx} tokens: {why}")
        try:
            if xkv is not None and not native.is_xkv(ctx):
                raise UnsupportedError("the model did not take an xkv cache; use kv_mode f16, q8_0 or q4_0")
            return ContextSizes(dict(native.report(ctx)), dict(native.scratch(ctx)), tuple(context_devices(ctx)))
        finally:
            lib.llama_free(ctx)
