"""Binding of the C API in ``xkv.h`` to the libllama that llama_cpp runs on.

Pointers of llama_cpp (plain integers) are taken as they are and cast here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cffi

from ..errors import (
    OptionError,
    OutOfMemoryError,
    SidecarError,
    SidecarMismatchError,
    SidecarVersionError,
    UnsupportedError,
    XkvError,
)
from ..plan.coef_types import TYPES
from ..plan.segments import KINDS, Segment
from ..plan.stages import Stage
from . import loader

CDEF_BEGIN = "// CFFI-BEGIN"
CDEF_END = "// CFFI-END"
OPAQUE_TYPES = "struct llama_model;\nstruct llama_context;\n"

STATUS_OK = 0
# enum xkv_status
EXCEPTIONS: dict[int, type[XkvError]] = {
    1: OptionError,
    2: SidecarError,
    3: SidecarError,
    4: SidecarVersionError,
    5: SidecarMismatchError,
    6: UnsupportedError,
    7: OutOfMemoryError,
    8: XkvError,
}

# struct xkv_params
FUSED_CPU, FUSED_RPC, FUSED_OTHER = 1, 2, 4

# enum ggml_type
GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8, "q1_0": 41, "q2_0": 42}


@dataclass(frozen=True)
class ScopeParams:
    """What `struct xkv_params` holds, in Python types.

    Without a sidecar, `layers` (of each group) and `frame` say what it would.

    Attributes
    ----------
    n_keep, n_cell, n_slot : int
        Of a stream, for all its sequences: cells of the window that tokens stay in, those and the ones through which a
        micro-batch passes, tokens that the store has room for. See `plan.sizes.CacheLayout`.
    fused : int
        The kinds of device on which attention is the op XKV_ATTN, where they have it: the sum of `FUSED_CPU`,
        `FUSED_RPC` and `FUSED_OTHER`, or 0.
    leads : tuple of int
        In place of `n_lead`, of each layer of the model; empty where it is the same for all.
    """

    segments: tuple[Segment, ...]
    sidecar: str | None
    n_keep: int
    n_cell: int
    n_slot: int
    n_sink: int = 4
    n_text_sink: int = 0
    n_window: int = 64
    n_absorb: int = 8
    online: bool = True
    n_prior: int = 2000
    fused: int = FUSED_CPU
    tolerance: float = 0.0
    n_lead: int = 128
    leads: tuple[int, ...] = ()
    layers: tuple[tuple[int, ...], ...] = ()
    frame: int = 0
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class OnlineInfo:
    """How the bases of a stream follow what it reads.

    Attributes
    ----------
    n_update, n_check : int
        Times that bases were renewed, and that it was found out whether they should be.
    residual, expected : float
        Share of the variance that the bases lost at the last check, and that the plan expects.
    seconds : float
        That checks and renewals took.
    """

    n_update: int
    n_check: int
    residual: float
    expected: float
    seconds: float


@dataclass(frozen=True)
class Native:
    """The C API: `ffi` makes and casts values, `lib` holds the functions."""

    ffi: cffi.FFI
    lib: Any

    def model(self, pointer: int) -> Any:
        """Cast a `llama_model_p` of llama_cpp."""
        return self.ffi.cast("struct llama_model *", _address(pointer))

    def context(self, pointer: int) -> Any:
        """Cast a `llama_context_p` of llama_cpp."""
        return self.ffi.cast("struct llama_context *", _address(pointer))

    def text(self, pointer: Any) -> str:
        """Copy a C string."""
        return bytes(self.ffi.string(pointer)).decode("utf-8", errors="replace")


def declarations(header: str) -> str:
    """Cut the declarations for cffi out of the text of ``xkv.h``."""
    return OPAQUE_TYPES + header.partition(CDEF_BEGIN)[2].partition(CDEF_END)[0]


@functools.cache
def native() -> Native:
    """Load the library and bind it; later calls return the same object.

    Raises
    ------
    LibraryError
        See `loader.load`.
    """
    library = loader.load()
    ffi = cffi.FFI()
    ffi.cdef(declarations(library.header.read_text(encoding="utf-8")))
    return Native(ffi, ffi.dlopen(str(library.path)))


def last_error() -> str:
    """Text of the last failure on this thread, "" when there was none."""
    api = native()
    return api.text(api.lib.xkv_last_error())


def clear_last_error() -> None:
    """Forget it, before a call of llama.cpp that does not clear it."""
    native().lib.xkv_clear_error()


def check_status(code: int) -> None:
    """Raise the exception that belongs to a status code, with the library's text; do nothing for OK."""
    if code == STATUS_OK:
        return
    raise EXCEPTIONS.get(code, XkvError)(last_error() or f"the native library failed with status {code}")


