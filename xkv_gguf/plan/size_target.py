"""The one number that decides a cache's size: a ratio, a coefficient ratio, a budget, or a quality."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import OptionError

TargetKind = Literal["ratio", "coef_ratio", "budget", "quality"]
TARGETS: tuple[TargetKind, ...] = ("ratio", "coef_ratio", "budget", "quality")

QUALITIES: dict[str, float] = {"high": 6.0, "medium": 10.0, "low": 16.0}
"""Coefficient ratio of each quality."""

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|kib|mib|gib)", re.IGNORECASE)
_MAX_RATIO = 1e6


@dataclass(frozen=True)
class SizeTarget:
    """What a plan is made for.

    Attributes
    ----------
    kind : str
        "ratio": f16's bytes over all bytes of the cache at the context's n_ctx. "coef_ratio": f16 bytes per token over
        the coefficients' bytes per token. "budget": bytes in all. "quality": a coefficient ratio by name, and where
        a model is too small for it the nearest that it allows.
    value : str
        As in a sidecar: a number, bytes, or a name of `QUALITIES`.

    Raises
    ------
    OptionError
        The kind is unknown or the value impossible.
    """

    kind: str
    value: str

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise OptionError(f"plan {self.kind!r}: one of {', '.join(TARGETS)} expected")
        # refuses what of() would, and leaves one spelling for each value
        object.__setattr__(self, "value", _canonical(self.kind, self.value))

    @classmethod
    def of(cls, kind: str, value: object) -> SizeTarget:
        """A size target from a number or text.

        Raises
        ------
        OptionError
            The text names the size target, what was found, and what is expected.
        """
        return cls(kind, _canonical(kind, value))

    @property
    def number(self) -> float:
        """Ratio, coefficient ratio (that of the quality), or bytes."""
        return QUALITIES[self.value] if self.kind == "quality" else float(self.value)

    def __str__(self) -> str:
        return f"{self.kind} {self.value}" + (" bytes" if self.kind == "budget" else "")


def one_target(values: Mapping[str, Any]) -> SizeTarget | None:
    """The size target among optional values by name; None when none of them is given.

    Raises
    ------
    OptionError
        Two are given, or the value is impossible.
    """
    given = [kind for kind in TARGETS if values.get(kind) is not None]
    if len(given) > 1:
        raise OptionError(f"{given[0]}: {given[1]} is given as well, one of them expected; both decide the size")
    return SizeTarget.of(given[0], values[given[0]]) if given else None


def parse_bytes(value: object, name: str = "budget") -> int:
    """Bytes from a whole number or a text such as "26MiB" or "1.5GiB"; `name` is what an error names.

    Raises
    ------
    OptionError
        It is neither, or not above 0.
    """
    count: float = 0
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        count = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= count < 2**63:
        raise OptionError(f"{name}: {value!r}, expected bytes or a size such as 26MiB or 1.5GiB")
    return int(count)


def _canonical(kind: str, value: object) -> str:
    if kind == "budget":
        return str(parse_bytes(value))
    if kind == "quality":
        if not isinstance(value, str) or value not in QUALITIES:
            raise OptionError(f"quality: {value!r}, expected one of {', '.join(QUALITIES)}")
        return value
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not 1 <= number < _MAX_RATIO:
        raise OptionError(f"{kind}: {value!r}, expected a number of 1 or more")
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


DEFAULT_TARGET = SizeTarget("quality", "medium")
