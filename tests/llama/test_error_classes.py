"""Whatever `llama_cpp.Llama` raises, ours raises one of its class: code that was written for it goes on to work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from xkv_gguf import Llama, errors
from xkv_gguf.errors import XkvError

from .tiny_models import write_adapter, write_unknown_model

SMALL = {"n_ctx": 512, "n_threads": 1, "verbose": False}

Make = Callable[..., Any]


def no_file(make: Make, _model: Path, tmp_path: Path) -> None:
    make(str(tmp_path / "none.gguf"))


def no_model(make: Make, _model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"something else")
    make(str(tmp_path / "model.gguf"))


def unknown_architecture(make: Make, _model: Path, tmp_path: Path) -> None:
    write_unknown_model(tmp_path / "unknown.gguf")
    make(str(tmp_path / "unknown.gguf"))


def truncated(make: Make, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(model.read_bytes()[:-1000])
    make(str(tmp_path / "model.gguf"))


def no_path(make: Make, _model: Path, _tmp_path: Path) -> None:
    make(None)


def a_name_that_is_not_utf8(make: Make, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.gguf"
    shutil.copy(model, path)
    make(str(path))


def fractional(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model), n_ctx=512.5)


def text_for_a_number(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model), rope_freq_base="high")


def no_adapter(make: Make, model: Path, tmp_path: Path) -> None:
    make(str(model), lora_path=str(tmp_path / "none.gguf"))


def foreign_adapter(make: Make, model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter.gguf", "gemma2", 64)
    make(str(model), lora_path=str(tmp_path / "adapter.gguf"))


def override_of_no_type(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model), kv_overrides={"a.b": [1]})


def long_prompt(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model))([5] * 600, max_tokens=1)


def no_such_token(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model)).eval([5, 10**6])


def no_such_token_in_a_prompt(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model))([5, 10**6], max_tokens=1)


def logprobs_of_the_last_token_alone(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model))("abc", max_tokens=1, logprobs=1)


def embedding_with_text_generation(make: Make, model: Path, _tmp_path: Path) -> None:
    make(str(model)).embed("abc")


def a_state_of_another(make: Make, model: Path, _tmp_path: Path) -> None:
    llm = make(str(model))
    llm("abc", max_tokens=1)
    state = llm.save_state()
    state.llama_state = bytes(len(state.llama_state))
    llm.load_state(state)


CASES = [
    (no_file, ValueError),
    (no_model, ValueError),
    (unknown_architecture, ValueError),
    (truncated, ValueError),
    (no_path, TypeError),
    (a_name_that_is_not_utf8, ValueError),
    (fractional, TypeError),
    (text_for_a_number, TypeError),
    (no_adapter, RuntimeError),
    (foreign_adapter, RuntimeError),
    (override_of_no_type, ValueError),
    (long_prompt, ValueError),
    (no_such_token, RuntimeError),
    (no_such_token_in_a_prompt, RuntimeError),
    (logprobs_of_the_last_token_alone, ValueError),
    (embedding_with_text_generation, RuntimeError),
    (a_state_of_another, RuntimeError),
]
UNNOTICED = (no_adapter, foreign_adapter)  # by llama_cpp, which means to raise
TABLE = [
    pytest.param(mode, act, kind, id=f"{act.__name__}-{mode}")
    for act, kind in CASES
    for mode in ("llama_cpp", "xkv", "f16")
    if not (mode == "llama_cpp" and act in UNNOTICED)
]


@pytest.mark.parametrize(("mode", "act", "kind"), TABLE)
def test_errors_are_of_the_class_that_llama_cpp_raises(
    mode: str, act: Callable[[Make, Path, Path], None], kind: type[Exception], tiny_model: Path, tmp_path: Path
) -> None:
    def make(path: Any, **kwargs: Any) -> Any:
        if mode == "llama_cpp":
            return llama_cpp.Llama(path, **{**SMALL, **kwargs})
        options = {"xkv": {"calibrate": False}} if mode == "xkv" else {}
        return Llama(path, kv_mode=mode, **{**SMALL, **options, **kwargs})

    with pytest.raises(kind) as caught:
        act(make, tiny_model, tmp_path)
    if mode != "llama_cpp":
        assert "\n" not in str(caught.value)


def test_every_error_is_ours_and_has_a_class_of_pythons() -> None:
    found = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, XkvError)]
    expected = {
        "ModelError": ValueError,
        "AdapterError": RuntimeError,
        "UnsupportedError": (ValueError, RuntimeError),
        "OptionError": ValueError,
        "OptionTypeError": (ValueError, TypeError),
        "DecodeError": RuntimeError,
        "ClosedError": RuntimeError,
        "StateError": RuntimeError,
        "OutOfMemoryError": (MemoryError, ValueError, RuntimeError),
        "LibraryError": ImportError,
    }
    assert set(expected) < {one.__name__ for one in found}
    for name, kinds in expected.items():
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            assert issubclass(getattr(errors, name), kind), (name, kind)
