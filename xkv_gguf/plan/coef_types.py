"""The ggml types that coefficients, bases and windows are stored in: what a number costs, and what it loses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OptionError


@dataclass(frozen=True)
class CoefType:
    """A ggml type.

    Attributes
    ----------
    bytes : float
        Bytes of one number, its share of the block's scale included.
    block : int
        Numbers that share a scale, 1 for plain types.
    noise : float
        Mean squared error over variance for unit Gaussian numbers: measured on 2^19 of them with gguf's quantizers,
        and for q2_0 and q1_0 with numpy ones that choose the scale as the native library does. A test measures again.
    """

    bytes: float
    block: int
    noise: float


TYPES: dict[str, CoefType] = {
    "f32": CoefType(4.0, 1, 0.0),
    "f16": CoefType(2.0, 1, 4.3e-8),
    "q8_0": CoefType(34 / 32, 32, 2.88e-5),
    "q5_0": CoefType(22 / 32, 32, 1.83e-3),
    "q4_0": CoefType(18 / 32, 32, 7.4e-3),
    "q2_0": CoefType(18 / 64, 64, 0.123),
    "q1_0": CoefType(18 / 128, 128, 0.361),
}
"""By name, in the order of their bytes."""

BASIS_TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")
WINDOW_TYPES = ("f32", "f16", "q8_0")
DEFAULT_TYPES = ("q8_0", "q5_0", "q4_0", "q2_0")
"""Without q1_0: its directions cost work and are worth nothing beside more bits for the others (docs/lab)."""
QUANT_BLOCK = 32
"""Numbers of a head that quantized windows and bases need a multiple of."""


def basis_types(quantizable: bool, type_basis: str | None = None) -> dict[str, str]:
    """Type of the directions by the type of their coefficients.

    Parameters
    ----------
    quantizable : bool
        Whether the model's heads are multiples of `QUANT_BLOCK`.
    type_basis : str, optional
        The same type for all. None: q8_0, and q4_0 where coefficients of 2 bits or 1 are much noisier than that.
    """
    if type_basis is not None:
        return dict.fromkeys(TYPES, type_basis)
    if not quantizable:
        return dict.fromkeys(TYPES, "f16")
    return {name: "q4_0" if name in ("q2_0", "q1_0") else "q8_0" for name in TYPES}


def bytes_per_coef(type_name: str) -> float:
    """Bytes of one number of a ggml type.

    Raises
    ------
    OptionError
        The type cannot hold coefficients.
    """
    return _find(type_name).bytes


def sort_types(names: Iterable[str]) -> tuple[str, ...]:
    """Coefficient types without repeats, by descending bytes.

    Raises
    ------
    OptionError
        There is none, or one cannot hold coefficients.
    """
    wanted = list(names)
    for name in wanted:
        _find(name)
    if not wanted:
        raise OptionError(f"coefficient types: none, at least one of {', '.join(TYPES)} expected")
    return tuple(name for name in TYPES if name in wanted)


def _find(type_name: str) -> CoefType:
    if type_name not in TYPES:
        raise OptionError(f"coefficient type {type_name!r}: one of {', '.join(TYPES)} expected")
    return TYPES[type_name]
