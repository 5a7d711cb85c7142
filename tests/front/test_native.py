"""The binding agrees with the library, and failures find their exceptions."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest

from xkv_gguf import _log, _native
from xkv_gguf._model_file import open_model
from xkv_gguf.convert.plan import BYTES_PER_COEF
from xkv_gguf.errors import OptionError, SidecarError, UnsupportedError, XkvError
from xkv_gguf.options import BASIS_TYPES, COEF_TYPES

from .tiny_models import write_sliding_window_model

HEADER = """
#pragma once
struct hidden;
// CFFI-BEGIN
enum xkv_status { XKV_STATUS_OK = 0, };
// CFFI-END
#ifdef X
"""


def test_declarations_lie_between_the_markers() -> None:
    text = _native.declarations(HEADER)
    assert "XKV_STATUS_OK" in text
    assert "#" not in text and "hidden" not in text


def test_every_status_has_its_exception() -> None:
    lib = _native.native().lib
    codes = {
        getattr(lib, name): name.removeprefix("XKV_STATUS_") for name in dir(lib) if name.startswith("XKV_STATUS_")
    }
    assert codes.pop(_native.STATUS_OK) == "OK"
    assert sorted(codes) == sorted(_native.EXCEPTIONS)
    names = {codes[code]: kind.__name__ for code, kind in _native.EXCEPTIONS.items()}
    assert names == {
        "INVALID_ARGUMENT": "OptionError",
        "IO": "SidecarError",
        "FORMAT": "SidecarError",
        "VERSION": "SidecarVersionError",
        "MODEL_MISMATCH": "SidecarMismatchError",
        "UNSUPPORTED": "UnsupportedError",
        "NO_MEMORY": "OutOfMemoryError",
        "INTERNAL": "XkvError",
    }


def test_a_status_raises_with_the_librarys_text() -> None:
    _native.check_status(0)
    with pytest.raises(OptionError, match="model is NULL"):
        _native.check_model(0)
    with pytest.raises(XkvError) as caught:
        _native.check_status(12345)
    assert type(caught.value) is XkvError


def test_types_are_those_of_ggml() -> None:
    for name, number in _native.GGML_TYPES.items():
        assert number == getattr(llama_cpp, f"GGML_TYPE_{name.upper()}")
    assert set(COEF_TYPES) == set(BYTES_PER_COEF) == set(_native.GGML_TYPES)
    assert set(BASIS_TYPES) <= set(COEF_TYPES)


def scope_params(**changes: object) -> _native.ScopeParams:
    fields = {
        "sidecar": "no/such/file.xkv.gguf",
        "n_sink": 4,
        "n_window": 128,
        "n_block": 128,
        "n_absorb": 8,
        "type_coef_k": "q8_0",
        "type_coef_v": "q8_0",
        "type_basis": "f16",
    }
    return _native.ScopeParams(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_library_checks_for_itself(sidecar: Path) -> None:
    with pytest.raises(SidecarError, match=r"no/such/file\.xkv\.gguf"), _native.scope(scope_params()):
        pass
    for change in ({"n_window": 0}, {"n_sink": -1}, {"n_block": 33}, {"ranks": ([32], [32])}):
        params = scope_params(sidecar=str(sidecar), **change)
        with pytest.raises(OptionError), _native.scope(params):
            pass


@pytest.mark.model
def test_an_unsupported_model_says_why(tmp_path: Path) -> None:
    path = tmp_path / "gemma.gguf"
    write_sliding_window_model(path)
    with _log.collect(quiet=True):
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    try:
        with pytest.raises(UnsupportedError, match="gemma2 has sliding-window layers"):
            _native.check_model(model)
    finally:
        llama_cpp.llama_model_free(model)


def test_error_lines_of_the_log_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    with _log.collect(quiet=True) as lines:
        assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert lines
    assert "model" in _log.reason(lines)
    count = len(lines)
    llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert len(lines) == count


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([], ""),
        (["llama_init: n_ctx is too small"], "n_ctx is too small"),
        (["error loading model: bad magic", "second"], "error loading model: bad magic"),
        (["f: ", "g: why"], "why"),
    ],
)
def test_the_reason_is_without_the_functions_name(lines: list[str], expected: str) -> None:
    assert _log.reason(lines) == expected


def test_plain_bytes_follow_from_the_header(demo_model: Path) -> None:
    model = open_model(demo_model)
    assert (model.architecture, model.n_ctx_train) == ("llama", 8192)
    assert model.kv_numbers == 30 * 2 * 3 * 64
    assert model.plain_bytes("q4_0", 1024) == 1024 * 30 * 2 * 3 * 64 * 18 // 32
