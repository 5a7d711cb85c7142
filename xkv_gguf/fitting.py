"""What contexts of a model take before they are made, and the cache that fits into a memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from . import opening, placing
from .base.memory import free_memory
from .base.text import format_bytes
from .errors import OptionError, OutOfMemoryError, UnsupportedError
from .model.file import ModelFile
from .opening import Planned
from .options import XkvOptions
from .plan.cache_plan import CachePlan
from .plan.coef_types import bytes_per_coef
from .plan.fit import RATIOS, Taken, largest_budget, longest, renewal_bytes
from .plan.sizes import ModelShape, padded_ctx
from .runtime import arguments, native
from .runtime.shape import find_shape, model_shape
from .runtime.simulate import ContextSizes, context_sizes, model_without_memory
from .sidecar.read import Sidecar

N_BATCH = 512
DIVISION = ("n_gpu_layers", "tensor_split")


@dataclass(frozen=True)
class Context:
    """A context that was not made.

    Attributes
    ----------
    taken : Taken
    sizes : ContextSizes
    plan : CachePlan or None
        Of an xkv cache.
    """

    taken: Taken
    sizes: ContextSizes
    plan: CachePlan | None = None


class Fitting:
    """Contexts of one model that are sized, not made. Close it after use, or use it with `with`.

    Parameters
    ----------
    model : ModelFile
    settings : mapping
        Arguments of `Llama` that all contexts have, but for their size and types.
    rpc_fused : bool
        Whether all RPC servers are known to have the op XKV_ATTN.
    """

    def __init__(self, model: ModelFile, settings: Mapping[str, Any], rpc_fused: bool = False) -> None:
        self.model = model
        self.settings = dict(settings)
        self._rpc_fused = rpc_fused
        self._stack = ExitStack()
        self._opened: tuple[Any, ...] | None = None
        self._pointer = 0
        self._shape: ModelShape | None = None

    def __enter__(self) -> Fitting:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._opened = None
        self._stack.close()

    @property
    def shape(self) -> ModelShape:
        """Of the layers that an xkv cache holds.

        Raises
        ------
        UnsupportedError
            An xkv cache cannot be used with the model.
        """
        if self._shape is None:
            self._shape = model_shape(self._open(self.settings))
        return self._shape

    def plain(self, kv_mode: str, n_ctx: int) -> Context:
        """A context with a plain cache.

        Raises
        ------
        XkvError
            llama.cpp cannot make it.
        """
        kind = native.GGML_TYPES[kv_mode]
        settings = {**self._sized(n_ctx), "type_k": kind, "type_v": kind}
        asked = settings.get("flash_attn")
        settings["flash_attn"] = arguments.takes_flash(self.model.architecture, kv_mode, asked)
        sizes = context_sizes(self._open(settings), settings)
        return Context(_taken(sizes), sizes)

    def xkv(self, options: XkvOptions, sidecar: Sidecar | None, n_ctx: int) -> Context:
        """A context with an xkv cache; without a sidecar, spectra are assumed.

        Raises
        ------
        XkvError
            The size is out of reach, or llama.cpp cannot make it.
        """
        settings = self._sized(n_ctx)
        if settings.get("swa_full") is None:
            settings["swa_full"] = False  # as Llama beside such a cache
        found = opening.scope_params(
            sidecar,
            options,
            settings["n_ctx"],
            settings.get("n_ubatch"),
            self.model,
            settings["n_batch"],
            on_devices=placing.on_devices(settings, self._rpc_fused),
            shape=self.shape,
        )
        arguments.check_ctx_for_xkv(found.plan.layout)
        if any(found.placement.counts):
            placing.divide(found.placement, settings)
        settings["n_ubatch"] = found.plan.layout.n_ubatch
        settings["type_k"] = settings["type_v"] = native.GGML_TYPES[found.plan.layout.type_window]
        sizes = context_sizes(self._open(settings), settings, found.params)
        return Context(_taken(sizes, _renewals(found, sidecar, self.shape)), sizes, found.plan)

    def compute_bytes(self, kv_mode: str, found: Planned | None) -> int:
        """Compute buffers of a context of the settings; of an xkv cache, as it was planned."""
        kind = native.GGML_TYPES[found.plan.layout.type_window if found else kv_mode]
        settings = {**self._sized(self.settings["n_ctx"]), "type_k": kind, "type_v": kind}
        if found is not None:
            settings["n_ubatch"] = found.plan.layout.n_ubatch
        sizes = context_sizes(self._open(settings), settings, found.params if found else None)
        return sizes.scratch.get("compute buffers", 0)

    def within_memory(self, options: XkvOptions, sidecar: Sidecar | None, n_ctx: int) -> XkvOptions:
        """The same options with a budget in place of their memory.

        Raises
        ------
        OutOfMemoryError
            It does not fit; the text says what takes how much.
        XkvError
            See `xkv`.
        """
        memory = options.memory
        assert isinstance(memory, int)
        last: Context | None = None

        def take(budget: int) -> tuple[int, int]:
            nonlocal last
            last = self.xkv(replace(options, memory=None, budget=budget), sidecar, n_ctx)
            assert last.plan is not None
            return last.plan.total_bytes, last.taken.total

        whole = 2 * self.shape.numbers * padded_ctx(n_ctx)
        reason = ""
        for ratio in RATIOS:
            try:
                budget = largest_budget(take, memory, int(whole / ratio))
            except OptionError as error:
                reason = str(error)
                if last is None:
                    continue  # no cache of this context is that small
                break
            if budget is not None:
                return replace(options, memory=None, budget=budget)
            break
        if last is None:
            raise OptionError(reason)
        raise OutOfMemoryError(_too_small(memory, n_ctx, last, reason))

    def _sized(self, n_ctx: int) -> dict[str, Any]:
        n_ctx = padded_ctx(n_ctx)
        return {**self.settings, "n_ctx": n_ctx, "n_batch": min(self.settings.get("n_batch", N_BATCH), n_ctx)}

    def _open(self, settings: Mapping[str, Any]) -> int:
        """The model with its layers divided as these arguments say."""
        wanted = tuple(repr(settings.get(name)) for name in DIVISION)
        if self._opened != wanted:
            self.close()
            self._pointer = self._stack.enter_context(model_without_memory(self.model.path, settings))
            self._opened = wanted
        return self._pointer


def _taken(sizes: ContextSizes, renewals: int = 0) -> Taken:
    return Taken(sizes.weights, sum(sizes.parts.values()), sum(sizes.scratch.values()), renewals)


def _renewals(found: Planned, sidecar: Sidecar | None, shape: ModelShape) -> int:
    layers = found.params.layers if sidecar is None else sidecar.statistics().layers
    stages = [stage.segments for stage in found.plan.stages if stage.segments]
    return renewal_bytes(shape, layers, [*stages, found.plan.segments])


def _too_small(memory: int, n_ctx: int, last: Context, reason: str) -> str:
    """What an error says of a memory that is too small, from the last context that was sized."""
    assert last.plan is not None
    taken = last.taken
    beside = taken.total - last.plan.total_bytes
    parts = f"weights {format_bytes(taken.weights)}, all else {format_bytes(beside - taken.weights)}"
    if memory <= beside:
        return (
            f"memory {format_bytes(memory)}: {format_bytes(beside)} are taken without a cache ({parts}) at n_ctx "
            f"{n_ctx}, expected more; raise memory"
        )
    return (
        f"memory {format_bytes(memory)}: {format_bytes(memory - beside)} are left for the cache at n_ctx {n_ctx} "
        f"beside {parts}; {reason}"
    )


def check_memory(model: ModelFile, settings: Mapping[str, Any], kv_mode: str, found: Planned | None = None) -> None:
    """Refuse a context on the host that is larger than the memory that is free.

    The model's weights count where they are read into memory or locked there: a mapped file's pages are given back.

    Parameters
    ----------
    model : ModelFile
    settings : mapping
        Arguments of `Llama`.
    kv_mode : str
    found : Planned, optional
        Of an xkv cache.

    Raises
    ------
    OutOfMemoryError
        Says what is needed, and what is there.
    """
    free, n_ctx = free_memory(), int(settings["n_ctx"])
    if free is None:
        return
    if found is not None:
        cache = sum(found.device_bytes.values())
    else:
        shape = find_shape(model.path)
        cache = int(shape.numbers * bytes_per_coef(kv_mode)) * n_ctx if shape else 0
    weights = 0 if _is_mapped(settings) else model.n_bytes
    compute = 0
    if cache + weights <= free < cache + weights + _most_compute(n_ctx, settings):
        # near the limit, what llama.cpp says counts: to ask it takes about a second
        with Fitting(model, settings) as fitting:
            compute = fitting.compute_bytes(kv_mode, found)
    needed = cache + weights + compute
    if needed > free:
        beside = f" beside weights of {format_bytes(weights)}" if weights else ""
        buffers = f", buffers {format_bytes(compute)}" if compute else ""
        raise OutOfMemoryError(
            f"n_ctx: {n_ctx} tokens of a {kv_mode} cache take {format_bytes(cache)}{beside}{buffers}, "
            f"{format_bytes(free)} of memory are free; lower n_ctx"
        )


def _is_mapped(settings: Mapping[str, Any]) -> bool:
    """Whether the model's file is mapped and not locked; llama_cpp maps none that has an adapter."""
    mapped = settings.get("use_mmap", True) and settings.get("lora_path") is None
    return bool(mapped and not settings.get("use_mlock"))


