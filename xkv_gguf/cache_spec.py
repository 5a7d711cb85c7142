"""Caches as a command line names them: ``f16``, ``q4_0``, ``xkv:7``, ``xkv:7:n_window=256``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import OptionError
from .options import KV_MODES, closest


@dataclass(frozen=True)
class CacheSpec:
    """A cache: `name` as the user wrote it, its kv_mode, and the options of xkv that differ from the defaults."""

    name: str
    kv_mode: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_cache(text: str) -> CacheSpec:
    """Read one cache: a kv_mode, and for xkv a ratio and ``key=value``, with colons between.

    Raises
    ------
    OptionError
        The kv_mode is unknown, or what follows it cannot be read.
    """
    mode, *rest = text.split(":")
    if mode not in KV_MODES:
        raise OptionError(f"cache {text!r} is unknown{closest(mode, KV_MODES)}; expected {', '.join(KV_MODES)}")
    if rest and mode != "xkv":
        raise OptionError(f"cache {text!r}: only xkv takes options")
    options: dict[str, Any] = {}
    for index, word in enumerate(rest):
        key, equals, value = word.partition("=")
        if equals and key:
            options[key] = _value(value)
        elif index == 0 and isinstance(_value(word), (int, float)):
            options["ratio"] = float(word)
        else:
            raise OptionError(f"cache {text!r}: {word!r}, expected a ratio or key=value")
    return CacheSpec(text, mode, options)


def parse_caches(text: str) -> list[CacheSpec]:
    """Read a list such as ``f16,q8_0,xkv:8``.

    Raises
    ------
    OptionError
        An entry cannot be read or is given twice.
    """
    specs: list[CacheSpec] = []
    for word in text.split(","):
        spec = parse_cache(word.strip())
        if spec.name in [other.name for other in specs]:
            raise OptionError(f"cache {spec.name!r} is given twice")
        specs.append(spec)
    return specs


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
