"""Checks of the keyword arguments that go on to `llama_cpp.Llama`, which takes anything and may crash on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from ..base.text import closest
from ..errors import OptionError, OptionTypeError, UnsupportedError, XkvWarning
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
NOT_NEGATIVE_FLOATS = ("rope_freq_base", "rope_freq_scale")
CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # of enum ggml_type
SCALING = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_orig_ctx")
FLOATS = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "lora_scale")


WITHOUT_FLASH = ("plm",)
"""Architectures whose graphs llama.cpp cannot make with flash attention: it aborts the process."""

FORMER: dict[str, tuple[Any, ...] | None] = {
    "f16_kv": (True,),
    "mul_mat_q": (True,),
    "low_vram": (False,),
    "n_parts": None,
    "n_gqa": None,
    "rms_norm_eps": None,
}
"""Arguments that llama_cpp had once and LangChain and its server still pass, with the values that ask for what is done
anyway; None where the file tells."""


def adapt(arguments: Mapping[str, Any], kv_mode: str) -> dict[str, Any]:
    """Arguments without those that llama_cpp ignores or that follow from `kv_mode`.

    None stands for the default. One `XkvWarning` names what was asked for and is not done.
    """
    kept, unused = {}, []
    for name, value in arguments.items():
        if value is None:
            continue
        if name in FORMER:
            usual = FORMER[name]
            if usual is not None and value not in usual:
                unused.append(f"{name}={value!r} (llama.cpp has it no more)")
        elif name in ("type_k", "type_v"):
            if value != CACHE_TYPES.get(kv_mode):
                unused.append(f"{name}={value!r} (the type of the cache follows from kv_mode {kv_mode})")
        elif name == "flash_attn" and not value and kv_mode != "f16":
            unused.append(f"flash_attn={value!r} (kv_mode {kv_mode} needs flash attention)")
        else:
            kept[name] = value
    if unused:
        warnings.warn(f"arguments of Llama that are not used: {', '.join(unused)}", XkvWarning, stacklevel=3)
    return kept


def check_names(arguments: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that `llama_cpp.Llama` would swallow.

    Raises
    ------
    OptionError
        Names the first unknown argument.
    """
    names = [*known, "kv_mode", "xkv"]
    for name in arguments:
        if name not in names and name not in FORMER:
            raise OptionError(f"argument {name!r} of Llama is unknown{closest(name, names)}")


def check_values(arguments: Mapping[str, Any]) -> None:
    """Refuse values that llama.cpp has no meaning for.

    Raises
    ------
    OptionError
        Names the argument, its value and the range; OptionTypeError where it is no number.
    AdapterError
        `lora_path` is no adapter.
    """
    for name, (least, most) in INT_RANGES.items():
        value = arguments.get(name, least)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise OptionTypeError(f"{name}: {value!r}, expected a whole number from {least} to {most}")
        if not least <= value <= most:
            raise OptionError(f"{name}: {value!r}, expected a whole number from {least} to {most}")
    for name in (*NOT_NEGATIVE_FLOATS, *FLOATS):
        value = arguments.get(name, 0.0)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise OptionTypeError(f"{name}: {value!r}, expected a finite number")
        if not math.isfinite(value):
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
    UnsupportedError
        The setting is not for text generation, which an xkv cache is limited to.
    """
    if kv_mode != "xkv":
        return
    if arguments.get("embedding"):
        raise UnsupportedError("embedding: an xkv cache is for text generation; use kv_mode='f16' for embeddings")
    if arguments.get("vocab_only"):
        raise UnsupportedError("vocab_only: there is no cache without weights; use kv_mode='f16'")
    if arguments.get("attention_type", -1) == 1:
        raise UnsupportedError("attention_type: non-causal, but an xkv cache is causal; use kv_mode='f16'")


def takes_flash(architecture: str, kv_mode: str, asked: bool | None) -> bool:
    """Whether flash attention is on: unless it is off by wish, or cannot be.

    Raises
    ------
    UnsupportedError
        The cache needs it, or it is asked for, and the architecture cannot have it.
    """
    if architecture not in WITHOUT_FLASH:
        return asked is not False
    if kv_mode != "f16" or asked:
        what = "flash_attn" if kv_mode == "f16" else f"kv_mode {kv_mode}"
        raise UnsupportedError(
            f"{what}: architecture {architecture} does not run with flash attention; use kv_mode='f16' without it"
        )
    return False


def warn_untested(architecture: str) -> None:
    """Warn that an xkv cache was never held against a plain one for an architecture."""
    warnings.warn(
        f"architecture {architecture} was never tested with an xkv cache; compare some answers with those of "
        "kv_mode='f16' before you rely on it",
        XkvWarning,
        stacklevel=5,
    )


def warn_beyond_training(n_ctx: int, arguments: Mapping[str, Any], model: ModelFile) -> None:
    """Warn of a context that is longer than what the model has learnt, unless its RoPE is scaled for that."""
    if 0 < model.n_ctx_train < n_ctx and not any(arguments.get(name, 0) > 0 for name in SCALING):
        warnings.warn(
            f"n_ctx: {n_ctx} is beyond the {model.n_ctx_train} tokens that {model.path.name} was trained with; answers "
            "get worse there unless RoPE is scaled (rope_scaling_type, rope_freq_base, rope_freq_scale)",
            XkvWarning,
            stacklevel=4,
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
