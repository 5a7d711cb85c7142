"""A model with latents from its file to a conversation: K alone is captured, solved, weighed and planned."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native.tiny_models import N_LATENT, N_LAYER, N_ROT, write_model
from xkv_gguf import Llama
from xkv_gguf.convert import sensitivity
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.pipeline import convert
from xkv_gguf.convert.settings import Settings
from xkv_gguf.plan.groups import LayerGroups
from xkv_gguf.runtime.shape import model_shape
from xkv_gguf.sidecar.read import read_sidecar

TEXT = " ".join(f"{i * i} stones lie by the river, {i} of them are wet." for i in range(80))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "m.gguf"
    write_model("deepseek2", path, text=True)
    return path


@pytest.mark.parametrize("weigh", ["groups", "layers", "none"])
def test_conversion(weigh: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "COEF_RATIOS", (8.0,))  # single layers are too narrow for others
    settings = Settings(group_size=2, tokens=2048, weigh=weigh, n_score=32, threads=1)
    convert(model, tmp_path / "s", settings, show_progress=False)
    found = read_sidecar(tmp_path / "s")
    found.check_model(model)
    info = found.info
    assert (info.embd_k, info.embd_v) == ((N_LATENT + N_ROT,) * N_LAYER, (0,) * N_LAYER)
    assert [info.kinds(g) for g in range(2)] == [("k",), ("k",)]
    assert set(info.scale_v) == {1.0}
    assert (len(set(info.scale_k)) > 1) == (weigh == "layers")
    assert (info.kld_scale > 0) == (weigh != "none")
    basis = found.basis(0, "k").astype(np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=2e-3)


def test_energy_of_v_is_that_of_the_latent(model: Path) -> None:
    """By which attention sinks are known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2 * (N_LATENT + N_ROT))).astype(np.float32)

    class Bench:
        def get(self, seq: int, source: tuple[int, str]) -> np.ndarray:
            assert source == (0, "k")
            return x

    with Engine(model, 1) as engine:
        shape = model_shape(engine.model_pointer)
    groups = LayerGroups.of([(0, 1), (2, 3)], shape.embd_k, shape.embd_v)
    bench: Any = Bench()
    found = sensitivity._energies(bench, 0, groups, 0, shape)
    for layer, energy in enumerate(found):
        latent = x[:, layer * (N_LATENT + N_ROT) :][:, :N_LATENT].astype(np.float64)
        np.testing.assert_allclose(energy, (latent**2).sum(1))
    assert len(found) == 2


@pytest.mark.parametrize("calibrate", [True, False])
def test_a_cache_takes_what_was_predicted(calibrate: bool, model: Path, tmp_path: Path) -> None:
    """Through stages, and attention is made of stock ops on all layers."""
    options: dict[str, Any] = {"ratio": 4, "calibrate": calibrate}
    if calibrate:
        convert(model, tmp_path / "s", Settings(tokens=2048, weigh="none", threads=1), show_progress=False)
        options["sidecar"] = str(tmp_path / "s")
    with closing(Llama(model, n_ctx=1024, xkv=options, n_threads=1, verbose=False, seed=1)) as llm:
        assert llm.xkv_plan is not None and llm.xkv_plan.stages
        llm.create_completion(TEXT[:600], max_tokens=20, temperature=0)
        report = llm.kv_report()
    parts = {part.name: part.bytes for part in report.parts}
    assert parts.pop("V coefficients") == llm.xkv_plan.parts["V coefficients"] == 0
    for name, size in parts.items():
        assert size == pytest.approx(llm.xkv_plan.parts[name], rel=0.02), name
    assert report.n_stored > 300
    assert [(device.n_layer, device.n_fused) for device in report.devices] == [(N_LAYER, 0)]
    assert "stock ops" in str(report)
