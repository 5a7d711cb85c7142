"""`llama_cpp.Llama` with a choice of KV cache."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from . import opening, placing
from .completion import Completions
from .errors import (
    AdapterError,
    ClosedError,
    ModelError,
    OptionError,
    OutOfMemoryError,
    UnsupportedError,
    XkvError,
    XkvWarning,
)
from .fitting import Fitting, check_memory
from .model.file import ModelFile, open_model
from .model.tested import TESTED
from .options import XkvOptions, check_kv_mode
from .plan.cache_plan import WINDOWS, CachePlan
from .plan.groups import FRAMES
from .plan.sizes import CacheLayout
from .report import KvDevice, KvPart, KvReport, stock_op_notes
from .runtime import arguments, devices, loader, log, native, rpc
from .runtime.api import internals, llama_cpp
from .runtime.context import CheckedContext
from .runtime.threads import default_decode_threads, default_threads
from .sidecar.read import Sidecar
from .states import Stateful

PARENT_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


class Llama(Completions, Stateful):
    """A GGUF model with its context, as in llama-cpp-python, on a KV cache of choice.

    Everything that `llama_cpp.Llama` offers works as it does there, unless an error says otherwise. Flash attention
    is on in every mode, since xkv and quantized caches need it and f16 is their measure; only f16 runs without it
    (``flash_attn=False``, and models whose heads it cannot take). Exceptions are of the classes that `llama_cpp.Llama`
    raises, too.

    Parameters
    ----------
    model_path : str or path
        GGUF file; of a split model, the first part.
    kv_mode : str
        xkv (cross-layer low-rank cache), f16, q8_0 or q4_0.
    xkv : XkvOptions or dict, optional
        Options of an xkv cache. The sidecar is found beside the model or in the cache folder, or made on first use.
    rpc_servers : str or sequence of str, optional
        Servers of other machines, ``"HOST:PORT,..."``, whose devices take layers as GPUs of this one do, and keep their
        part of the cache: see docs/devices.md. Their devices stay known to the process. ``n_gpu_layers`` is then -1
        (all) unless given. Borders between devices move to where they cut no group of layers.
    **kwargs
        As in `llama_cpp.Llama`; None stands for the default. ``n_ctx`` is 4096 unless given (at most the model's own),
        and is rounded up to a multiple of 256. What llama_cpp ignores (``f16_kv``, ``mul_mat_q`` ...) is ignored here,
        and ``type_k`` and ``type_v`` follow from `kv_mode`; one warning names what was asked for and is not done. Other
        unknown names are refused.
        ``n_ubatch`` of an xkv cache is chosen with its size unless given. ``n_threads_batch`` is the number of
        processors that the process may use, and ``n_threads`` half of it, unless given.

    Attributes
    ----------
    on_eval : callable or None
        Gets the tokens that are done and those in all after each batch of `eval`, for progress bars.
    xkv_plan : CachePlan or None
        How an xkv cache was laid out; None for the others.
    xkv_device_bytes : dict of int to int
        Of an xkv cache: predicted bytes on each device by its number, -1 for the host, with the cells through which a
        micro-batch passes.

    Raises
    ------
    OptionError
        An argument is unknown or has a value that cannot be used.
    ModelError
        The model is missing, is no GGUF model, or llama.cpp cannot load it.
    SidecarError
        The sidecar is missing, damaged, of another version, or of another model.
    UnsupportedError
        The model's architecture or a setting cannot be used with the cache.
    OutOfMemoryError
        The context does not fit into memory.
    DeviceError
        A server does not answer, or is of another version.

    Examples
    --------
    >>> from xkv_gguf import Llama
    >>> llm = Llama("model.gguf", n_ctx=8192, xkv={"ratio": 6})
    >>> print(llm.kv_report())
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_mode: str = "xkv",
        xkv: XkvOptions | Mapping[str, Any] | None = None,
        rpc_servers: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # close() needs it when a check below fails
        self._scope: native.ScopeParams | None = None
        self.xkv_device_bytes: dict[int, int] = {}
        self._n_ubatch_given = kwargs.get("n_ubatch") is not None
        loader.verify()
        self.kv_mode = check_kv_mode(kv_mode)
        if xkv is not None and kv_mode != "xkv":
            raise OptionError(f"xkv: options are given, but kv_mode is {kv_mode}")
        self.xkv_options = XkvOptions.of(xkv)
        arguments.check_names(kwargs, PARENT_ARGUMENTS)
        kwargs = arguments.adapt(kwargs, kv_mode)
        arguments.check_values(kwargs)
        arguments.check_mode(kv_mode, kwargs)
        model = open_model(model_path)
        settings = self._settings(kwargs, model)
        rpc_fused = self._connect(rpc_servers, settings)
        self.xkv_plan = self._prepare(model, settings, rpc_fused)
        with contextlib.ExitStack() as around:
            native.clear_last_error()
            if self._scope is not None:
                around.enter_context(native.scope(self._scope))
            errors = around.enter_context(log.collect(quiet=not settings["verbose"]))
            try:
                super().__init__(str(model.path), **settings)
                self._check_context()
                self._logits_all = bool(settings.get("logits_all"))  # a draft model makes the parent keep them all
            except Exception as error:
                better = self._explain(error, model, errors)
                self.close()
                if better is error:
                    raise
                raise better from error
        fallbacks = self._fallbacks() if kv_mode == "xkv" else []
        if fallbacks:
            warnings.warn(f"this xkv cache: {'; '.join(fallbacks)}", XkvWarning, stacklevel=2)

    def _settings(self, kwargs: Mapping[str, Any], model: ModelFile) -> dict[str, Any]:
        """Arguments of the parent, with this class's defaults."""
        n_ctx = arguments.resolve_ctx(kwargs.get("n_ctx"), model)
        arguments.warn_beyond_training(n_ctx, kwargs, model)
        settings = {"verbose": True, **kwargs}
        settings["flash_attn"] = arguments.takes_flash(model.architecture, self.kv_mode, kwargs.get("flash_attn"))
        settings["n_ctx"] = n_ctx
        # the parent counts processors that this process may not use
        settings["n_threads"] = kwargs.get("n_threads") or default_decode_threads()
        settings["n_threads_batch"] = kwargs.get("n_threads_batch") or default_threads()
        # the parent allocates logits for n_batch as it is given
        settings["n_batch"] = min(kwargs.get("n_batch", 512), n_ctx)
        if self._n_ubatch_given:
            settings["n_ubatch"] = min(kwargs["n_ubatch"], settings["n_batch"])
        if self.kv_mode != "xkv":
            settings["type_k"] = settings["type_v"] = native.GGML_TYPES[self.kv_mode]
        elif settings.get("swa_full") is None:
            settings["swa_full"] = False  # windowed layers keep their window, as in llama.cpp's own programs
        return settings

    def _connect(self, rpc_servers: str | Sequence[str] | None, settings: dict[str, Any]) -> bool:
        """Make servers known, and their devices the layers' unless settings say otherwise; whether they have our op."""
        if rpc_servers is None:
            return False
        settings.setdefault("n_gpu_layers", -1)
        return rpc.connect(rpc.parse_servers(rpc_servers))

    def _prepare(self, model: ModelFile, settings: dict[str, Any], rpc_fused: bool) -> CachePlan | None:
        """Plan the cache, and check sizes before anything large is allocated; settings get what the plan chose."""
        n_ctx = settings["n_ctx"]
        on_cpu = settings.get("n_gpu_layers", 0) == 0
        if self.kv_mode != "xkv":
            if on_cpu:
                check_memory(model, settings, self.kv_mode)
            return None
        if model.architecture not in TESTED:
            arguments.warn_untested(model.architecture)
        options = self.xkv_options
        least = CacheLayout(n_ctx, options.n_sink, options.n_window or WINDOWS[-1], frame=options.frame or FRAMES[0])
        arguments.check_ctx_for_xkv(least)  # before a sidecar is made

        def planned(sidecar: Sidecar | None) -> opening.Planned:
            options = self.xkv_options
            if options.memory is not None:
                with Fitting(model, settings, rpc_fused) as fitting:
                    options = fitting.within_memory(options, sidecar, n_ctx)
            n_ubatch, n_batch = settings.get("n_ubatch"), settings["n_batch"]
            found = opening.scope_params(
                sidecar, options, n_ctx, n_ubatch, model, n_batch, on_devices=placing.on_devices(settings, rpc_fused)
            )
            arguments.check_ctx_for_xkv(found.plan.layout)
            if on_cpu:
                check_memory(model, settings, "xkv", found)
            return found

        if not opening.has_sidecar(model, options):
            planned(None)  # what is out of reach is so with any spectra: it is refused before minutes of calibration
        sidecar = opening.open_sidecar(model.path, options, settings["n_threads_batch"])
        self.sidecar_digest = sidecar.digest if sidecar is not None else None
        found = planned(sidecar)
        plan, self._scope, self.xkv_device_bytes = found.plan, found.params, found.device_bytes
        placing.apply(found, settings)
        settings["n_ubatch"] = plan.layout.n_ubatch
        settings["type_k"] = settings["type_v"] = native.GGML_TYPES[plan.layout.type_window]
        return plan

    def _check_context(self) -> None:
        """Check what the parent made, and let failures of the context speak."""
        if self.kv_mode == "xkv" and not native.is_xkv(self._ctx.ctx):
            raise UnsupportedError(f"architecture {self._architecture()} did not take an xkv cache; use kv_mode='f16'")
        native.attach(self._ctx.ctx)
        if self.lora_path and not self._lora_adapter:
            raise AdapterError(f"lora_path {self.lora_path}: llama.cpp cannot load it")
        CheckedContext.take(self._ctx)

    def _architecture(self) -> str:
        return str(getattr(self, "metadata", {}).get("general.architecture", "of this model"))

    def _explain(self, error: Exception, model: ModelFile, errors: Sequence[str]) -> Exception:
        """The typed error behind a failure of the parent's constructor."""
        if isinstance(error, XkvError):
            return error
        why = log.reason(errors)
        if isinstance(error, MemoryError) or "alloc" in why:
            return OutOfMemoryError(f"the context does not fit into memory ({why or error}); lower n_ctx")
        loaded = getattr(self, "_model", None)
        if loaded is None:
            if "Failed to load model" not in str(error):
                return error
            kind = UnsupportedError if "unknown model architecture" in why else ModelError
            return kind(f"model {model.path}: llama.cpp cannot load it: {why or 'no reason given'}")
        if "llama_context" not in str(error):
            return error
        if self.kv_mode == "xkv":
            try:
                native.check_model(loaded.model)
            except XkvError as unsupported:
                return unsupported
            why = native.last_error() or why
        return UnsupportedError(why or f"llama.cpp cannot make a context with kv_mode {self.kv_mode}")

    def kv_report(self) -> KvReport:
        """Bytes allocated for the KV cache, part by part, and the tokens in it; for every kv_mode."""
        parts = tuple(KvPart(name, size) for name, size in native.report(self._ctx.ctx))
        scratch = tuple(KvPart(name, size) for name, size in native.scratch(self._ctx.ctx))
        found, n_ubatch = self._devices(), int(self.context_params.n_ubatch)
        if self.kv_mode != "xkv":
            return KvReport(
                self.kv_mode, self.n_ctx(), parts, self.n_tokens, scratch=scratch, devices=found, n_ubatch=n_ubatch
            )
        n_exact, n_stored = native.seq_tokens(self._ctx.ctx, 0)
        online = native.online_info(self._ctx.ctx, 0)
        counts = (n_exact, n_stored, online.n_update, online.n_check, online.seconds)
        planned = self.xkv_plan.notes if self.xkv_plan else ()
        notes = (*(note.text for note in planned), *stock_op_notes(found))
        return KvReport("xkv", self.n_ctx(), parts, *counts, scratch, found, n_ubatch, notes)

    def _devices(self) -> tuple[KvDevice, ...]:
        return tuple(
            KvDevice(part.name, part.cache, part.compute, part.n_layer, part.n_fused)
            for part in devices.context_devices(self._ctx.ctx)
            if part.cache + part.compute
        )

    def _fallbacks(self) -> list[str]:
        """What costs quality or speed, and was not asked for."""
        planned = self.xkv_plan.notes if self.xkv_plan else ()
        slow = stock_op_notes(self._devices()) if self.xkv_options.fused is not False else []
        return [*(note.text for note in planned if note.costs), *slow]

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Embed texts, as in `llama_cpp.Llama.embed`; not on an xkv cache.

        Raises
        ------
        OptionError
            There is no text, or an empty one.
        UnsupportedError
            This is not an object for embeddings.
        """
        if self.kv_mode == "xkv" or not self.context_params.embeddings:
            raise UnsupportedError(
                f"embed: this Llama (kv_mode {self.kv_mode}) is for text; make one with kv_mode='f16', embedding=True"
            )
        texts = [input] if isinstance(input, str) else input
        if not texts or not all(self.tokenize(text.encode()) for text in texts):
            raise OptionError("input: no text or an empty one, expected at least one token each")
        return super().embed(input, *args, **kwargs)

    def close(self) -> None:
        """Free the model and its context; whatever is done with the object then raises ClosedError."""
        super().close()
        if type(self) is Llama:
            self.__class__ = _ClosedLlama

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        del state["type_k"], state["type_v"]
        if self.kv_mode == "xkv" and not self._n_ubatch_given:
            del state["n_ubatch"]  # the copy's plan chooses it again
        options = self.xkv_options if self.kv_mode == "xkv" else None
        return {**state, "kv_mode": self.kv_mode, "xkv": options}


_CLOSED = ("close", "_stack", "_ctx", "_model", "kv_mode", "model_path", "xkv_options", "xkv_plan", "xkv_device_bytes")
"""What is there without the library."""


class _ClosedLlama(Llama):
    """What a `Llama` becomes when it is closed: llama_cpp would go on with memory that is gone."""

    def __getattribute__(self, name: str) -> Any:
        if name in _CLOSED or name.startswith("__"):
            return super().__getattribute__(name)
        raise ClosedError(f"{name}: this Llama was closed; make another one")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a prompt."""
        raise ClosedError("a prompt: this Llama was closed; make another one")

    def close(self) -> None:
        """It is closed already."""


# CheckedContext takes the place of an object of this class, see Llama._check_context
assert issubclass(CheckedContext, internals.LlamaContext)
