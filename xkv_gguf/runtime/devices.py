"""The devices that ggml knows, and what a context has on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import native, rpc
from .api import llama_cpp


@dataclass(frozen=True)
class Device:
    """A device that ggml knows.

    Attributes
    ----------
    name, description : str
    free, total : int
        Bytes of its memory.
    kind : str
        cpu, gpu, igpu (a GPU with the host's memory), rpc (of a server) or other.
    fused : bool
        Whether attention of an xkv cache is one op there, or made of stock ops.
    """

    name: str
    description: str
    free: int
    total: int
    kind: str
    fused: bool


DEVICE_KINDS = ("cpu", "gpu", "igpu", "rpc", "other")


def devices() -> list[Device]:
    """All devices, in ggml's order."""
    api = native.native()
    count = api.ffi.new("uint32_t *", 0)
    native.check_status(api.lib.xkv_devices(api.ffi.NULL, count))
    found = api.ffi.new("struct xkv_device[]", count[0])
    native.check_status(api.lib.xkv_devices(found, count))
    return [
        Device(
            name=api.text(d.name),
            description=api.text(d.description),
            free=int(d.free),
            total=int(d.total),
            kind=DEVICE_KINDS[d.kind],
            fused=_is_fused(api, d),
        )
        for d in found
    ]


def _is_fused(api: native.Native, device: Any) -> bool:
    if DEVICE_KINDS[device.kind] == "rpc":
        return rpc.is_fused(api.text(device.description))
    return bool(device.fused)


def cpu_features() -> str:
    """What ggml uses of this machine's CPU, such as ``AVX2 FMA``."""
    text = str(llama_cpp.llama_print_system_info().decode()).rpartition(":")[2]
    pairs = (part.partition("=") for part in text.split("|"))
    return " ".join(name.strip() for name, _, on in pairs if on.strip() == "1")


@dataclass(frozen=True)
class DevicePart:
    """What a context has on one device.

    Attributes
    ----------
    name : str
        Of the device's memory.
    weights, cache, compute : int
        Bytes of the model's tensors, of the KV cache, with the cells through which a micro-batch passes, and of compute
        buffers.
    n_layer, n_fused : int
        Of an xkv cache: layers whose K and V are there, and those of them whose attention is the op XKV_ATTN.
    """

    name: str
    weights: int
    cache: int
    compute: int
    n_layer: int
    n_fused: int


def context_devices(context: int) -> list[DevicePart]:
    """What a context with any KV cache, and its model, have on each device, by the device's name."""
    api = native.native()
    ctx = api.context(context)
    count = api.ffi.new("uint32_t *", 0)
    native.check_status(api.lib.xkv_context_devices(ctx, api.ffi.NULL, count))
    parts = api.ffi.new("struct xkv_device_part[]", count[0])
    native.check_status(api.lib.xkv_context_devices(ctx, parts, count))
    return [
        DevicePart(api.text(p.name), int(p.weights), int(p.cache), int(p.compute), int(p.n_layer), int(p.n_fused))
        for p in parts
    ]


def context_splits(context: int) -> int:
    """Parts into which a context's last graph was cut between its devices."""
    api = native.native()
    n_split = api.ffi.new("uint32_t *")
    native.check_status(api.lib.xkv_context_splits(api.context(context), n_split))
    return int(n_split[0])
