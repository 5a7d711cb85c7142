from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xkv_gguf import Llama
from xkv_gguf.convert import calibrate, capture, pipeline, sensitivity
from xkv_gguf.convert import settings as settings_module
from xkv_gguf.convert.capture import Capture
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.pipeline import Converted, convert
from xkv_gguf.convert.settings import Settings
from xkv_gguf.errors import CalibrationError, ModelError, OptionError, SidecarError, SidecarMismatchError
from xkv_gguf.plan.segments import KINDS
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.sidecar.read import read_sidecar

from ..small_sidecar import Arrays
from ..tiny import EMBD_KV, N_LAYER, first_layer, weights, write_tiny


def run(model: Path, out: Path, **settings: Any) -> Converted:
    settings = {"group_size": 2, "tokens": 512, "threads": 1, **settings}
    return convert(model, out, Settings(**settings), show_progress=False)


def decode(engine: Engine, tokens: Sequence[int], seq: int = 0) -> None:
    for start in range(0, len(tokens), engine.n_batch):
        part = tokens[start : start + engine.n_batch]
        engine.decode(part, [seq] * len(part), list(range(start, start + len(part))), outputs=False)


@pytest.mark.parametrize(("frame", "n_sink"), [(32, 4), (64, 0), (128, 7)])
def test_capture_equals_the_first_layer_by_hand(
    tiny_model: Path, tiny_weights: Arrays, frame: int, n_sink: int
) -> None:
    tokens = [1, *np.random.default_rng(8).integers(3, 259, 700).tolist()]
    n = len(tokens)
    with Engine(tiny_model, 1) as engine:
        engine.open_context(1, n)
        dims: Any = {"k": [EMBD_KV, 2 * EMBD_KV], "v": [EMBD_KV, 2 * EMBD_KV]}
        with Capture(engine, [[0], [1, 2]], dims, frame, n_sink) as sums:
            decode(engine, tokens)
            sums.add(0)
            found = {kind: sums.read(0, kind) for kind in ("k", "v")}
            assert sums.read(1, "k").gram.shape == (2 * EMBD_KV, 2 * EMBD_KV)
    offsets = (np.arange(n) - n_sink) % frame
    k, v = (x[n_sink:] for x in first_layer(tiny_weights, tokens, offsets))
    for kind, x in (("k", k), ("v", v)):
        assert found[kind].n_tokens == n - n_sink
        scale = np.abs(x.T @ x).max()
        np.testing.assert_allclose(found[kind].gram, x.T @ x, atol=2e-3 * scale)
        np.testing.assert_allclose(found[kind].total, x.sum(0), atol=2e-3 * np.abs(x).sum(0).max())


def test_sums_add_up_over_sequences_and_calls(tiny_model: Path) -> None:
    one, two = ([1, *np.random.default_rng(s).integers(3, 259, 200).tolist()] for s in (1, 2))
    dims: Any = {"k": [3 * EMBD_KV], "v": [3 * EMBD_KV]}
    with Engine(tiny_model, 1) as engine:
        engine.open_context(2, 256)
        with Capture(engine, [range(3)], dims, 32, 4) as both, Capture(engine, [range(3)], dims, 32, 4) as single:
            decode(engine, one, 0)
            decode(engine, two, 1)
            both.add(0)
            both.add(1)
            single.add(1)
            engine.clear()
            decode(engine, one, 1)
            single.add(1)
            for kind in ("k", "v"):
                a, b = both.read(0, kind), single.read(0, kind)
                assert a.n_tokens == b.n_tokens == 2 * (201 - 4)
                np.testing.assert_allclose(a.gram, b.gram, rtol=1e-3, atol=1e-2)


def test_files_give_a_valid_sidecar(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path / "s", data=(text_file,), tokens=2000)
    found = read_sidecar(tmp_path / "s")
    found.check_model(tiny_model)
    assert found.info == done.info
    assert found.info.architecture == "llama"
    assert found.info.calibration.source == "files"
    assert found.info.calibration.tokens == 2000 - 4
    assert found.info.settings["data"] == ["text.txt"]
    assert [(g.layers, g.weight_k, g.weight_v) for g in found.info.groups] == [((0, 1), 1, 1), ((2,), 1, 1)]
    assert (found.info.target, found.info.n_ctx, found.info.kld_scale) == (SizeTarget("quality", "medium"), 2048, 0)
    for g, dim in ((0, 2 * EMBD_KV), (1, EMBD_KV)):
        basis = found.basis(g, "k").astype(np.float64)
        np.testing.assert_allclose(basis @ basis.T, np.eye(dim), atol=2e-3)