def _most_compute(n_ctx: int, settings: Mapping[str, Any]) -> int:
    """More than compute buffers take: masks in f32 and f16, and for all else 2 GiB."""
    n_ubatch = int(min(settings.get("n_ubatch", N_BATCH), settings["n_batch"]))
    return 6 * n_ctx * n_ubatch + (2 << 30)


@dataclass(frozen=True)
class Fit:
    """One kind of cache in a memory.

    Attributes
    ----------
    n_ctx : int
        Context that was looked at: the longest that fits, or the one that was asked for; 0 where there is none.
    context : Context or None
        What it takes; None where there is none.
    fits : bool
    why : str
        Why there is no context; else empty.
    """

    n_ctx: int
    context: Context | None
    fits: bool
    why: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of cache: a `kv_mode`, and of xkv its options (without a memory) and the sidecar, if there is one."""

    kv_mode: str
    options: XkvOptions = field(default_factory=XkvOptions)
    sidecar: Sidecar | None = None

    def context(self, fitting: Fitting, n_ctx: int) -> Context:
        """A context with such a cache. Raises as `Fitting.plain` and `Fitting.xkv`."""
        if self.kv_mode == "xkv":
            return fitting.xkv(self.options, self.sidecar, n_ctx)
        return fitting.plain(self.kv_mode, n_ctx)


def find_longest(fitting: Fitting, kind: Kind, memory: int, most: int) -> Fit:
    """The longest context of at most `most` tokens that fits into a memory with this kind of cache."""
    found: dict[int, Context] = {}
    why = ""

    def size(n_ctx: int) -> int | None:
        nonlocal why
        try:
            found[n_ctx] = kind.context(fitting, n_ctx)
        except OptionError as error:
            why = str(error)
            return None
        return found[n_ctx].taken.total

    try:
        n_ctx = longest(size, memory, most)
    except UnsupportedError as error:
        return Fit(0, None, False, str(error))
    if n_ctx is not None:
        return Fit(n_ctx, found[n_ctx], True)
    if not found:
        return Fit(0, None, False, why)
    least = min(found)
    needed = format_bytes(found[least].taken.total)
    return Fit(0, None, False, f"{needed} are needed at n_ctx {least}, expected {format_bytes(memory)} at most")


def size_at(fitting: Fitting, kind: Kind, memory: int, n_ctx: int) -> Fit:
    """Whether a context of this size fits into a memory with this kind of cache."""
    n_ctx = padded_ctx(n_ctx)
    try:
        context = kind.context(fitting, n_ctx)
    except (OptionError, UnsupportedError) as error:
        return Fit(n_ctx, None, False, str(error))
    return Fit(n_ctx, context, context.taken.total <= memory)
