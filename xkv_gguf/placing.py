"""Layers on devices: what the arguments of `Llama` ask for, and what a plan makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from .base.text import format_bytes
from .errors import OutOfMemoryError, XkvWarning
from .opening import OnDevices, Planned
from .plan.placement import HOST, Placement, place_layers
from .plan.work import device_lead
from .runtime.devices import Device, devices

SPLIT_NONE = 0  # LLAMA_SPLIT_MODE_NONE


def layer_devices(settings: dict[str, Any]) -> list[Device]:
    """The devices that take layers, in llama.cpp's order: those of servers, then GPUs, or the GPU of the host's memory.

    (llama_prepare_model_devices in llama.cpp.)
    """
    known = devices()
    found = [device for device in known if device.kind == "rpc"]
    own = [device for device in known if device.kind == "gpu"]
    found += own or [device for device in known if device.kind == "igpu"]
    main = settings.get("main_gpu", 0)
    if settings.get("split_mode") == SPLIT_NONE:
        return found[main : main + 1]
    return found


def on_devices(settings: dict[str, Any], rpc_fused: bool) -> OnDevices:
    """What the arguments of `Llama` say of devices."""
    n_gpu_layers = settings.get("n_gpu_layers", 0)
    if n_gpu_layers == 0 or not settings.get("offload_kqv", True):
        return OnDevices()
    there = layer_devices(settings)
    split = settings.get("tensor_split")
    shares: Sequence[float] = [device.free for device in there]
    if split is not None and any(split):
        shares = (*split, *(0.0 for _ in there))[: len(there)]
    leads = tuple(device_lead(device.name) for device in there)
    return OnDevices(n_gpu_layers, tuple(map(float, shares)), rpc_fused, leads)


def apply(planned: Planned, settings: dict[str, Any]) -> None:
    """Set the arguments that divide layers as planned; says so where that is not as asked.

    Raises
    ------
    OutOfMemoryError
        A device's part of the cache is larger than its free memory.
    """
    asked = on_devices(settings, False)
    if not asked.shares:
        return
    placement = planned.placement
    there = layer_devices(settings)
    for index, n_bytes in planned.device_bytes.items():
        if index != HOST and there[index].free and n_bytes > there[index].free:
            raise OutOfMemoryError(
                f"device {there[index].name}: its part of the cache takes {format_bytes(n_bytes)}, "
                f"{format_bytes(there[index].free)} are free; lower n_ctx or n_gpu_layers, or change tensor_split"
            )
    before = place_layers(placement.n_layer, asked.n_gpu_layers, asked.shares)
    given = settings.get("tensor_split") is not None or 0 < asked.n_gpu_layers <= placement.n_layer
    if given and placement.layers != before.layers:
        warnings.warn(
            f"layers that share coefficients stay together: devices begin at layers {_list(placement.borders)} "
            f"instead of {_list(before.borders)}",
            XkvWarning,
            stacklevel=4,
        )
    divide(placement, settings)


def divide(placement: Placement, settings: dict[str, Any]) -> None:
    """Set the arguments that divide layers so."""
    settings["n_gpu_layers"] = placement.n_gpu_layers
    if len(placement.counts) > 1:
        settings["tensor_split"] = list(map(float, placement.counts))


def _list(borders: Sequence[int]) -> str:
    return ", ".join(map(str, borders)) or "none"
