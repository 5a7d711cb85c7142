"""What the front refuses, each with one line and a typed exception, and without harm to the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_grammar import LlamaGrammar

from xkv_gguf import Llama, opening
from xkv_gguf.errors import (
    AdapterError,
    ClosedError,
    DecodeError,
    ModelError,
    OptionError,
    OptionTypeError,
    OutOfMemoryError,
    SidecarError,
    StateError,
    UnsupportedError,
    XkvError,
)

from .conftest import Open
from .refused import refused
from .tiny_models import write_adapter, write_alibi_model, write_unknown_model

# ---- arguments: none of these gets as far as loading the model


@pytest.mark.parametrize(
    "kind, kwargs, expected",
    [
        (OptionError, {"kv_mode": "q5_0"}, "kv_mode: 'q5_0' is unknown, expected one of xkv, f16, q8_0, q4_0"),
        (OptionError, {"kv_mode": None}, "kv_mode: None is unknown"),
        (OptionError, {"kv_mod": "f16"}, "argument 'kv_mod' of Llama is unknown, did you mean 'kv_mode'?"),
        (OptionError, {"n_contxt": 99}, "argument 'n_contxt' of Llama is unknown"),
        (OptionError, {"kv_mode": "f16", "xkv": {}}, "xkv: options are given, but kv_mode is f16"),
        (OptionError, {"xkv": {"windw": 1}}, "xkv option 'windw' is unknown, did you mean 'n_window'?"),
        (OptionError, {"xkv": 7}, "xkv: int, expected XkvOptions or a dict"),
        (UnsupportedError, {"embedding": True}, "embedding: an xkv cache is for text generation"),
        (UnsupportedError, {"attention_type": 1}, "attention_type: non-causal"),
        (UnsupportedError, {"vocab_only": True}, "vocab_only: there is no cache"),
        (OptionError, {"n_ctx": -1}, "n_ctx: -1, expected a whole number from 0"),
        (OptionError, {"n_ctx": 2**31}, "n_ctx: 2147483648, expected a whole number"),
        (OptionTypeError, {"n_ctx": 4096.0}, "n_ctx: 4096.0, expected a whole number"),
        (OptionError, {"xkv": {"ratio": 5, "quality": "low"}}, "xkv option ratio: quality is given as well"),
        (
            OptionError,
            {"n_ctx": 256, "xkv": {"n_window": 250}},
            "n_ctx: 256, expected more than sinks + window + chunk",
        ),
        (OptionError, {"n_batch": 0}, "n_batch: 0, expected a whole number from 1"),
        (OptionError, {"n_ubatch": 0}, "n_ubatch: 0, expected a whole number from 1"),
        (OptionError, {"n_threads": -1}, "n_threads: -1, expected a whole number from 0 to 512"),
        (OptionError, {"n_threads_batch": 1000}, "n_threads_batch: 1000, expected"),
        (OptionError, {"pooling_type": 77}, "pooling_type: 77, expected a whole number from -1 to 4"),
        (OptionError, {"pooling_type": 4}, "pooling_type: rank gives scores"),
        (OptionError, {"rope_scaling_type": 9}, "rope_scaling_type: 9"),
        (OptionError, {"rope_freq_base": -1.0}, "rope_freq_base: -1.0, expected a number not below 0"),
        (OptionTypeError, {"rope_freq_base": "1"}, "rope_freq_base: '1', expected a finite number"),
        (OptionError, {"rope_freq_base": float("nan")}, "rope_freq_base: nan, expected a finite number"),
        (OptionTypeError, {"split_mode": "layer"}, "split_mode: 'layer', expected a whole number"),
        (OptionError, {"last_n_tokens_size": -7}, "last_n_tokens_size: -7"),
        (OptionTypeError, {"seed": 1.5}, "seed: 1.5"),
        (AdapterError, {"lora_path": "no/such/adapter.gguf"}, "lora_path no/such/adapter.gguf: cannot be read"),
        (SidecarError, {"xkv": {"sidecar": "no/such.xkv.gguf"}}, "sidecar no/such.xkv.gguf: no such file"),
    ],
)
def test_arguments(kind: type[XkvError], kwargs: dict[str, Any], expected: str, demo_model: Path) -> None:
    refused(kind, expected, lambda: Llama(demo_model, **{"verbose": False, **kwargs}))


def test_a_window_that_leaves_no_room(demo_model: Path, sidecar: Path) -> None:
    options = {"n_window": 2000, "sidecar": str(sidecar)}
    expected = "n_ctx: 2048, expected more than"
    refused(OptionError, expected, lambda: Llama(demo_model, n_ctx=2048, xkv=options, verbose=False))


def test_a_model_is_no_adapter(demo_model: Path) -> None:
    why = "general.type is 'model', 'adapter' expected"
    refused(AdapterError, why, lambda: Llama(demo_model, lora_path=str(demo_model)))


def test_a_cache_beyond_the_machines_memory(demo_model: Path) -> None:
    refused(OutOfMemoryError, "lower n_ctx", lambda: Llama(demo_model, kv_mode="f16", n_ctx=2**31 - 512, verbose=False))


# ---- models


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "is empty"),
        (b"PK\3\4 something else", "does not begin with the GGUF magic number"),
        (b"GGUF\3\0\0\0", "ends inside the tensor count"),
    ],
)
@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_files_that_are_no_models(mode: str, data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    refused(ModelError, expected, lambda: Llama(path, kv_mode=mode))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    refused(ModelError, "no such file", lambda: Llama(tmp_path / "missing.gguf"))
    refused(ModelError, "cannot be read", lambda: Llama(tmp_path))
    refused(ModelError, "expected the path of a GGUF file", lambda: Llama("a\0b"))
    refused(OptionTypeError, "expected the path of a GGUF file", lambda: Llama(None))  # type: ignore[arg-type]


def test_a_truncated_model(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with demo_model.open("rb") as file:
        path.write_bytes(file.read(20_000_000))
    refused(ModelError, "ends inside the tensor", lambda: Llama(path, kv_mode="f16"))


def test_a_sidecar_is_no_model(sidecar: Path) -> None:
    refused(ModelError, "is an xkv sidecar; name the model file instead", lambda: Llama(sidecar))


@pytest.fixture
def alibi(tmp_path: Path) -> Path:
    path = tmp_path / "alibi.gguf"
    write_alibi_model(path)
    return path


@pytest.mark.model
def test_an_architecture_without_support(
    alibi: Path, sidecar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = Llama(alibi, kv_mode="f16", n_ctx=256, verbose=False)
    llm.eval([3, 4, 5])
    llm.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    why = "architecture refact uses ALiBi, which an xkv cache does not support yet"
    refused(UnsupportedError, why, lambda: Llama(alibi, verbose=False))
    assert not list((tmp_path / "cache").rglob("*.gguf*"))


def test_a_size_out_of_reach_before_anything_is_calibrated(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_sidecar", lambda model: None)
    monkeypatch.setattr(opening, "ensure_sidecar", None)
    why = "ratio 100: out of reach at n_ctx 8192; the smallest cache takes 3350016 bytes"
    refused(OptionError, why, lambda: Llama(demo_model, n_ctx=8192, xkv={"ratio": 100}, verbose=False))


def test_an_architecture_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    write_unknown_model(path)
    why = f"model {path}: llama.cpp cannot load it: "
    refused(UnsupportedError, why, lambda: Llama(path, kv_mode="f16", verbose=False))


@pytest.mark.model
@pytest.mark.parametrize("mode", ["q8_0", "q4_0"])
def test_heads_that_a_quantized_cache_cannot_hold(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    write_alibi_model(path, n_head=4)
    refused(UnsupportedError, "n_embd_head_k=16", lambda: Llama(path, kv_mode=mode, n_ctx=256, verbose=False))


@pytest.mark.model
def test_an_adapter_of_another_architecture(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    write_adapter(path, "gemma2", 576)
    why = f"lora_path {path}: llama.cpp cannot load it"
    refused(AdapterError, why, lambda: Llama(demo_model, kv_mode="f16", lora_path=str(path), verbose=False))


# ---- sizes


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"ratio": 1e5}, "ratio 100000: out of reach at n_ctx 4096; the smallest cache takes"),
        ({"budget": "1MiB"}, "budget 1048576 bytes: out of reach at n_ctx 4096"),
        ({"coef_ratio": 1e5}, "coef_ratio 100000: out of reach"),
        ({"types": "q1_0"}, "none has blocks that fit into chunks of 64 tokens, as V needs"),
        ({"rank": 33, "types": "q8_0"}, "rank 33: a multiple of 32 (for q8_0), or 'full', expected"),
    ],
)
def test_sizes_out_of_reach(options: dict[str, Any], expected: str, demo_model: Path, sidecar: Path) -> None:
    refused(OptionError, expected, lambda: Llama(demo_model, xkv={"sidecar": str(sidecar), **options}, verbose=False))


def test_without_calibration_llama_cpp_tells_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    write_unknown_model(path)
    why = f"model {path}: llama.cpp cannot load it: error loading model: unknown model architecture: 'nosuch'"
    refused(UnsupportedError, why, lambda: Llama(path, xkv={"calibrate": False}, verbose=False))


def test_groups_larger_than_the_model(demo_model: Path) -> None:
    options = {"calibrate": False, "group_size": 31}
    refused(OptionError, "xkv option group_size: 31, expected 1 to 30", lambda: Llama(demo_model, xkv=options))


# ---- operations


@pytest.mark.model
def test_states_that_cannot_be_taken(open_llama: Open) -> None:
    llm, plain = open_llama("xkv"), open_llama("f16")
    for one in (llm, plain):
        one("Hello", max_tokens=2)
    tokens, state, other = llm.n_tokens, llm.save_state(), plain.save_state()
    refused(StateError, "a saved state: saved with kv_mode f16, expected xkv", lambda: llm.load_state(other))
    refused(StateError, "a saved state: saved with kv_mode xkv, expected f16", lambda: plain.load_state(state))
    del other.origin
    refused(StateError, "a saved state: the state is not one of an xkv cache", lambda: llm.load_state(other))
    damaged = bytearray(state.llama_state)
    damaged[-100] ^= 1
    state.llama_state = bytes(damaged)
    refused(StateError, "a saved state: the state is damaged", lambda: llm.load_state(state))
    state.llama_state = bytes(damaged[:-7])
    refused(StateError, "a saved state: ", lambda: llm.load_state(state))
    assert llm.n_tokens == tokens
    llm("Hello again", max_tokens=2)


@pytest.mark.model
def test_shifting_a_sequence_that_is_not_there(open_llama: Open) -> None:
    llm = open_llama("xkv")
    tokens = llm.tokenize(b"The capital of France is")
    llm.eval(tokens)
    why = "seq_add of sequence 7, expected 0 to n_seq_max - 1 = 0"
    refused(UnsupportedError, why, lambda: llm._ctx.kv_cache_seq_shift(7, 2, -1, -1))
    # what was refused is not forgotten: the caller may have gone on as if it had worked
    refused(DecodeError, why, lambda: llm.eval(tokens))
    llm.reset()
    llm.eval(tokens)
    assert llm.n_tokens == len(tokens)


@pytest.mark.model
@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_prompts(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    refused(OptionError, "prompt: no tokens", lambda: llm(""))
    refused(OptionError, "prompt: no tokens", lambda: llm.create_completion([], max_tokens=2))
    with pytest.raises(ValueError, match="exceed context window of 1024"):
        llm.create_completion([30] * 1024)
    refused(DecodeError, "1025 tokens do not fit: the context of 1024 has room for 1024", lambda: llm.eval([30] * 1025))
    expected = "a batch: token {}, expected 0 to 49151"
    refused(DecodeError, expected.format(49152), lambda: llm.create_completion([llm.n_vocab()], max_tokens=2))
    refused(DecodeError, expected.format(-1), lambda: llm.create_completion([-1], max_tokens=2))
    refused(OptionError, "tokens: token 999999, expected 0 to 49151", lambda: llm.detokenize([999999]))
    refused(OptionError, "logit_bias: token 49152", lambda: llm("Hello", logit_bias={49152: 1.0}))
    # none of this harms the model
    reply: Any = llm("The capital of France is", max_tokens=2, temperature=0.0)
    assert "Paris" in reply["choices"][0]["text"]


@pytest.mark.model
def test_embedding_with_an_object_for_text(open_llama: Open) -> None:
    expected = "is for text; make one with kv_mode='f16', embedding=True"
    for mode in ("xkv", "f16"):
        llm = open_llama(mode)
        refused(UnsupportedError, expected, lambda llm=llm: llm.embed("Hello"))
        refused(UnsupportedError, expected, lambda llm=llm: llm.create_embedding("Hello"))


@pytest.mark.model
def test_embedding_nothing(open_llama: Open) -> None:
    llm = open_llama("f16", embedding=True, pooling_type=1)
    refused(OptionError, "input: no text or an empty one", lambda: llm.embed(""))
    refused(OptionError, "input: no text or an empty one", lambda: llm.embed([]))
    refused(OptionError, "input: no text or an empty one", lambda: llm.embed(["a", ""]))


LIBRARY_LOADED_BEFORE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
try:
    from xkv_gguf import Llama
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_a_second_library(tmp_path: Path) -> None:
    from xkv_gguf.runtime import loader

    for file in loader.LIB_DIR.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = next(tmp_path.glob("libllama.*"))
    command = [sys.executable, "-c", LIBRARY_LOADED_BEFORE, str(other)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("LibraryError "), done.stderr
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize("text", ["root ::= [", 'other ::= "a"'])
def test_a_grammar_that_does_not_parse(text: str, open_llama: Open) -> None:
    llm = open_llama("f16")
    grammar = LlamaGrammar.from_string(text, verbose=False)
    refused(OptionError, "does not parse, expected GBNF with a rule 'root'", lambda: llm("Hi", grammar=grammar))
    grammar = LlamaGrammar.from_string('root ::= "yes"', verbose=False)
    assert llm("Hi", grammar=grammar, max_tokens=3)["choices"][0]["text"] == "yes"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process(open_llama: Open) -> None:
    llm = open_llama("f16")
    llm("Hi", max_tokens=1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            llm("One two three", max_tokens=1)
        except DecodeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert f"was forked from {os.getpid()}, which made this Llama; make one after the fork" in pipe.read()
    llm("Hi", max_tokens=1)


@pytest.mark.model
@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_a_closed_object(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    stream: Any = llm.create_completion("One two three", max_tokens=20, stream=True)
    next(stream)
    llm.close()
    llm.close()
    for use in (
        lambda: next(stream),
        lambda: llm("Hi"),
        lambda: llm.tokenize(b"x"),
        llm.__call__,
        lambda: llm.n_tokens,
    ):
        refused(ClosedError, "this Llama was closed; make another one", use)
