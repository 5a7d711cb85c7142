"""The options of an xkv cache, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .base.text import closest
from .errors import OptionError
from .plan.coef_types import BASIS_TYPES, DEFAULT_TYPES, WINDOW_TYPES, sort_types
from .plan.groups import FRAMES
from .plan.segments import MAX_SEGMENTS
from .plan.size_target import TARGETS, SizeTarget, one_target, parse_bytes
from .plan.waterfill import STEP
from .plan.wishes import Rank

KV_MODES = ("xkv", "f16", "q8_0", "q4_0")
MAX_TOKENS = 1 << 24
ALONE = ("group_size", "frame")  # what a sidecar decides otherwise


class Preset(NamedTuple):
    """A published configuration: layers in a group, and the options it stands for."""

    group_size: int
    options: Mapping[str, Any]


PRESETS = {
    "xkv-4": Preset(
        4,
        {
            "rank": (384, 576),
            "types": ("f16",),
            "type_basis": "f16",
            "type_window": "f16",
            "n_text_sink": 0,
            "stages": False,
            "online": False,
            "tolerance": 0.0,
        },
    )
}
"""xkv-4: Llama-3.1-8B of "xKV" (arXiv 2503.18893), section 4: ranks of groups of 4 layers of 1024 numbers, in f16."""


@dataclass(frozen=True)
class XkvOptions:
    """How an xkv cache is laid out. Sizes are in tokens, types are ggml type names.

    One number decides the size: `ratio`, `coef_ratio`, `budget`, `quality` or `memory`. None of them takes what the
    sidecar was made for. What else is None then follows from it, see `plan.cache_plan`.

    Attributes
    ----------
    sidecar : str, optional
        Path of the sidecar. None looks beside the model and in the cache folder, and makes one if there is none.
    ratio : float, optional
        f16's bytes over all bytes of this cache, at the context's n_ctx.
    coef_ratio : float, optional
        f16 bytes per token over coefficient bytes per token, the limit for a long context.
    budget : int or str, optional
        All bytes of this cache: a whole number, or a size such as "26MiB".
    quality : str, optional
        high, medium or low: a `coef_ratio` by name, see `plan.size_target.QUALITIES`.
    memory : int or str, optional
        All bytes of model, cache and compute buffers, as `budget` is given: the cache takes what is left, at most a
        quarter of f16's bytes. See docs/fit.md.
    n_sink : int
        First tokens of a sequence that stay exact.
    n_text_sink : int, optional
        Most later tokens of a sequence that stay exact because the model uses them as attention sinks, which shows in
        values near zero; one in 80 of n_ctx, and none where a rank is given.
    n_window : int, optional
        Fewest recent tokens that stay exact.
    n_absorb : int
        Most queries of a micro-batch for which attention runs on the coefficients themselves; above,
        K and V of one layer at a time are made from them first.
    type_window : str, optional
        Type of the exact tokens: f16, f32 or q8_0.
    type_basis : str, optional
        Type of the bases in memory: f32, f16, q8_0, q5_0 or q4_0; else q8_0, and q4_0 for directions whose coefficients
        have 2 bits or 1.
    types : tuple of str or str
        Types that coefficients may have: of f32, f16, q8_0, q5_0, q4_0, q2_0, q1_0, also as "q8_0+q4_0". V can have
        q1_0 only with chunks of 128 tokens or more, and q2_0 with 64.
    max_segments : int
        Most types beside each other in one kind of one group.
    rank : int, pair of int, "full" or str, optional
        This number of directions everywhere, in the one type of `types`, in place of a plan; a pair, also as
        "384+576", is of K and of V.
    preset : str, optional
        A published configuration in place of a plan, see `PRESETS`: "xkv-4". The sidecar has to have its groups.
    stages : bool
        Whether a store that is not full divides its bytes among the tokens that are there; else every token gets those
        of a full store from the start.
    online : bool
        Whether bases follow the prompt; else they stay as calibrated.
    n_prior : int
        Tokens that the calibration is worth when bases follow the prompt; the first check waits for half as many.
    fused : bool or "auto"
        Whether attention is the op XKV_ATTN on devices that have it; else it is made of stock ops. "auto": on CPUs,
        here and of `rpc-server`, where it has been run; True: on GPUs too (docs/install.md).
    tolerance : float
        With few queries, share of a query's softmax up to which a block of 16 stored tokens counts by its first `lead`
        directions alone; 0 takes all directions of all tokens.
    lead : int, optional
        Directions of K and of V that count for every token, a multiple of 32. By default 64 for layers on a Metal
        device, 128 for others.
    work_price : float, optional
        How much the work of a direction counts beside its bytes where the plan chooses directions, see
        `plan.work.work_charges`: 0 for nothing, 1 for the bytes that a CPU reads in the same time. The higher, the
        fewer directions with more bits each. None takes as much as raises the predicted distortion by at most 2 %.
    max_rank : int, optional
        Most directions of one kind of one group, a multiple of 32.
    calibrate : bool
        False uses no sidecar: bases are learnt from the first tokens, and the plan assumes the spectra's shape.
    group_size, frame : int, optional
        Most layers in a group (5, fewer where they are wide) and tokens per chunk (64, and 128 where heads have more
        than 96 numbers); only without calibration.

    Raises
    ------
    OptionError
        A value cannot be used; the text names it and what was expected.
    """

    sidecar: str | None = None
    ratio: float | None = None
    coef_ratio: float | None = None
    budget: int | str | None = None
    quality: str | None = None
    memory: int | str | None = None
    n_sink: int = 4
    n_text_sink: int | None = None
    n_window: int | None = None
    n_absorb: int = 8
    type_window: str | None = None
    type_basis: str | None = None
    types: tuple[str, ...] | str = DEFAULT_TYPES
    max_segments: int = MAX_SEGMENTS
    rank: Rank | str | None = None
    preset: str | None = None
    stages: bool = True
    online: bool = True
    n_prior: int = 2000
    fused: bool | Literal["auto"] = "auto"
    tolerance: float = 0.001
    lead: int | None = None
    work_price: float | None = None
    max_rank: int | None = None
    calibrate: bool = True
    group_size: int | None = None
    frame: int | None = None

    def __post_init__(self) -> None:
        self._take_preset()
        sidecar: object = self.sidecar
        if isinstance(sidecar, os.PathLike):
            sidecar = os.fspath(sidecar)
            object.__setattr__(self, "sidecar", sidecar)
        if sidecar is not None and not (isinstance(sidecar, str) and sidecar):
            raise OptionError(f"xkv option sidecar: {sidecar!r}, expected a path")
        for name in ("ratio", "coef_ratio"):
            if getattr(self, name) is not None and not _is_number(getattr(self, name)):
                raise OptionError(f"xkv option {name}: {getattr(self, name)!r}, expected a number of 1 or more")
        target = self.target
        if target is not None and target.kind in ("ratio", "coef_ratio"):
            object.__setattr__(self, target.kind, target.number)
        if self.memory is not None:
            try:
                object.__setattr__(self, "memory", parse_bytes(self.memory, "memory"))
            except OptionError as error:
                raise OptionError(f"xkv option {error}") from None
            if target is not None or self.rank is not None:
                other = target.kind if target is not None else "rank"
                raise OptionError(f"xkv options memory and {other}: one of them expected, both decide the size")
        _check_int("xkv option n_sink", self.n_sink, 0)
        if self.n_text_sink is not None:
            _check_int("xkv option n_text_sink", self.n_text_sink, 0)
        _check_int("xkv option n_absorb", self.n_absorb, 0)
        _check_int("xkv option n_prior", self.n_prior, 0)
        if self.lead is not None:
            _check_step("xkv option lead", self.lead)
        if self.max_rank is not None:
            _check_step("xkv option max_rank", self.max_rank)
        if self.work_price is not None and not (_is_number(self.work_price) and 0 <= self.work_price < math.inf):
            raise OptionError(
                f"xkv option work_price: {self.work_price!r}, expected a number from 0 on, or None for the default"
            )
        if not _is_number(self.tolerance) or not 0 <= self.tolerance <= 1:
            raise OptionError(f"xkv option tolerance: {self.tolerance!r}, expected a number from 0 to 1")
        _check_int("xkv option max_segments", self.max_segments, 1)
        if self.n_window is not None:
            _check_int("xkv option n_window", self.n_window, 1)
        if self.type_window is not None:
            _check_choice("xkv option type_window", self.type_window, WINDOW_TYPES)
        if self.type_basis is not None:
            _check_choice("xkv option type_basis", self.type_basis, BASIS_TYPES)
        if self.fused != "auto" and not isinstance(self.fused, bool):
            raise OptionError(f"xkv option fused: {self.fused!r}, expected 'auto', True or False")
        for name in ("stages", "online", "calibrate"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"xkv option {name}: {getattr(self, name)!r}, expected True or False")
        object.__setattr__(self, "types", _coef_types(self.types))
        self._check_rank()
        self._check_calibrate()

    def _take_preset(self) -> None:
        if self.preset is None:
            return
        _check_choice("xkv option preset", self.preset, tuple(PRESETS))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in PRESETS[self.preset].options.items():
            if getattr(self, name) not in (defaults[name], value):
                raise OptionError(f"xkv option {name}: preset {self.preset} decides it; leave one of them out")
            object.__setattr__(self, name, value)

    def _check_rank(self) -> None:
        rank: object = self.rank
        if rank is None:
            return
        if isinstance(rank, str) and rank.count("+") == 1:
            rank = tuple(int(part) if part.isdecimal() else part for part in rank.split("+"))
            object.__setattr__(self, "rank", rank)
        ranks = rank if isinstance(rank, tuple) and len(rank) == 2 else (rank,)
        if rank != "full":
            for one in ranks:
                _check_int("xkv option rank", one, 1)
        most = self.max_rank
        if most is not None and any(not isinstance(one, int) or one > most for one in ranks):
            raise OptionError(
                f"xkv option rank: {rank!r}, expected at most max_rank = {most}; lower it or leave max_rank out"
            )
        if self.target is not None:
            raise OptionError(f"xkv options rank and {self.target.kind}: one of them expected, both decide the size")
        if len(self.types) != 1:
            raise OptionError(f"xkv option rank: {rank!r}, expected together with one type in types, such as 'q8_0'")

    def _check_calibrate(self) -> None:
        if self.calibrate:
            for name in ALONE:
                if getattr(self, name) is not None:
                    raise OptionError(f"xkv option {name}: the sidecar decides it; give it with calibrate=False only")
            return
        if self.sidecar is not None:
            raise OptionError("xkv option sidecar: a path, but calibrate is False; leave one of them out")
        if not self.online:
            raise OptionError("xkv option online: False, but without calibration bases have to be learnt")
        if self.group_size is not None:
            _check_int("xkv option group_size", self.group_size, 1)
        if self.frame is not None and (isinstance(self.frame, bool) or self.frame not in FRAMES):
            raise OptionError(f"xkv option frame: {self.frame!r}, expected one of {', '.join(map(str, FRAMES))}")

    @property
    def target(self) -> SizeTarget | None:
        """The one number that decides the size; None takes the sidecar's."""
        try:
            return one_target({kind: getattr(self, kind) for kind in TARGETS})
        except OptionError as error:
            raise OptionError(f"xkv option {error}") from None

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


def _coef_types(value: object) -> tuple[str, ...]:
    names = value.split("+") if isinstance(value, str) else value
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"xkv option types: {value!r}, expected names such as 'q8_0+q4_0'")
    try:
        return sort_types(name.strip() for name in names)
    except OptionError as error:
        raise OptionError(f"xkv option types: {value!r}: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(what: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_TOKENS:
        raise OptionError(f"{what}: {value!r}, expected a whole number from {least} to {MAX_TOKENS}")


def _check_step(what: str, value: object) -> None:
    _check_int(what, value, STEP)
    if isinstance(value, int) and value % STEP:
        below = value - value % STEP
        raise OptionError(f"{what}: {value!r}, expected a multiple of {STEP}; use {below} or {below + STEP}")


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{what}: {value!r}, expected one of {', '.join(choices)}")
