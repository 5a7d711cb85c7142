"""What is said of a device: whether attention of an xkv cache is one op there, and why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xkv_gguf.cli import main
from xkv_gguf.runtime.devices import Device, devices

CARD = Device("CUDA0", "a card", 1, 2, "gpu", True, "CUDA")


@pytest.mark.parametrize(
    ("device", "begins", "why"),
    [
        (replace(CARD, kind="cpu", backend="CPU"), "one op", ""),
        (replace(CARD, kind="rpc", backend="RPC"), "one op", ""),
        (CARD, "one op with fused=True", "has not been run on such a device"),
        (replace(CARD, fused=False), "stock ops", "does not run on this device"),
        (replace(CARD, fused=False, backend="Vulkan"), "stock ops", "Vulkan backend has no XKV_ATTN"),
        (replace(CARD, fused=False, kind="rpc", backend="RPC"), "stock ops", "the server's library"),
    ],
)
def test_attention(device: Device, begins: str, why: str) -> None:
    assert device.attention.startswith(begins) and why in device.attention
    assert why or device.attention == begins


def test_this_machine_has_the_cpus_op() -> None:
    [cpu] = [device for device in devices() if device.kind == "cpu"]
    assert cpu.backend == "CPU" and cpu.attention == "one op"


def test_doctor_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here = [*devices(), replace(CARD, fused=False, backend="Vulkan")]
    monkeypatch.setattr("xkv_gguf.cli.doctor.devices", lambda: here)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("CPU ") and "one op" in line for line in lines)
    assert any(line.startswith("CUDA0 ") and "ggml's Vulkan backend has no XKV_ATTN" in line for line in lines)