def test_the_packages_texts_give_a_valid_sidecar(tiny_model: Path, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path / "s", tokens=1024, seed=3)
    assert done.info.calibration.source == "package"
    assert done.info.calibration.seed == 3
    assert done.info.calibration.tokens == 1024 - 4
    read_sidecar(tmp_path / "s").check_model(tiny_model)


def test_the_model_writes_what_the_packages_texts_lack(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "package_texts", lambda: ["some text " * 30])
    done = run(tiny_model, tmp_path / "s", tokens=1024)
    # 421 tokens are read, 603 are written in 4 sequences of 150
    assert (done.info.calibration.source, done.info.calibration.n_ctx) == ("package", 421)
    assert done.info.calibration.tokens == 421 - 4 + 4 * (150 - 4)


@pytest.mark.parametrize("source", ["package", "written", "files"])
def test_same_settings_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source == "written":
        monkeypatch.setattr(calibrate, "package_texts", lambda: ["some text " * 26])
    data = (text_file,) if source == "files" else ()
    for name, threads in (("a", 1), ("b", 1), ("c", 2)):
        run(tiny_model, tmp_path / name, data=data, threads=threads)
    run(tiny_model, tmp_path / "d", data=data, seed=1)
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "abcd"]
    assert digests[0] == digests[1] == digests[2]
    assert digests[0] != digests[3]


def test_f32_bases(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "s", data=(text_file,), basis_type="f32")
    found = read_sidecar(tmp_path / "s")
    basis = found.basis(0, "k")
    assert basis.dtype == np.float32
    np.testing.assert_allclose(basis @ basis.T, np.eye(128), atol=1e-5)


