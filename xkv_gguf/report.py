"""What a KV cache takes in memory, as an object, a table and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .base.text import format_bytes, format_table


@dataclass(frozen=True)
class KvPart:
    """One part of a cache: its name and the bytes that are allocated for it."""

    name: str
    bytes: int


@dataclass(frozen=True)
class KvDevice:
    """What is on one device.

    Attributes
    ----------
    name : str
        Of the device's memory.
    cache_bytes, compute_bytes : int
        Of the cache, with the cells through which a micro-batch passes, and of compute buffers.
    n_layer, n_fused : int
        Of an xkv cache: layers whose K and V are there, and those of them whose attention is one op. The others' is
        made of stock ops, which do the same more slowly.
    """

    name: str
    cache_bytes: int
    compute_bytes: int
    n_layer: int = 0
    n_fused: int = 0


@dataclass(frozen=True)
class KvReport:
    """The memory of one context's KV cache.

    Attributes
    ----------
    kv_mode : str
        xkv, f16, q8_0 or q4_0.
    n_ctx : int
        Tokens that the cache has room for.
    parts : tuple of KvPart
        Everything that is allocated; the sum is `total_bytes`.
    n_exact, n_stored : int
        Tokens that are held now, exact and compressed. A plain cache holds all of them exact.
    n_update, n_check : int
        Times that the bases of an xkv cache were renewed, and that it was found out whether they should be; 0 for
        other caches.
    renew_seconds : float
        That these checks and renewals took since the cache was last empty.
    scratch : tuple of KvPart
        What is allocated beside the cache and does not grow with it, or is given back: the cells through which a
        micro-batch passes, compute buffers, and the most that a flush or a renewal of bases has taken so far.
    devices : tuple of KvDevice
        The same cache and compute buffers by where they are.
    n_ubatch : int
        Tokens of a micro-batch.
    notes : tuple of str
        What is less than usual, or slower.
    """

    kv_mode: str
    n_ctx: int
    parts: tuple[KvPart, ...]
    n_exact: int = 0
    n_stored: int = 0
    n_update: int = 0
    n_check: int = 0
    renew_seconds: float = 0.0
    scratch: tuple[KvPart, ...] = ()
    devices: tuple[KvDevice, ...] = ()
    n_ubatch: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes allocated for the cache."""
        return sum(part.bytes for part in self.parts)

    @property
    def scratch_bytes(self) -> int:
        """Bytes allocated beside the cache; of flushes and renewals, the most so far."""
        return sum(part.bytes for part in self.scratch)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: kv_mode, n_ctx, total_bytes, parts, scratch_bytes, scratch (name to bytes), n_exact ..."""
        return {
            "kv_mode": self.kv_mode,
            "n_ctx": self.n_ctx,
            "total_bytes": self.total_bytes,
            "parts": {part.name: part.bytes for part in self.parts},
            "scratch_bytes": self.scratch_bytes,
            "scratch": {part.name: part.bytes for part in self.scratch},
            "n_exact": self.n_exact,
            "n_stored": self.n_stored,
            "n_update": self.n_update,
            "n_check": self.n_check,
            "renew_seconds": self.renew_seconds,
            "devices": {device.name: _device_dict(device) for device in self.devices},
            "n_ubatch": self.n_ubatch,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        head = f"KV cache {self.kv_mode}, n_ctx {self.n_ctx}: {self.n_exact} tokens exact, {self.n_stored} compressed"
        if self.kv_mode == "xkv":
            head += f"; bases renewed {self.n_update} times in {self.n_check} checks ({self.renew_seconds:.1f} s)"
        rows = [[part.name, format_bytes(part.bytes)] for part in self.parts]
        rows.append(["total", format_bytes(self.total_bytes)])
        rows += [[f"scratch: {part.name}", format_bytes(part.bytes)] for part in self.scratch]
        lines = ["  " + line for line in format_table(rows, "<>")]
        more = [*self._device_lines(), *(f"note: {note}" for note in self.notes)]
        return "\n".join([head, *lines, *(f"  {line}" for line in more)])

    def _device_lines(self) -> list[str]:
        """Where the cache is, when it is not all in one place, and which layers lack the fused op."""
        shown = [device for device in self.devices if device.cache_bytes]
        slow = any(device.n_fused < device.n_layer for device in shown)
        if not slow and [device.name for device in shown] in ([], ["CPU"]):
            return []
        found = []
        for device in shown:
            line = f"on {device.name}: {format_bytes(device.cache_bytes)}"
            if device.n_layer:
                how = "fused op" if device.n_fused == device.n_layer else "stock ops"
                line += f", {device.n_layer} layers, attention by {how}"
            found.append(line)
        return found


def stock_op_notes(devices: Sequence[KvDevice]) -> list[str]:
    """A line for each device where attention of layers is made of stock ops."""
    return [
        f"attention of {device.n_layer - device.n_fused} of {device.n_layer} layers on {device.name} is made of stock "
        "ops, which are slower: see `xkv-gguf doctor`"
        for device in devices
        if device.n_fused < device.n_layer
    ]


def _device_dict(device: KvDevice) -> dict[str, int]:
    return {name: value for name, value in asdict(device).items() if name != "name"}
