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
        Whether it has the op XKV_ATTN; else attention of an xkv cache is made of stock ops there.
    backend : str
        Of ggml: CPU, CUDA, Metal, RPC ...
    """

    name: str
    description: str
    free: int
    total: int
    kind: str
    fused: bool
    backend: str

    @property
    def attention(self) -> str:
        """How an xkv cache's attention is computed there, and why so where it is not by the op."""
        if self.fused and self.kind in ("cpu", "rpc"):
            return "one op"
        if self.fused:
            return "one op with fused=True; else stock ops, slower: the op has not been run on such a device"
        if self.kind == "rpc":
            why = "the server's library has no XKV_ATTN, or another version of it"
        elif self.backend in BACKENDS_WITH_OP:
            why = f"XKV_ATTN of the {self.backend} backend does not run on this device"
        else:
            why = f"ggml's {self.backend} backend has no XKV_ATTN"
        return f"stock ops, slower: {why}"


DEVICE_KINDS = ("cpu", "gpu", "igpu", "rpc", "other")
BACKENDS_WITH_OP = ("CPU", "CUDA", "MTL")
"""Of ggml, MTL is Metal: those for which there are kernels of XKV_ATTN."""


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
            backend=api.text(d.backend),
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