def test_layers_are_scaled_by_what_they_cost(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means and variances are those of scaled numbers, and groups weigh what their layers do."""
    monkeypatch.setattr(sensitivity, "COEF_RATIOS", (4.0,))  # the model is too small for less
    found = {}
    for weigh in ("groups", "layers"):
        run(tiny_model, tmp_path / weigh, data=(text_file,), tokens=3000, basis_type="f32", weigh=weigh)
        found[weigh] = read_sidecar(tmp_path / weigh)
    plain, scaled = found["groups"], found["layers"]
    assert plain.info.scales("k") == plain.info.scales("v") == (1.0,) * N_LAYER
    for kind in KINDS:
        scales = np.array(scaled.info.scales(kind))
        assert np.prod(scales) == pytest.approx(1.0, rel=0.02) and scales.std() > 0.01
        for g, group in enumerate(plain.info.groups):
            by_number = np.repeat([scales[il] for il in group.layers], EMBD_KV)
            np.testing.assert_allclose(scaled.mean(g, kind), by_number * plain.mean(g, kind), rtol=1e-4, atol=1e-6)
            basis = np.asarray(plain.basis(g, kind), np.float64)
            cov = (basis.T * plain.spectrum(g, kind)) @ basis
            expected = np.trace(cov * np.outer(by_number, by_number))
            assert np.sum(scaled.spectrum(g, kind)) == pytest.approx(expected, rel=1e-3)
    run(tiny_model, tmp_path / "again", data=(text_file,), tokens=3000, basis_type="f32", weigh="layers", threads=2)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "layers").read_bytes()
    weights = [(g.weight_k, g.weight_v) for g in scaled.info.groups]
    assert np.mean(weights) == pytest.approx(1.0, rel=0.05) and np.std(weights) > 0.01


def test_nothing_is_weighed_where_nothing_should_be(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "measure", None)
    run(tiny_model, tmp_path / "s", data=(text_file,), tokens=3000, weigh="none")
    found = read_sidecar(tmp_path / "s").info
    assert [(g.weight_k, g.weight_v) for g in found.groups] == [(1, 1), (1, 1)]
    assert found.kld_scale == 0 and found.scale_k == found.scale_v == (1.0,) * N_LAYER
    assert found.settings["weigh"] == "none"


def test_layers_that_cannot_be_weighed(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path / "s", data=(text_file,), tokens=512, weigh="layers")
    assert "layers are not weighed (too little text" in done.notes[-1]
    assert done.info.scale_k == (1.0,) * N_LAYER


def test_the_size_target_is_recorded(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path / "s", data=(text_file,), target=SizeTarget.of("budget", "2MiB"), n_ctx=4096)
    assert (done.info.target, done.info.n_ctx) == (SizeTarget("budget", str(2 << 20)), 4096)


def test_group_size_by_itself(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Candidates come from one capture; the one that is taken has the bases of a conversion with its size."""
    done = run(tiny_model, tmp_path / "auto", data=(text_file,), group_size="auto")
    assert done.info.settings["group_size"] == "auto"
    assert done.info.group_size == 2
    run(tiny_model, tmp_path / "two", data=(text_file,), group_size=2)
    one, other = (read_sidecar(tmp_path / name) for name in ("auto", "two"))
    assert one.info.groups == other.info.groups
    np.testing.assert_array_equal(one.basis(1, "v"), other.basis(1, "v"))


def test_group_sizes_are_compared(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "AUTO_SIZES", (1, 2, 3))
    done = run(tiny_model, tmp_path / "s", data=(text_file,), group_size="auto")
    assert any(f"group size {done.info.group_size} is taken; predicted distortion" in note for note in done.notes)
    found = read_sidecar(tmp_path / "s")
    run(tiny_model, tmp_path / "t", data=(text_file,), group_size=done.info.group_size)
    expected = read_sidecar(tmp_path / "t")
    # three layers are captured as one group, which splits as the model itself does
    assert [g.layers for g in found.info.groups] == [g.layers for g in expected.info.groups]
    for g in range(len(found.info.groups)):
        np.testing.assert_allclose(found.spectrum(g, "k"), expected.spectrum(g, "k"), rtol=1e-5, atol=1e-6)


def test_few_tokens_are_noted(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path / "s", data=(text_file,), tokens=256, group_size=3)
    assert any("256 calibration tokens are few for groups of 192" in note for note in done.notes)


@pytest.mark.parametrize("source", ["package", "files"])
def test_ctrl_c_leaves_no_file(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    original = capture.Capture.add

    def interrupted(self: Capture, seq: int) -> None:
        original(self, seq)
        raise KeyboardInterrupt

    monkeypatch.setattr(capture.Capture, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, folder / "s", data=(text_file,) if source == "files" else ())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"group_size": 4}, "group size 4: 1 to 3"),
        ({"target": SizeTarget("ratio", "100")}, "ratio 100: out of reach at n_ctx 2048"),
        (
            {"target": SizeTarget("budget", "1000"), "group_size": "auto"},
            "budget 1000 bytes: out of reach at n_ctx 2048",
        ),
        ({"data": (Path("none.txt"),)}, r"calibration text none\.txt: no such file"),
    ],
)
def test_impossible_for_the_model(tiny_model: Path, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        run(tiny_model, tmp_path / "s", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"group_size": 0}, "group size 0: at least 1"),
        ({"n_ctx": 0}, "n_ctx 0: at least 1"),
        ({"frame": 48}, "frame 48: one of 32, 64, 128, 256"),
        ({"tokens": 10}, "calibration tokens 10: at least 256"),
        ({"seed": -1}, "seed -1"),
        ({"threads": 0}, "threads 0"),
        ({"basis_type": "q8_0"}, "basis type 'q8_0'"),
        ({"n_sink": 1000}, "sinks 1000"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match) as err:
        Settings(**settings)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("source", ["package", "files"])
@pytest.mark.parametrize(("layer", "kind"), [(0, "k"), (1, "v"), (2, "k")])
def test_model_that_computes_nan(tmp_path: Path, text_file: Path, source: str, layer: int, kind: str) -> None:
    tensors = weights(0)
    tensors[f"blk.{layer}.attn_{kind}"][0, 0] = np.nan
    write_tiny(tmp_path / "nan.gguf", tensors)
    match = f"^{kind.upper()} of layer {layer}: .* not finite" if source == "files" else "not finite"
    with pytest.raises(CalibrationError, match=match):
        run(tmp_path / "nan.gguf", tmp_path / "s", data=(text_file,) if source == "files" else ())
    assert not (tmp_path / "s").exists()


def test_damaged_models(tiny_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model.read_bytes()[:50000])
    with pytest.raises(ModelError, match="ends inside the tensor"):
        run(cut, tmp_path / "s")
    tensors = weights(0)
    del tensors["blk.1.ffn_up"]
    write_tiny(tmp_path / "gap.gguf", tensors)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load it .*ffn_up"):
        run(tmp_path / "gap.gguf", tmp_path / "s")


