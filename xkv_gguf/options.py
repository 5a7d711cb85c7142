"""The options of an xkv cache, checked when they are made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError

KV_MODES = ("xkv", "f16", "q8_0", "q4_0")
COEF_TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")
BASIS_TYPES = ("f32", "f16")
MAX_TOKENS = 1 << 24
BLOCK_STEP = 32  # every frame length divides into a block


@dataclass(frozen=True)
class XkvOptions:
    """How an xkv cache is laid out. Sizes are in tokens, types are ggml type names.

    Attributes
    ----------
    sidecar : str, optional
        Path of the sidecar. None looks beside the model and in the cache folder, and makes one if there is none.
    ratio : float, optional
        f16 bytes per token over coefficient bytes per token, in the limit of a long context. None takes the ranks
        that the sidecar was planned with.
    n_sink : int
        First tokens of a sequence that stay exact.
    n_window : int
        Most recent tokens that stay exact.
    n_block : int
        Tokens that leave the window together: a multiple of the sidecar's frame.
    n_absorb : int
        Most queries of a micro-batch for which attention runs on the coefficients themselves; above,
        K and V of one layer at a time are made from them first.
    type_coef : str
        Type of the stored coefficients: f32, f16, q8_0, q5_0 or q4_0.
    type_coef_v : str, optional
        Type of the coefficients of V where it differs. None is `type_coef`.
    type_basis : str
        Type of the bases in memory: f32 or f16. On the CPU, those of K are f32 in any case, which is faster.

    Raises
    ------
    OptionError
        A value cannot be used; the text names it and what was expected.
    """

    sidecar: str | None = None
    ratio: float | None = None
    n_sink: int = 4
    n_window: int = 128
    n_block: int = 128
    n_absorb: int = 8
    type_coef: str = "q8_0"
    type_coef_v: str | None = None
    type_basis: str = "f16"

    def __post_init__(self) -> None:
        sidecar: object = self.sidecar
        if isinstance(sidecar, os.PathLike):
            sidecar = os.fspath(sidecar)
            object.__setattr__(self, "sidecar", sidecar)
        if sidecar is not None and not (isinstance(sidecar, str) and sidecar):
            raise OptionError(f"xkv option sidecar: {sidecar!r}, expected a path")
        if self.ratio is not None:
            if not _is_number(self.ratio) or not math.isfinite(self.ratio) or self.ratio <= 0:
                raise OptionError(f"xkv option ratio: {self.ratio!r}, expected a number above 0")
            object.__setattr__(self, "ratio", float(self.ratio))
        _check_int("xkv option n_sink", self.n_sink, 0)
        _check_int("xkv option n_window", self.n_window, 1)
        _check_int("xkv option n_absorb", self.n_absorb, 0)
        _check_int("xkv option n_block", self.n_block, 1)
        if self.n_block % BLOCK_STEP:
            raise OptionError(f"xkv option n_block: {self.n_block}, expected a multiple of {BLOCK_STEP}")
        _check_choice("xkv option type_coef", self.type_coef, COEF_TYPES)
        if self.type_coef_v is not None:
            _check_choice("xkv option type_coef_v", self.type_coef_v, COEF_TYPES)
        _check_choice("xkv option type_basis", self.type_basis, BASIS_TYPES)

    @property
    def type_coef_k(self) -> str:
        """Type of the coefficients of K."""
        return self.type_coef

    @property
    def coef_types(self) -> tuple[str, str]:
        """Types of the coefficients of K and of V."""
        return self.type_coef, self.type_coef_v or self.type_coef

    @property
    def n_exact(self) -> int:
        """Tokens that sinks, window and the block that is filling take: a context has to be larger."""
        return self.n_sink + self.n_window + self.n_block

    @classmethod
    def of(cls, value: XkvOptions | Mapping[str, Any] | None) -> XkvOptions:
        """Make options from a mapping of field names to values, or return options as they are.

        Parameters
        ----------
        value : XkvOptions or mapping or None
            None gives the defaults.

        Returns
        -------
        XkvOptions

        Raises
        ------
        OptionError
            A key is no field, a value cannot be used, or `value` is something else.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(f"xkv: {type(value).__name__}, expected XkvOptions or a dict with its fields")
        names = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in names:
                raise OptionError(f"xkv option {key!r} is unknown{closest(key, names)}; known: {', '.join(names)}")
        return cls(**value)


def check_kv_mode(kv_mode: object) -> str:
    """Return a known kv_mode; raise OptionError that lists them for another one."""
    if not isinstance(kv_mode, str) or kv_mode not in KV_MODES:
        raise OptionError(f"kv_mode: {kv_mode!r} is unknown, expected one of {', '.join(KV_MODES)}")
    return kv_mode


def closest(name: object, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ", did you mean ..." or ""."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(what: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_TOKENS:
        raise OptionError(f"{what}: {value!r}, expected a whole number from {least} to {MAX_TOKENS}")


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{what}: {value!r}, expected one of {', '.join(choices)}")
