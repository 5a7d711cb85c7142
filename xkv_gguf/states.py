"""Saved states of a `Llama`: as objects, for caches of prompts, and as files that name their origin: docs/states.md."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .base.files import replacing
from .errors import StateError
from .model.fingerprint import model_fingerprint
from .plan.cache_plan import CachePlan
from .runtime import log, native
from .runtime.api import llama_cpp, llama_cpp_module

MAGIC = b"xkv-gguf state\n\0"
VERSION = 1
_HEAD = struct.Struct("<16sII32s")  # magic, version, bytes of the JSON header, SHA-256 of all that follows


@dataclass(frozen=True)
class Origin:
    """What a state was saved with.

    Attributes
    ----------
    model : str
        Fingerprint, see `model_fingerprint`.
    sidecar : str or None
        Digest; None without calibration, and for a plain cache.
    kv_mode : str
    plan : str
        For people: a state moves to other plans of the same sidecar.
    """

    model: str
    sidecar: str | None
    kv_mode: str
    plan: str

    def check(self, other: Origin, what: str) -> None:
        """Refuse a state of `other` for a `Llama` of this origin.

        Raises
        ------
        StateError
            Model, kv_mode or sidecar are not the same.
        """
        if other.model != self.model:
            raise StateError(f"{what}: saved with model {other.model[:16]}, this one is {self.model[:16]}")
        if other.kv_mode != self.kv_mode:
            raise StateError(f"{what}: saved with kv_mode {other.kv_mode}, expected {self.kv_mode}; open the model so")
        if other.sidecar != self.sidecar:
            names = [digest[:16] if digest else "none" for digest in (other.sidecar, self.sidecar)]
            raise StateError(f"{what}: saved with sidecar {names[0]} ({other.plan}), this one is {names[1]}")


def plan_text(plan: CachePlan | None, kv_mode: str, n_ctx: int) -> str:
    """One line about a cache's plan."""
    return f"{kv_mode}, n_ctx {n_ctx}" if plan is None else f"{kv_mode} {plan.ratio:.2f}x, n_ctx {n_ctx}"


class State(llama_cpp_module.LlamaState):
    """A `LlamaState` that knows its origin; smaller than the parent's, which holds logits that nobody reads again."""

    origin: Origin


