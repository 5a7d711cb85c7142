"""What llama_cpp.server and LangChain pass to `llama_cpp.Llama` is taken here, too."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from xkv_gguf import Llama
from xkv_gguf.errors import OutOfMemoryError, XkvWarning
from xkv_gguf.model.file import open_model

ALONE = {"calibrate": False}

# LangChain's LlamaCpp and ChatLlamaCpp, with their defaults
LANGCHAIN = {
    "lora_path": None,
    "lora_base": None,
    "n_ctx": 512,
    "n_parts": -1,
    "seed": -1,
    "f16_kv": True,
    "logits_all": False,
    "vocab_only": False,
    "use_mlock": False,
    "n_threads": None,
    "n_batch": 8,
    "use_mmap": True,
    "last_n_tokens_size": 64,
    "verbose": False,
    "rope_freq_scale": 1.0,
    "rope_freq_base": 10000.0,
}

# load_llama_from_model_settings() of llama_cpp.server, with its settings' defaults
SERVER = {
    "n_gpu_layers": 0,
    "split_mode": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "main_gpu": 0,
    "tensor_split": None,
    "vocab_only": False,
    "use_mmap": True,
    "use_mlock": True,
    "kv_overrides": None,
    "rpc_servers": None,
    "seed": llama_cpp.LLAMA_DEFAULT_SEED,
    "n_ctx": 2048,
    "n_batch": 512,
    "n_ubatch": 512,
    "n_threads": 1,
    "n_threads_batch": 1,
    "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
    "mul_mat_q": True,
    "logits_all": False,
    "embedding": False,
    "offload_kqv": True,
    "flash_attn": False,
    "last_n_tokens_size": 64,
    "lora_base": None,
    "lora_path": None,
    "numa": False,
    "chat_format": None,
    "chat_handler": None,
    "draft_model": None,
    "type_k": None,
    "type_v": None,
    "tokenizer": None,
    "verbose": False,
}


def warned(model: Path, **kwargs: Any) -> list[str]:
    """What is warned of when an object is made, which must answer."""
    if kwargs.get("kv_mode", "xkv") == "xkv":
        kwargs["xkv"] = ALONE
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        llm = Llama(model, **{"n_ctx": 512, "n_threads": 1, "verbose": False, **kwargs})
    llm("abc", max_tokens=1)
    llm.close()
    return [str(one.message) for one in seen if issubclass(one.category, XkvWarning)]


@pytest.mark.parametrize("mode", ["xkv", "f16", "q8_0"])
def test_what_langchain_passes(mode: str, tiny_model: Path) -> None:
    assert warned(tiny_model, kv_mode=mode, **LANGCHAIN) == []


@pytest.mark.parametrize("mode", ["xkv", "f16", "q8_0"])
def test_what_the_server_passes(mode: str, tiny_model: Path) -> None:
    needs = [f"arguments of Llama that are not used: flash_attn=False (kv_mode {mode} needs flash attention)"]
    assert warned(tiny_model, kv_mode=mode, **SERVER) == ([] if mode == "f16" else needs)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"f16_kv": False}, ["f16_kv=False (llama.cpp has it no more)"]),
        ({"type_k": 8}, ["type_k=8 (the type of the cache follows from kv_mode xkv)"]),
        ({"type_v": 1, "kv_mode": "f16"}, []),
        ({"type_v": 8, "kv_mode": "f16"}, ["type_v=8 (the type of the cache follows from kv_mode f16)"]),
        ({"mul_mat_q": False, "low_vram": True}, ["mul_mat_q=False", "low_vram=True"]),
        ({"n_batch": None, "n_ubatch": None, "n_gpu_layers": None, "rope_freq_base": None, "flash_attn": None}, []),
    ],
)
def test_one_warning_names_what_is_not_done(kwargs: dict[str, Any], expected: list[str], tiny_model: Path) -> None:
    found = warned(tiny_model, **kwargs)
    assert len(found) == bool(expected)
    assert all(part in found[0] for part in expected)


def test_a_micro_batch_is_at_most_a_batch(tiny_model: Path) -> None:
    for kwargs, expected in (({"n_batch": 64, "n_ubatch": 512}, 64), ({"n_ctx": 256, "n_ubatch": 512}, 256)):
        llm = Llama(tiny_model, kv_mode="f16", n_threads=1, verbose=False, **kwargs)
        assert llm.context_params.n_ubatch == expected
        llm.close()


@pytest.mark.parametrize(
    ("kwargs", "is_warned"),
    [({"n_ctx": 2048}, False), ({"n_ctx": 4096}, True), ({"n_ctx": 4096, "rope_freq_scale": 0.5}, False)],
)
@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_a_context_beyond_training(mode: str, kwargs: dict[str, Any], is_warned: bool, tiny_model: Path) -> None:
    found = warned(tiny_model, kv_mode=mode, **kwargs)
    assert len(found) == is_warned
    assert all("n_ctx: 4096 is beyond the 2048 tokens that tiny.gguf was trained with" in one for one in found)


GIB = 1 << 30


@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_a_context_is_held_against_the_memory_that_is_free(
    mode: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"xkv": ALONE} if mode == "xkv" else {}
    n_ctx = 1 << 22
    cache = n_ctx * 2 * 64 * 3 * 2 / (4 if mode == "xkv" else 1)  # by default, xkv takes about a quarter or less

    def make() -> None:
        with pytest.warns(XkvWarning, match="beyond"):
            Llama(tiny_model, kv_mode=mode, n_ctx=n_ctx, verbose=False, n_threads=1, **options).close()

    for free in (GIB // 8, int(cache) if mode == "f16" else GIB // 8):
        monkeypatch.setattr("xkv_gguf.fitting.free_memory", lambda free=free: free)
        with pytest.raises(OutOfMemoryError, match=r"n_ctx: 4194304 tokens of a (f16|xkv) cache take .* are free;"):
            make()


def test_buffers_count_beside_the_cache(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a long context is as large as its cache here: a quarter more than the cache is not enough."""
    n_ctx = 1 << 20
    free = n_ctx * 2 * 64 * 3 * 2 * 5 // 4
    monkeypatch.setattr("xkv_gguf.fitting.free_memory", lambda: free)
    with pytest.warns(XkvWarning, match="beyond"), pytest.raises(OutOfMemoryError, match=r"buffers [0-9.]+ [GM]iB"):
        Llama(tiny_model, kv_mode="f16", n_ctx=n_ctx, verbose=False, n_threads=1)


@pytest.mark.parametrize("mode", ["xkv", "f16"])
@pytest.mark.parametrize("kwargs", [{}, {"use_mmap": False}, {"use_mlock": True}])
def test_weights_count_unless_their_file_is_mapped(
    kwargs: dict[str, Any], mode: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"xkv": ALONE} if mode == "xkv" else {}

    def make() -> Any:
        return Llama(tiny_model, kv_mode=mode, n_ctx=512, verbose=False, n_threads=1, **options, **kwargs).close()

    monkeypatch.setattr("xkv_gguf.llama.open_model", lambda path: replace(open_model(path), n_bytes=8 * GIB))
    monkeypatch.setattr("xkv_gguf.fitting.free_memory", lambda: 4 * GIB)
    if not kwargs:
        make()
        return
    with pytest.raises(OutOfMemoryError, match=r"beside weights of 8192\.0 MiB, 4096\.0 MiB of memory are free"):
        make()
