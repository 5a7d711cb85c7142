from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf import XkvOptions
from xkv_gguf.errors import OptionError
from xkv_gguf.options import KV_MODES, check_kv_mode
from xkv_gguf.plan.coef_types import DEFAULT_TYPES
from xkv_gguf.plan.size_target import SizeTarget


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


def test_types_are_sorted_and_may_be_one_text() -> None:
    assert XkvOptions(types="q4_0 + q8_0").types == ("q8_0", "q4_0")
    assert XkvOptions(types=["f16"]).types == ("f16",)  # type: ignore[arg-type]
    assert XkvOptions().types == DEFAULT_TYPES


def test_the_size_target_is_what_was_given() -> None:
    assert XkvOptions().target is None
    assert XkvOptions(ratio=7).target == SizeTarget("ratio", "7")
    assert XkvOptions(budget="26MiB").target == SizeTarget("budget", str(26 << 20))
    assert XkvOptions(quality="high").target == SizeTarget("quality", "high")


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"ratio": 5, "budget": 100}, "xkv option ratio: budget is given as well"),
        ({"coef_ratio": 5, "quality": "low"}, "xkv option coef_ratio: quality is given as well"),
        ({"memory": "8GiB", "ratio": 7}, "xkv options memory and ratio: one of them expected"),
        ({"memory": "8GiB", "rank": 32, "types": "q8_0"}, "xkv options memory and rank: one of them expected"),
        ({"rank": 32, "types": "q8_0", "ratio": 4}, "xkv options rank and ratio: one of them expected"),
        ({"rank": "full"}, "xkv option rank: 'full', expected together with one type in types"),
        ({"rank": "64+half", "types": "f16"}, "xkv option rank: 'half', expected a whole number from 1"),
        ({"rank": "64+128", "types": "f16", "max_rank": 64}, "rank: (64, 128), expected at most max_rank = 64"),
        ({"preset": "xkv-4", "rank": 64}, "xkv option rank: preset xkv-4 decides it; leave one of them out"),
        ({"preset": "xkv-4", "ratio": 4}, "xkv options rank and ratio: one of them expected"),
        ({"preset": "xkv-9"}, "xkv option preset: 'xkv-9', expected one of xkv-4"),
        ({"rank": 96, "types": "q8_0", "max_rank": 64}, "rank: 96, expected at most max_rank = 64; lower it or leave"),
        ({"rank": "full", "types": "q8_0", "max_rank": 64}, "rank: 'full', expected at most max_rank = 64; lower it"),
        ({"group_size": 3}, "xkv option group_size: the sidecar decides it"),
        ({"frame": 64}, "xkv option frame: the sidecar decides it"),
        ({"calibrate": False, "sidecar": "a"}, "xkv option sidecar: a path, but calibrate is False"),
        ({"calibrate": False, "online": False}, "xkv option online: False, but without calibration"),
        ({"calibrate": False, "frame": 48}, "xkv option frame: 48, expected one of 32, 64, 128, 256"),
        ({"calibrate": False, "group_size": 0}, "xkv option group_size: 0, expected a whole number from 1"),
    ],
)
def test_options_that_contradict_each_other(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        XkvOptions.of(fields)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preset_is_its_options() -> None:
    found = XkvOptions(preset="xkv-4")
    assert (found.rank, found.types, found.online, found.stages) == ((384, 576), ("f16",), False, False)
    assert XkvOptions(rank="384+576", types="f16").rank == (384, 576)


def test_a_cap_holds_where_a_rank_is_given() -> None:
    assert XkvOptions(rank=64, types="q8_0", max_rank=64).max_rank == 64
    assert XkvOptions(work_price=0).work_price == 0


def test_options_for_tests_of_exactness() -> None:
    options = XkvOptions(rank="full", types="f32", type_window="f32", type_basis="f32", online=False)
    assert (options.rank, options.types, options.online) == ("full", ("f32",), False)
    assert XkvOptions(calibrate=False, group_size=2, frame=128).frame == 128


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("sidecar", 3, "expected a path"),
        ("sidecar", "", "expected a path"),
        ("ratio", 0, "expected a number of 1 or more"),
        ("ratio", -1.5, "expected a number of 1 or more"),
        ("ratio", float("nan"), "expected a number of 1 or more"),
        ("ratio", float("inf"), "expected a number of 1 or more"),
        ("ratio", "6", "expected a number of 1 or more"),
        ("ratio", True, "expected a number of 1 or more"),
        ("n_text_sink", -1, "expected a whole number from 0"),
        ("n_sink", -1, "expected a whole number from 0"),
        ("n_sink", 1.0, "expected a whole number from 0"),
        ("n_sink", True, "expected a whole number from 0"),
        ("n_window", 0, "expected a whole number from 1"),
        ("n_window", 2**31, "expected a whole number from 1"),
        ("n_absorb", -1, "expected a whole number from 0"),
        ("coef_ratio", "6", "expected a number of 1 or more"),
        ("budget", "26MB", "expected bytes or a size such as 26MiB"),
        ("budget", 0, "expected bytes"),
        ("memory", "8GB", "expected bytes or a size such as 26MiB"),
        ("memory", 0, "expected bytes"),
        ("quality", "best", "expected one of high, medium, low"),
        ("types", "q3_k", "one of f32, f16, q8_0, q5_0, q4_0, q2_0, q1_0 expected"),
        ("types", (), "at least one of"),
        ("types", 8, "expected names such as 'q8_0+q4_0'"),
        ("type_window", "q4_0", "expected one of f32, f16, q8_0"),
        ("type_basis", "q2_0", "expected one of f32, f16, q8_0, q5_0, q4_0"),
        ("max_segments", 0, "expected a whole number from 1"),
        ("max_rank", 31, "expected a whole number from 32"),
        ("max_rank", 80, "expected a multiple of 32; use 64 or 96"),
        ("max_rank", "all", "expected a whole number from 32"),
        ("max_rank", True, "expected a whole number from 32"),
        ("work_price", -0.1, "expected a number from 0 on"),
        ("work_price", float("inf"), "expected a number from 0 on"),
        ("work_price", float("nan"), "expected a number from 0 on"),
        ("work_price", "high", "expected a number from 0 on, or None for the default"),
        ("tolerance", -0.001, "expected a number from 0 to 1"),
        ("tolerance", 1.5, "expected a number from 0 to 1"),
        ("tolerance", float("nan"), "expected a number from 0 to 1"),
        ("tolerance", "0.1", "expected a number from 0 to 1"),
        ("lead", 0, "expected a whole number from 32"),
        ("lead", -32, "expected a whole number from 32"),
        ("lead", 100, "expected a multiple of 32; use 96 or 128"),
        ("lead", 128.0, "expected a whole number from 32"),
        ("rank", "half", "expected a whole number from 1"),
        ("rank", 0, "expected a whole number from 1"),
        ("fused", "cuda", "expected 'auto', True or False"),
        ("fused", 1, "expected 'auto', True or False"),
        ("online", 1, "expected True or False"),
        ("calibrate", None, "expected True or False"),
        ("n_prior", -1, "expected a whole number from 0"),
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
