from __future__ import annotations

import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.lab.cache_spec import CacheSpec, parse_cache, parse_caches


def test_plain_caches_and_xkv() -> None:
    assert parse_caches("f16, q8_0,q4_0 ,xkv") == [CacheSpec(n, n) for n in ("f16", "q8_0", "q4_0", "xkv")]


@pytest.mark.parametrize(
    "text, options",
    [
        ("xkv", {}),
        ("xkv:7", {"ratio": 7}),
        ("xkv:6.5", {"ratio": 6.5}),
        ("xkv:7:online=false", {"ratio": 7, "online": False}),
        ("xkv:n_window=64:type_coef=q4_0", {"n_window": 64, "type_coef": "q4_0"}),
        ("xkv:ratio=8:online=true:budget=1e-3", {"ratio": 8, "online": True, "budget": 0.001}),
        ("xkv:sidecar=/a b/x.xkv.gguf:types=q8_0+q4_0", {"sidecar": "/a b/x.xkv.gguf", "types": "q8_0+q4_0"}),
        ("xkv:query=a=b", {"query": "a=b"}),
    ],
)
def test_options_of_xkv(text: str, options: dict[str, object]) -> None:
    spec = parse_cache(text)
    assert spec == CacheSpec(text, "xkv", options)
    assert {key: type(value) for key, value in spec.options.items()} == {k: type(v) for k, v in options.items()}
    assert spec.arguments == {"kv_mode": "xkv", "xkv": options}


def test_plain_caches_take_no_options() -> None:
    assert parse_cache("q4_0").arguments == {"kv_mode": "q4_0", "xkv": None}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f16", False),
        ("xkv", True),
        ("xkv:7:calibrate=true", True),
        ("xkv:7:calibrate=false", False),
        ("xkv:sidecar=a.xkv.gguf", False),
    ],
)
def test_the_models_sidecar_is_for_caches_that_name_none(text: str, expected: bool) -> None:
    assert parse_cache(text).wants_sidecar == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f16,q9_0", "'q9_0' is unknown.*expected f16, q8_0, q4_0 or xkv"),
        ("q4-0", "did you mean 'q4_0'"),
        ("", "commas between"),
        ("f16,,xkv", "commas between"),
        ("f16:2", "only xkv takes a ratio"),
        ("xkv:big", "the ratio 'big' is no number of 1 or more"),
        ("xkv:0", "the ratio '0' is no number of 1 or more"),
        ("xkv:0.5", "the ratio '0.5' is no number of 1 or more"),
        ("xkv:-3", "the ratio '-3' is no number of 1 or more"),
        ("xkv:nan", "the ratio 'nan' is no number of 1 or more"),
        ("xkv:1e999", "the ratio '1e999' is no number of 1 or more"),
        ("xkv:", "the ratio '' is no number of 1 or more"),
        ("xkv:7:8", "'8', expected key=value; values cannot contain commas or colons, paths neither"),
        ("xkv:7:n_window=", "'n_window=', expected key=value"),
        ("xkv:=3", "'=3', expected key=value"),
        ("xkv:7:ratio=8", "ratio is given twice"),
        ("xkv:n_sink=4:n_sink=4", "n_sink is given twice"),
        ("xkv:sidecar=/a:b", "'b', expected key=value; values cannot contain commas or colons"),
        ("xkv:sidecar=/a,b", "'b' is unknown.*values cannot contain commas or colons, paths neither"),
        ("xkv,xkv", "'xkv' is given twice"),
        ("xkv:7,xkv:ratio=7.0", "'xkv:ratio=7.0' is the same cache as 'xkv:7'"),
        ("xkv:n_sink=4:n_window=64,xkv:n_window=64:n_sink=4", "is the same cache as"),
    ],
)
def test_impossible_caches_are_refused(text: str, expected: str) -> None:
    with pytest.raises(OptionError, match=f"--caches: .*{expected}"):
        parse_caches(text)


def test_another_option_can_be_named() -> None:
    with pytest.raises(OptionError, match="--cache: 'x' is unknown"):
        parse_cache("x", "--cache")
