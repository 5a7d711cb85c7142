"""Checks of the keyword arguments that go on to `llama_cpp.Llama`, which takes anything and may crash on it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..base.text import closest, format_bytes
from ..errors import OptionError, OutOfMemoryError, UnsupportedError, XkvWarning
from ..model.file import ModelFile, check_adapter
from ..plan.sizes import CTX_STEP, CacheLayout, padded_ctx

DEFAULT_N_CTX = 4096
MAX_INT = 2**31 - 1
MAX_CTX = MAX_INT - CTX_STEP
MAX_THREADS = 512  # GGML_MAX_N_THREADS
POOLING_RANK = 4

# least and most; values outside are undefined for llama.cpp, and some abort the process
INT_RANGES: dict[str, tuple[int, int]] = {
    "n_ctx": (0, MAX_CTX),
    "n_batch": (1, MAX_INT),
    "n_ubatch": (1, MAX_INT),
    "n_threads": (0, MAX_THREADS),
    "n_threads_batch": (0, MAX_THREADS),
    "n_gpu_layers": (-1, MAX_INT),
    "main_gpu": (0, MAX_INT),
    "split_mode": (0, 3),
    "rope_scaling_type": (-1, 3),
    "pooling_type": (-1, 4),
    "attention_type": (-1, 1),
    "yarn_orig_ctx": (0, MAX_INT),
    "last_n_tokens_size": (0, MAX_INT),
    "seed": (-1, 2**32 - 1),
}
OPTIONAL_INTS = ("n_threads", "n_threads_batch", "rope_scaling_type")
NOT_NEGATIVE_FLOATS = ("rope_freq_base", "rope_freq_scale")
FLOATS = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "lora_scale")


def check_names(arguments: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that `llama_cpp.Llama` would swallow.

    Raises
    ------
    OptionError
        Names the first unknown argument.
    """
    names = [*known, "kv_mode", "xkv"]
    for name in arguments:
        if name in ("type_k", "type_v"):
            raise OptionError(f"{name}: the type of the cache follows from kv_mode; leave {name} out")
        if name not in names:
            raise OptionError(f"argument {name!r} of Llama is unknown{closest(name, names)}")


def check_values(arguments: Mapping[str, Any]) -> None:
    """Refuse values that llama.cpp has no meaning for.

    Raises
    ------
    OptionError
        Names the argument, its value and the range.
    ModelError
        `lora_path` is no adapter.
    """
    for name, (least, most) in INT_RANGES.items():
        value = arguments.get(name, least)
        if value is None and name in OPTIONAL_INTS:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise OptionError(f"{name}: {value!r}, expected a whole number from {least} to {most}")
    for name in (*NOT_NEGATIVE_FLOATS, *FLOATS):
        value = arguments.get(name, 0.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise OptionError(f"{name}: {value!r}, expected a finite number")
        if name in NOT_NEGATIVE_FLOATS and value < 0:
            raise OptionError(f"{name}: {value!r}, expected a number not below 0")
    if arguments.get("pooling_type") == POOLING_RANK:
        raise OptionError(
            "pooling_type: rank gives scores, which llama_cpp would return as embeddings; use another type"
        )
    if arguments.get("lora_path") is not None:
        check_adapter(arguments["lora_path"])


def check_mode(kv_mode: str, arguments: Mapping[str, Any]) -> None:
    """Refuse settings that the cache cannot work with.

    Raises
    ------
    OptionError
        Flash attention is off, but the cache needs it.
    UnsupportedError
        The setting is not for text generation, which an xkv cache is limited to.
    """
    if kv_mode != "f16" and not arguments.get("flash_attn", True):
        raise OptionError(f"flash_attn: False, but kv_mode {kv_mode} needs flash attention; leave it out")
    if kv_mode != "xkv":
        return
    if arguments.get("embedding"):
        raise UnsupportedError("embedding: an xkv cache is for text generation; use kv_mode='f16' for embeddings")
    if arguments.get("vocab_only"):
        raise UnsupportedError("vocab_only: there is no cache without weights; use kv_mode='f16'")
    if arguments.get("attention_type", -1) == 1:
        raise UnsupportedError("attention_type: non-causal, but an xkv cache is causal; use kv_mode='f16'")


def warn_untested(architecture: str) -> None:
    """Warn that an xkv cache was never held against a plain one for an architecture."""
    warnings.warn(
        f"architecture {architecture} was never tested with an xkv cache; compare some answers with those of "
        "kv_mode='f16' before you rely on it",
        XkvWarning,
        stacklevel=5,
    )


def resolve_ctx(n_ctx: int | None, model: ModelFile) -> int:
    """Context in tokens: the default or the model's own where none is given, rounded up as llama.cpp does.

    Raises
    ------
    OptionError
        0 was given, but the model does not say what it was trained with.
    """
    if n_ctx is None:
        n_ctx = min(DEFAULT_N_CTX, model.n_ctx_train or DEFAULT_N_CTX)
    elif n_ctx == 0:
        n_ctx = model.n_ctx_train
        if not 0 < n_ctx <= MAX_CTX:
            raise OptionError(f"n_ctx: 0 means the model's own, but {model.path.name} states {n_ctx}; give a number")
    return padded_ctx(n_ctx)


def check_ctx_for_xkv(layout: CacheLayout) -> None:
    """Refuse a context that sinks, window and a chunk fill by themselves.

    Raises
    ------
    OptionError
        Says how large the context has to be.
    """
    if layout.n_ctx <= layout.n_exact:
        raise OptionError(
            f"n_ctx: {layout.n_ctx}, expected more than sinks + window + chunk = {layout.n_sink} + {layout.n_window} + "
            f"{layout.frame}; raise n_ctx or lower the xkv options"
        )


def check_memory(n_bytes: int, n_ctx: int, kv_mode: str) -> None:
    """Refuse a cache that is larger than the machine's memory.

    Raises
    ------
    OutOfMemoryError
        Says how much would be needed.
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if n_bytes > there:
        raise OutOfMemoryError(
            f"n_ctx: {n_ctx} tokens of a {kv_mode} cache take {format_bytes(n_bytes)}, this machine has "
            f"{format_bytes(there)}; lower n_ctx"
        )
