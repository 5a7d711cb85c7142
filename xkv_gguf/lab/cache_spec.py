"""Caches as a user names them on the command line: ``f16``, ``q8_0``, ``q4_0``, ``xkv[:RATIO][:key=value]...``.

What the keys mean is not known here: `XkvOptions` checks them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.text import closest
from ..errors import OptionError
from ..options import KV_MODES

GRAMMAR = f"{', '.join(mode for mode in KV_MODES if mode != 'xkv')} or xkv[:RATIO][:key=value]..."
MINICACHE = "minicache"
NO_SEPARATORS = "values cannot contain commas or colons, paths neither"

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class CacheSpec:
    """A cache to run.

    Attributes
    ----------
    name : str
        As the user wrote it.
    kv_mode : str
        See `options.KV_MODES`.
    options : mapping
        Fields of `XkvOptions` for xkv, empty for other modes.
    """

    name: str
    kv_mode: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_minicache(self) -> bool:
        """Whether layers of an f16 cache are merged after the prompt, see `minicache`; `eval` alone does that."""
        return self.name == MINICACHE

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments kv_mode and xkv of `Llama`."""
        return {"kv_mode": self.kv_mode, "xkv": dict(self.options) if self.kv_mode == "xkv" else None}

    @property
    def wants_sidecar(self) -> bool:
        """Whether it takes the model's sidecar: an xkv cache that names none and does not do without."""
        return self.kv_mode == "xkv" and "sidecar" not in self.options and self.options.get("calibrate") is not False


def parse_cache(text: str, option: str = "--caches", baselines: bool = False) -> CacheSpec:
    """Read one cache such as ``q4_0`` or ``xkv:7:n_window=64``.

    Parameters
    ----------
    text : str
    option : str
        What errors name as their place.
    baselines : bool
        Whether "minicache" is one.

    Returns
    -------
    CacheSpec
        Values that look like whole numbers, numbers, true or false become that, others stay text.

    Raises
    ------
    OptionError
        The cache is unknown, or is not written by the grammar.
    """
    name = text.strip()
    if name == MINICACHE and baselines:
        return CacheSpec(name, "f16")
    mode, *words = name.split(":")
    if mode not in KV_MODES:
        raise OptionError(
            f"{option}: {name!r} is unknown{closest(mode, KV_MODES)}; expected {GRAMMAR}; {NO_SEPARATORS}"
        )
    if words and mode != "xkv":
        raise OptionError(f"{option}: {name!r}: only xkv takes a ratio and options")
    options: dict[str, Any] = {}
    for place, word in enumerate(words):
        key, equals, value = word.partition("=")
        if place == 0 and not equals:
            key, value = "ratio", word
            if not (_FLOAT.fullmatch(value) and math.isfinite(float(value)) and float(value) >= 1):
                raise OptionError(f"{option}: {name!r}: the ratio {value!r} is no number of 1 or more")
        elif not (equals and key and value):
            raise OptionError(f"{option}: {name!r}: {word!r}, expected key=value; {NO_SEPARATORS}")
        if key in options:
            raise OptionError(f"{option}: {name!r}: {key} is given twice")
        options[key] = parse_value(value)
    return CacheSpec(name, mode, options)


def parse_caches(text: str, option: str = "--caches", baselines: bool = False) -> list[CacheSpec]:
    """Read a list of caches with commas between.

    Raises
    ------
    OptionError
        An entry is empty or cannot be read (see `parse_cache`), or two of them are the same cache.
    """
    specs: list[CacheSpec] = []
    for word in text.split(","):
        if not word.strip():
            raise OptionError(f"{option}: {text!r}, expected a list with commas between its entries")
        spec = parse_cache(word, option, baselines)
        for other in specs:
            if (other.arguments, other.is_minicache) == (spec.arguments, spec.is_minicache):
                same = "is given twice" if other.name == spec.name else f"is the same cache as {other.name!r}"
                raise OptionError(f"{option}: {spec.name!r} {same}")
        specs.append(spec)
    return specs


def parse_value(text: str) -> int | float | bool | str:
    """A value by its looks: whole number, number, true, false, or the text itself."""
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _WORDS.get(text, text)
