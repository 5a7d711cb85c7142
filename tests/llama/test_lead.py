"""The lead of a layer is its device's; nothing of it needs the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import weights, write_tiny
from xkv_gguf import placing
from xkv_gguf.model.file import ModelFile, open_model
from xkv_gguf.opening import ON_HOST, OnDevices, scope_params
from xkv_gguf.options import XkvOptions
from xkv_gguf.plan.work import device_lead
from xkv_gguf.runtime.devices import Device


@pytest.mark.parametrize(
    ("name", "lead"), [("MTL0", 64), ("MTL1", 64), ("CPU", 128), ("CUDA0", 128), ("RPC0", 128), ("BLAS", 128)]
)
def test_metal_devices_have_a_shorter_one(name: str, lead: int) -> None:
    assert device_lead(name) == lead


def test_devices_tell_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        Device("RPC0", "a server", 1 << 30, 1 << 30, "rpc", True, "RPC"),
        Device("MTL0", "M2", 1 << 30, 1 << 30, "gpu", True, "Metal"),
    ]
    monkeypatch.setattr(placing, "devices", lambda: there)
    assert placing.on_devices({"n_gpu_layers": -1}, False).leads == (128, 64)
    assert placing.on_devices({"n_gpu_layers": 0}, False).leads == ()


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    write_tiny(tmp_path / "tiny.gguf", weights(1))
    return open_model(tmp_path / "tiny.gguf")


def leads(model: ModelFile, on_devices: OnDevices, lead: int | None = None) -> tuple[int, tuple[int, ...]]:
    options = XkvOptions(calibrate=False, ratio=2, group_size=1, lead=lead)
    found = scope_params(None, options, 2048, None, model, on_devices=on_devices)
    return found.params.n_lead, found.params.leads


def test_layers_have_that_of_their_device(model: ModelFile) -> None:
    # the output and two of three layers are on the device
    metal, cuda = (OnDevices(3, (1.0,), False, (lead,)) for lead in (64, 128))
    assert leads(model, ON_HOST) == (128, ())
    assert leads(model, metal) == (128, (128, 64, 64))
    assert leads(model, cuda) == (128, ())


def test_one_that_is_asked_for_is_that_of_all(model: ModelFile) -> None:
    assert leads(model, OnDevices(3, (1.0,), False, (64,)), lead=96) == (96, ())
