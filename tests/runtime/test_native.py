"""The binding agrees with the library, and failures find their exceptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.errors import OptionError, SidecarError, UnsupportedError, XkvError
from xkv_gguf.model.file import open_model
from xkv_gguf.plan.coef_types import TYPES
from xkv_gguf.plan.segments import Segment, same_rank
from xkv_gguf.plan.sizes import ModelShape
from xkv_gguf.runtime import log, native
from xkv_gguf.runtime.api import llama_cpp
from xkv_gguf.runtime.shape import file_shape
from xkv_gguf.sidecar.read import read_sidecar

from ..llama.tiny_models import write_alibi_model

HEADER = """
#pragma once
struct hidden;
// CFFI-BEGIN
enum xkv_status { XKV_STATUS_OK = 0, };
// CFFI-END
#ifdef X
"""


def test_declarations_lie_between_the_markers() -> None:
    text = native.declarations(HEADER)
    assert "XKV_STATUS_OK" in text
    assert "#" not in text and "hidden" not in text


def test_every_status_has_its_exception() -> None:
    lib = native.native().lib
    codes = {
        getattr(lib, name): name.removeprefix("XKV_STATUS_") for name in dir(lib) if name.startswith("XKV_STATUS_")
    }
    assert codes.pop(native.STATUS_OK) == "OK"
    assert sorted(codes) == sorted(native.EXCEPTIONS)
    names = {codes[code]: kind.__name__ for code, kind in native.EXCEPTIONS.items()}
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
    native.check_status(0)
    with pytest.raises(OptionError, match="model is NULL"):
        native.check_model(0)
    with pytest.raises(XkvError) as caught:
        native.check_status(12345)
    assert type(caught.value) is XkvError


def test_types_are_those_of_ggml() -> None:
    for name, number in native.GGML_TYPES.items():
        if name != "q2_0":  # newer than llama_cpp's list
            assert number == getattr(llama_cpp, f"GGML_TYPE_{name.upper()}")
    assert set(native.GGML_TYPES) == set(TYPES)


SEGMENTS = (Segment(0, "k", 64, "q8_0"), Segment(0, "k", 96, "q4_0", "q5_0"), Segment(0, "v", 32, "q1_0"))


def scope_params(**changes: Any) -> native.ScopeParams:
    return native.ScopeParams(
        **{
            "segments": SEGMENTS,
            "sidecar": "no/such/file.xkv.gguf",
            "n_keep": 128,
            "n_cell": 640,
            "n_slot": 512,
            **changes,
        }
    )


class Recorder:
    """A library that notes what it is called with, while the pointers are still valid."""

    def __init__(self, ffi: Any) -> None:
        self.ffi = ffi
        self.calls: list[dict[str, Any]] = []
        self.n_end = 0

    def xkv_scope_begin(self, params: Any) -> int:
        p = params[0]
        self.calls.append(
            {
                "sidecar": None if p.sidecar == self.ffi.NULL else self.ffi.string(p.sidecar).decode(),
                "layers": [p.layers[i] for i in range(sum(p.count[g] for g in range(p.n_group)))],
                "count": [p.count[g] for g in range(p.n_group)],
                "segments": [
                    (s.group, s.kind, s.rank, s.type, s.type_basis, s.noise)
                    for s in (p.segments[i] for i in range(p.n_segment))
                ],
                "places": (p.n_keep, p.n_cell, p.n_slot),
                "leads": (p.n_lead, [p.leads[i] for i in range(p.n_leads)]),
                **{name: getattr(p, name) for name in ("frame", "n_sink", "n_text_sink", "n_window", "n_absorb")},
                **{name: getattr(p, name) for name in ("online", "n_prior", "fused")},
            }
        )
        return 0

    def xkv_scope_end(self) -> None:
        self.n_end += 1


def test_parameters_arrive_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi = native.native().ffi
    library = Recorder(ffi)
    monkeypatch.setattr(native, "native", lambda: native.Native(ffi, library))
    off = {"online": False, "fused": False}
    with native.scope(
        scope_params(sidecar="Zoë.gguf", n_text_sink=5, n_window=48, n_prior=7, n_lead=96, leads=(64, 128), **off)
    ):
        assert library.n_end == 0
    with native.scope(scope_params(sidecar=None, layers=((0, 3), (2,)), frame=128)):
        pass
    assert library.n_end == 2
    given, alone = library.calls
    assert given == {
        "sidecar": "Zoë.gguf",
        "layers": [],
        "count": [],
        "segments": [
            (group, kind, rank, *types, pytest.approx(TYPES[name].noise))
            for name, (group, kind, rank, *types) in {
                "q8_0": (0, 0, 64, 8, 8),
                "q4_0": (0, 0, 96, 2, 6),
                "q1_0": (0, 1, 32, 41, 8),
            }.items()
        ],
        "places": (128, 640, 512),
        "leads": (96, [64, 128]),
        "frame": 0,
        "n_sink": 4,
        "n_text_sink": 5,
        "n_window": 48,
        "n_absorb": 8,
        "online": 0,
        "n_prior": 7,
        "fused": 0,
    }
    assert (alone["sidecar"], alone["layers"], alone["count"]) == (None, [0, 3, 2], [2, 1])
    assert (alone["frame"], alone["online"]) == (128, 1)
    assert alone["leads"] == (128, [])


def test_the_library_checks_for_itself(sidecar: Path) -> None:
    with pytest.raises(SidecarError, match=r"no/such/file\.xkv\.gguf"), native.scope(scope_params()):
        pass
    stats = read_sidecar(sidecar).statistics()
    segments = same_rank(stats, 32, "q8_0", "q8_0")
    bad: list[dict[str, Any]] = [
        {"n_window": 0},
        {"n_sink": -1},
        {"n_text_sink": -1},
        {"n_absorb": -1},
        {"n_prior": -1},
        {"n_slot": 0},
        {"n_slot": 100},
        {"tolerance": 0.001, "n_lead": 0},
        {"tolerance": 0.001, "n_lead": 100},
        {"tolerance": 0.001, "leads": (64, 100)},
        {"segments": ()},
        {"segments": segments[1:]},
        {"segments": (Segment(0, "k", 0, "q8_0"), *segments[1:])},
        {"segments": (Segment(99, "k", 32, "q8_0"), *segments[1:])},
    ]
    for change in bad:
        params = scope_params(**{"segments": segments, "sidecar": str(sidecar), **change})
        with pytest.raises(OptionError), native.scope(params):
            pass
    with pytest.raises(OptionError), native.scope(scope_params(segments=segments, sidecar=None)):
        pass


@pytest.mark.model
def test_an_unsupported_model_says_why(tmp_path: Path) -> None:
    path = tmp_path / "alibi.gguf"
    write_alibi_model(path)
    with log.collect(quiet=True):
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    try:
        with pytest.raises(UnsupportedError, match="refact uses ALiBi"):
            native.check_model(model)
    finally:
        llama_cpp.llama_model_free(model)


def test_error_lines_of_the_log_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    with log.collect(quiet=True) as lines:
        assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert lines
    assert "model" in log.reason(lines)
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
    assert log.reason(lines) == expected


def test_shape_of_a_file(demo_model: Path) -> None:
    model = open_model(demo_model)
    assert (model.architecture, model.n_ctx_train) == ("llama", 8192)
    shape = file_shape(demo_model)
    assert shape == ModelShape((192,) * 30, (192,) * 30, (576,) * 30, 64, 64)
    assert shape.layers == tuple(range(30))
    assert shape.numbers == 30 * 2 * 3 * 64