@contextmanager
def scope(params: ScopeParams) -> Iterator[None]:
    """Make the contexts that this thread creates inside keep their KV cache as xkv.

    Raises
    ------
    XkvError
        The sidecar or a parameter cannot be used.
    """
    api = native()
    # cffi keeps no reference to what a struct's pointers point to: these names do
    sidecar = api.ffi.NULL if params.sidecar is None else api.ffi.new("char[]", os.fsencode(params.sidecar))
    layers, count = layer_lists(api, params.layers)
    segments = _segments(api, params.segments)
    leads = api.ffi.new("uint32_t[]", params.leads)
    early = [_segments(api, stage.segments) if stage.segments else api.ffi.NULL for stage in params.stages]
    stages = api.ffi.new(
        "struct xkv_stage[]",
        [
            (s.n_slot, e, len(s.segments), GGML_TYPES[s.type], TYPES[s.type].noise)
            for s, e in zip(params.stages, early, strict=True)
        ],
    )
    fields: dict[str, Any] = {
        "sidecar": sidecar,
        "layers": layers,
        "count": count,
        "n_group": len(params.layers),
        "frame": params.frame,
        "segments": segments,
        "n_segment": len(params.segments),
        "stages": stages,
        "n_stage": len(stages),
        "n_sink": params.n_sink,
        "n_text_sink": params.n_text_sink,
        "n_window": params.n_window,
        "n_absorb": params.n_absorb,
        "online": int(params.online),
        "n_prior": params.n_prior,
        "fused": int(params.fused),
        "tolerance": params.tolerance,
        "n_lead": params.n_lead,
        "leads": leads,
        "n_leads": len(leads),
        "n_keep": params.n_keep,
        "n_cell": params.n_cell,
        "n_slot": params.n_slot,
    }
    check_status(api.lib.xkv_scope_begin(api.ffi.new("struct xkv_params *", fields)))
    try:
        yield
    finally:
        api.lib.xkv_scope_end()


def _segments(api: Native, segments: Iterable[Segment]) -> Any:
    """An array of struct xkv_segment."""
    return api.ffi.new(
        "struct xkv_segment[]",
        [
            (s.group, KINDS.index(s.kind), s.rank, GGML_TYPES[s.type], GGML_TYPES[s.type_basis], TYPES[s.type].noise)
            for s in segments
        ],
    )


def layer_lists(api: Native, groups: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Layers of groups as two arrays: the layers of all, group by group, and how many each has."""
    layers = [layer for group in groups for layer in group]
    return api.ffi.new("uint32_t[]", layers), api.ffi.new("uint32_t[]", [len(group) for group in groups])


def check_model(model: int) -> None:
    """Raise UnsupportedError, with the reason, when a loaded model cannot be used with xkv."""
    api = native()
    check_status(api.lib.xkv_model_check(api.model(model)))


def attach(context: int) -> None:
    """Tell an xkv cache its context, before the first batch."""
    api = native()
    api.lib.xkv_attach(api.context(context))


def is_xkv(context: int) -> bool:
    """Whether a context's memory is an xkv cache."""
    api = native()
    return bool(api.lib.xkv_context_is_xkv(api.context(context)))


def report(context: int) -> list[tuple[str, int]]:
    """Parts of a context's KV cache of any kind: name and bytes allocated."""
    return _parts("xkv_report", context)


def scratch(context: int) -> list[tuple[str, int]]:
    """Parts of a context's scratch: what does not grow with n_ctx, or is given back; name and bytes."""
    return _parts("xkv_scratch", context)


def _parts(function: str, context: int) -> list[tuple[str, int]]:
    api = native()
    ctx = api.context(context)
    ask = getattr(api.lib, function)
    count = api.ffi.new("uint32_t *", 0)
    check_status(ask(ctx, api.ffi.NULL, count))
    parts = api.ffi.new("struct xkv_report_part[]", count[0])
    check_status(ask(ctx, parts, count))
    return [(api.text(part.name), int(part.bytes)) for part in parts]


def seq_tokens(context: int, seq_id: int) -> tuple[int, int]:
    """Tokens of a sequence in an xkv cache: exact (sinks and window) and compressed."""
    api = native()
    n_exact, n_stored = api.ffi.new("uint32_t *"), api.ffi.new("uint32_t *")
    check_status(api.lib.xkv_seq_tokens(api.context(context), seq_id, n_exact, n_stored))
    return int(n_exact[0]), int(n_stored[0])


def online_info(context: int, seq_id: int) -> OnlineInfo:
    """How the bases of the stream that holds a sequence have followed what it read, in an xkv cache."""
    api = native()
    info = api.ffi.new("struct xkv_online_info *")
    check_status(api.lib.xkv_online(api.context(context), seq_id, info))
    return OnlineInfo(int(info.n_update), int(info.n_check), float(info.residual), float(info.expected), info.seconds)


def take_refusal(context: int) -> XkvError | None:
    """What an xkv context refused or failed at since the last call, as the exception that says so."""
    api = native()
    code = api.lib.xkv_context_refusal(api.context(context))
    return None if code == STATUS_OK else EXCEPTIONS.get(code, XkvError)(last_error())


def _address(pointer: Any) -> int:
    """Address of a ctypes pointer or of the integer that llama_cpp uses for one."""
    return int(getattr(pointer, "value", pointer) or 0)
