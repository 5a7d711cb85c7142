from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf import XkvOptions
from xkv_gguf.errors import OptionError
from xkv_gguf.options import KV_MODES, check_kv_mode


def test_a_mapping_gives_the_same_as_keywords() -> None:
    assert XkvOptions.of({"ratio": 6, "n_window": 512}) == XkvOptions(ratio=6.0, n_window=512)
    assert XkvOptions.of(None) == XkvOptions()
    options = XkvOptions(n_sink=0)
    assert XkvOptions.of(options) is options


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        XkvOptions().n_sink = 8  # type: ignore[misc]


def test_a_path_object_is_taken_as_its_text() -> None:
    assert XkvOptions(sidecar=Path("a") / "b").sidecar == str(Path("a") / "b")  # type: ignore[arg-type]


def test_v_has_the_type_of_k_unless_it_has_its_own() -> None:
    assert XkvOptions(type_coef="q4_0").coef_types == ("q4_0", "q4_0")
    assert XkvOptions(type_coef="q4_0", type_coef_v="q8_0").coef_types == ("q4_0", "q8_0")


def test_exact_tokens_are_sinks_window_and_block() -> None:
    assert XkvOptions(n_sink=4, n_window=100, n_block=64).n_exact == 168


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("sidecar", 3, "expected a path"),
        ("sidecar", "", "expected a path"),
        ("ratio", 0, "expected a number above 0"),
        ("ratio", -1.5, "expected a number above 0"),
        ("ratio", float("nan"), "expected a number above 0"),
        ("ratio", float("inf"), "expected a number above 0"),
        ("ratio", "6", "expected a number above 0"),
        ("ratio", True, "expected a number above 0"),
        ("n_sink", -1, "expected a whole number from 0"),
        ("n_sink", 1.0, "expected a whole number from 0"),
        ("n_sink", True, "expected a whole number from 0"),
        ("n_window", 0, "expected a whole number from 1"),
        ("n_window", 2**31, "expected a whole number from 1"),
        ("n_block", 0, "expected a whole number from 1"),
        ("n_block", 100, "expected a multiple of 32"),
        ("n_absorb", -1, "expected a whole number from 0"),
        ("type_coef", "q3_k", "expected one of f32, f16, q8_0, q5_0, q4_0"),
        ("type_coef", 8, "expected one of"),
        ("type_coef_v", "f64", "expected one of"),
        ("type_basis", "q8_0", "expected one of f32, f16"),
    ],
)
def test_impossible_values_are_refused_in_one_line(field: str, value: Any, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        XkvOptions.of({field: value})
    text = str(caught.value)
    assert f"xkv option {field}: {value!r}" in text
    assert expected in text
    assert "\n" not in text


def test_an_unknown_key_is_refused_with_a_hint() -> None:
    with pytest.raises(OptionError, match=r"'windw' is unknown, did you mean 'n_window'.*known: sidecar, ratio"):
        XkvOptions.of({"windw": 3})


@pytest.mark.parametrize("value", ["ratio=6", 6, [("ratio", 6)]])
def test_something_else_than_a_mapping_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="expected XkvOptions or a dict"):
        XkvOptions.of(value)


def test_known_modes_pass() -> None:
    assert [check_kv_mode(mode) for mode in KV_MODES] == ["xkv", "f16", "q8_0", "q4_0"]


@pytest.mark.parametrize("mode", ["q5_0", "", None, 8, "XKV"])
def test_an_unknown_mode_is_refused_and_the_known_ones_listed(mode: object) -> None:
    with pytest.raises(OptionError, match=r"kv_mode: .* expected one of xkv, f16, q8_0, q4_0"):
        check_kv_mode(mode)