@dataclass(frozen=True)
class SavedFile:
    """A file's state, and what else the writer put there."""

    state: State
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_state(path: Path, state: State, extra: Mapping[str, Any] | None = None) -> None:
    """Write a state file, which appears when it is complete.

    Parameters
    ----------
    path : Path
    state : State
    extra : mapping, optional
        JSON values that come back with the state.

    Raises
    ------
    StateError
        It cannot be written.
    """
    tokens = np.ascontiguousarray(state.input_ids[: state.n_tokens], dtype="<i4").tobytes()
    header = {
        **asdict(state.origin),
        "n_tokens": int(state.n_tokens),
        "seed": int(state.seed),
        "n_bytes": len(state.llama_state),
        "extra": dict(extra or {}),
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    digest = hashlib.sha256()
    for part in (text, tokens, state.llama_state):
        digest.update(part)
    try:
        with replacing(path) as temp, temp.open("wb") as file:
            file.write(_HEAD.pack(MAGIC, VERSION, len(text), digest.digest()))
            for part in (text, tokens, state.llama_state):
                file.write(part)
    except OSError as error:
        raise StateError(f"state {path}: cannot be written ({error.strerror})") from error


def read_state(path: Path) -> SavedFile:
    """Read a state file.

    Raises
    ------
    StateError
        It cannot be read, is no state, of a newer version, truncated or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"state {path}: cannot be read ({error.strerror})") from error
    if len(data) < _HEAD.size or not data.startswith(MAGIC):
        raise StateError(f"state {path}: is no saved state of xkv-gguf; name a file that it wrote")
    _, version, n_text, expected = _HEAD.unpack_from(data)
    if version != VERSION:
        fix = "upgrade xkv-gguf" if version > VERSION else "remove it and read the prompt again"
        raise StateError(f"state {path}: version {version}, expected {VERSION}; {fix}")
    body = memoryview(data)[_HEAD.size :]
    if hashlib.sha256(body).digest() != expected:
        raise StateError(
            f"state {path}: is damaged or cut short ({len(data)} bytes, whose checksum is another); remove it"
        )
    try:
        return _parse(body, n_text)
    except (ValueError, KeyError, TypeError) as error:  # the head itself has no checksum
        raise StateError(
            f"state {path}: is damaged or cut short (its header is no header of a state); remove it"
        ) from error


def _parse(body: memoryview, n_text: int) -> SavedFile:
    header = json.loads(bytes(body[:n_text]))
    n_tokens = int(header["n_tokens"])
    at = n_text + 4 * n_tokens
    state = State(
        input_ids=np.frombuffer(body[n_text:at], dtype="<i4").astype(np.intc),
        scores=np.empty((0, 0), np.single),
        n_tokens=n_tokens,
        llama_state=bytes(body[at:]),
        llama_state_size=int(header["n_bytes"]),
        seed=int(header["seed"]),
    )
    state.origin = Origin(**{name: header[name] for name in Origin.__dataclass_fields__})
    return SavedFile(state, header["extra"])


class Stateful(llama_cpp.Llama):
    """The part of `Llama` that saves and loads states."""

    kv_mode: str
    xkv_plan: CachePlan | None
    sidecar_digest: str | None = None
    _fingerprint: str | None = None

    @property
    def origin(self) -> Origin:
        """What states of this object are of."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.model_path)
        plan = plan_text(self.xkv_plan, self.kv_mode, self.n_ctx())
        return Origin(self._fingerprint, self.sidecar_digest, self.kv_mode, plan)

    def save_state(self) -> State:
        """All that the context holds, as `load_state` takes it.

        Raises
        ------
        StateError
            The cache cannot be saved, for instance since an operation on it failed.
        """
        native.clear_last_error()
        with log.collect(quiet=not self.verbose) as errors:
            size = int(llama_cpp.llama_state_get_size(self._ctx.ctx))
            data = (ctypes.c_uint8 * size)()
            done = int(llama_cpp.llama_state_get_data(self._ctx.ctx, data, size))
        if not 0 < done <= size:
            raise StateError(
                f"a state cannot be saved: {native.last_error() or log.reason(errors) or 'no reason given'}"
            )
        n = self.n_tokens
        state = State(
            input_ids=self.input_ids[:n].copy(),
            # without logits_all they are those of no token
            scores=self.scores[: n if self._logits_all else 0].copy(),
            n_tokens=n,
            llama_state=bytes(memoryview(data)[:done]),
            llama_state_size=done,
            seed=self._seed,
        )
        state.origin = self.origin
        return state

    def load_state(self, state: Any, what: str = "a saved state") -> None:
        """Put a saved state back, into an object of the same model and sidecar whose n_ctx has room for it.

        A state of an xkv cache moves to another n_ctx, ratio or size: see docs/states.md.

        Raises
        ------
        StateError
            The state is damaged, of another cache, or does not fit; this object is as it was before, unless the text
            says otherwise.
        """
        size = int(state.llama_state_size)
        if size > len(state.llama_state):
            raise StateError(f"{what}: {len(state.llama_state)} bytes, expected {size}")
        if hasattr(state, "origin"):
            self.origin.check(state.origin, what)
        n = int(state.n_tokens)
        if n > self._n_ctx:
            raise StateError(f"{what}: {n} tokens, this context has room for {self._n_ctx}; raise n_ctx")
        data = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
        native.clear_last_error()
        with log.collect(quiet=not self.verbose) as errors:
            done = llama_cpp.llama_state_set_data(self._ctx.ctx, data, size)
        if done != size:
            why = native.last_error() or log.reason(errors) or f"llama.cpp took {done} of {size} bytes"
            # a plain cache loses its tokens by a state that it does not take
            last = int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._ctx.ctx), 0))
            self.n_tokens = min(self.n_tokens, last + 1)
            self._requires_eval = True
            raise StateError(f"{what}: {why}")
        # as the parent does, which would have changed them before a failure
        rows = min(n, len(self.scores), len(state.scores))
        self.scores[:] = 0.0
        if rows > 0:
            self.scores[:rows, :] = state.scores[:rows, :]
        self.input_ids[:n] = state.input_ids[:n]
        self.n_tokens = n
        self._requires_eval = True
        self._seed = state.seed

    def save_file(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> State:
        """Write the state to a file, which names model, sidecar and plan and appears when it is complete.

        Parameters
        ----------
        path : str or Path
        extra : mapping, optional
            JSON values to keep with it.

        Raises
        ------
        StateError
            It cannot be saved or written.
        """
        state = self.save_state()
        write_state(Path(path), state, extra)
        return state

    def load_file(self, path: str | Path) -> SavedFile:
        """Load the state of a file.

        Returns
        -------
        SavedFile
            The state, and what was kept with it.

        Raises
        ------
        StateError
            The file cannot be read, is damaged, of another model, sidecar or version, or does not fit; this object is
            as it was before, unless the text says otherwise.
        """
        saved = read_state(Path(path))
        self.load_state(saved.state, f"state {path}")
        return saved