# ---- first use


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in a folder of its own, an empty cache folder, and quick settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(pipeline, "Settings", lambda **kw: Settings(**{"tokens": 512, "threads": 1, **kw}))
    model = tmp_path / "models" / "tiny.gguf"
    model.parent.mkdir()
    model.write_bytes(tiny_model.read_bytes())
    return model


def test_made_once_in_the_cache_folder(own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pipeline.ensure_sidecar(own_model, show_progress=False)
    assert made.parent == tmp_path / "cache" / "xkv-gguf"
    assert "tiny.gguf has no sidecar yet; calibrating once" in capsys.readouterr().err
    before = made.stat().st_mtime_ns
    renamed = own_model.rename(own_model.with_name("other.gguf"))
    assert pipeline.ensure_sidecar(renamed) == made
    assert made.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


def test_one_beside_the_model_goes_first(own_model: Path) -> None:
    made = pipeline.ensure_sidecar(own_model, show_progress=False)
    beside = own_model.with_name("tiny.xkv.gguf")
    beside.write_bytes(made.read_bytes())
    assert pipeline.ensure_sidecar(own_model) == beside
    assert pipeline.ensure_sidecar(own_model, made) == made


def test_one_beside_what_a_link_names(own_model: Path, tmp_path: Path) -> None:
    made = pipeline.ensure_sidecar(own_model, show_progress=False)
    beside = made.rename(own_model.with_name("tiny.xkv.gguf"))
    link = tmp_path / "link.gguf"
    link.symlink_to(own_model)
    assert pipeline.ensure_sidecar(link) == beside


def test_without_a_home_folder(own_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder is missed only where it is needed."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    made = pipeline.ensure_sidecar(own_model, show_progress=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(SidecarError, match="the user has no home folder; set XDG_CACHE_HOME, or make a sidecar"):
        pipeline.ensure_sidecar(own_model)
    beside = made.rename(own_model.with_name("tiny.xkv.gguf"))
    assert pipeline.ensure_sidecar(own_model) == beside


def test_damaged_one_is_refused_not_replaced(own_model: Path) -> None:
    beside = own_model.with_name("tiny.xkv.gguf")
    beside.write_bytes(b"GGUF" + bytes(500))
    with pytest.raises(SidecarError, match="not an xkv sidecar"):
        pipeline.ensure_sidecar(own_model)
    assert beside.read_bytes() == b"GGUF" + bytes(500)


def test_one_of_another_model_is_refused(own_model: Path) -> None:
    made = pipeline.ensure_sidecar(own_model, show_progress=False)
    write_tiny(own_model, weights(1))
    with pytest.raises(SidecarMismatchError, match="made for a model with fingerprint"):
        pipeline.ensure_sidecar(own_model, made)
    with pytest.raises(SidecarError, match="no such file"):
        pipeline.ensure_sidecar(own_model, own_model.with_name("none.xkv.gguf"))


def test_cache_folder_that_cannot_be_made(own_model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SidecarError, match=r"cache folder .* cannot be made"):
        pipeline.ensure_sidecar(own_model)


@pytest.mark.parametrize(
    "xkv",
    [
        {"ratio": 3, "n_window": 100},
        {"quality": "low", "types": "q8_0+q4_0", "max_segments": 2},
        {"budget": "1MiB", "type_window": "q8_0", "type_basis": "q4_0"},
        {"rank": "full", "types": "f32", "type_window": "f32", "type_basis": "f32"},
        {"rank": 64, "types": "q2_0", "type_basis": "f16", "n_sink": 0},
    ],
)
def test_predicted_sizes_are_the_native_ones(
    tiny_model: Path, text_file: Path, tmp_path: Path, xkv: dict[str, Any]
) -> None:
    run(tiny_model, tmp_path / "s", data=(text_file,), frame=64)
    xkv = {"sidecar": str(tmp_path / "s"), **xkv}
    llm = Llama(tiny_model, kv_mode="xkv", xkv=xkv, n_ctx=2048, n_batch=256, verbose=False)
    found = {part.name: part.bytes for part in llm.kv_report().parts}
    plan = llm.xkv_plan
    llm.close()
    assert plan is not None
    assert set(plan.parts) <= set(found)
    for name, n_bytes in plan.parts.items():
        # buffers are padded
        assert n_bytes <= found[name] <= n_bytes + 4096, name
