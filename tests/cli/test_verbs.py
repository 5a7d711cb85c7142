"""The verbs convert and inspect, through the command line."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.cli import main
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.plan.sizes import CONTEXTS
from xkv_gguf.sidecar.read import read_sidecar

from ..tiny import weights, write_tiny

Cli = Callable[..., str]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line; return its output, or its one-line error after a failure."""

    def call(*args: object, fails: bool = False) -> str:
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert status == (1 if fails else 0), err
        if fails:
            lines = err.strip().splitlines()
            assert len(lines) == 1, err
            assert lines[0].startswith("xkv-gguf: ")
            assert out == ""
            return lines[0]
        return out

    return call


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model.read_bytes())
    return path


SMALL = ("--tokens", 512, "--coef-ratio", 2.5, "--group-size", 2, "--threads", 1, "--quiet")


def test_convert_writes_beside_the_model(cli: Cli, model: Path) -> None:
    assert cli("convert", model, *SMALL).strip() == str(model.with_name("tiny.xkv.gguf"))
    read_sidecar(model.with_name("tiny.xkv.gguf")).check_model(model)


def test_every_option_of_convert_arrives(cli: Cli, model: Path, text_file: Path, tmp_path: Path) -> None:
    plan = ("--group-size", 1, "--budget", "1.5MiB", "--n-ctx", 3000, "--frame", 128)
    text = ("--tokens", 700, "--seed", 5, "--basis-type", "f32", "--data", text_file, "--quiet")
    cli("convert", model, "-o", tmp_path / "o.gguf", *plan, *text)
    info = read_sidecar(tmp_path / "o.gguf").info
    assert [g.layers for g in info.groups] == [(0,), (1,), (2,)]
    assert (info.target, info.n_ctx) == (SizeTarget("budget", str(3 << 19)), 3072)
    assert (info.frame, info.calibration.seed, info.calibration.source) == (128, 5, "files")
    assert info.settings["basis_type"] == "f32"
    assert info.settings["tokens"] == 700


def test_progress_bar_with_time_left(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), "--tokens", "512", "--threads", "1", "--group-size", "1"]) == 0
    err = capsys.readouterr().err
    assert "calibrating" in err
    assert "512/512" in err
    assert "solving" in err
    assert re.search(r"^quality medium at n_ctx 2048: 0\.2 MiB, 6\.\d\dx smaller than f16$", err, re.MULTILINE)


def test_errors_of_convert(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert "no such file" in cli("convert", tmp_path / "none.gguf", fails=True)
    assert "ratio 99: out of reach at n_ctx 2048" in cli("convert", model, "--ratio", 99, fails=True)
    assert "ratio: -1.0, expected" in cli("convert", model, "--ratio", -1, fails=True)
    assert "not allowed with argument" in cli("convert", model, "--ratio", 3, "--quality", "low", fails=True)
    assert "quality: 'best', expected one of high" in cli("convert", model, "--quality", "best", fails=True)
    assert "budget: '3MB', expected bytes or a size" in cli("convert", model, "--budget", "3MB", fails=True)
    assert "'many', expected a whole number or auto" in cli("convert", model, "--group-size", "many", fails=True)
    assert "group size 9: 1 to 3" in cli("convert", model, "--group-size", 9, fails=True)
    assert "does not exist" in cli("convert", model, "-o", tmp_path / "no" / "s", fails=True)
    assert "--outtype is for Hugging Face folders" in cli("convert", model, "--outtype", "f16", fails=True)
    assert "invalid int value" in cli("convert", model, "--tokens", "many", fails=True)
    (tmp_path / "text.gguf").write_text("no model")
    assert "GGUF magic" in cli("convert", tmp_path / "text.gguf", fails=True)


def test_convert_replaces_no_other_file(cli: Cli, model: Path, tmp_path: Path) -> None:
    """Neither the model, by whatever name, nor a file that is no sidecar; of sidecars, another model's with --force."""
    notes, other, link = tmp_path / "notes.txt", tmp_path / "other.gguf", tmp_path / "link.xkv.gguf"
    notes.write_text("my notes")
    write_tiny(other, weights(1))
    link.symlink_to(model)
    kept = {path: path.read_bytes() for path in (model, notes, other)}
    for force in ((), ("--force",)):
        for out in (model, link):
            assert "is the model itself" in cli("convert", model, "-o", out, *SMALL, *force, fails=True)
        for out in (notes, other):
            assert "is no xkv sidecar" in cli("convert", model, "-o", out, *SMALL, *force, fails=True)
    assert kept == {path: path.read_bytes() for path in kept}

    sidecar = Path(cli("convert", model, *SMALL).strip())
    before = sidecar.read_bytes()
    assert "of another model" in cli("convert", other, "-o", sidecar, *SMALL, fails=True)
    assert sidecar.read_bytes() == before
    cli("convert", other, "-o", sidecar, *SMALL, "--force")
    read_sidecar(sidecar).check_model(other)
    cli("convert", other, "-o", sidecar, *SMALL)
    sidecar.write_bytes(sidecar.read_bytes()[:-9])
    cli("convert", other, "-o", sidecar, *SMALL)
    read_sidecar(sidecar).check_model(other)


def test_inspect_sidecar(cli: Cli, model: Path) -> None:
    sidecar = cli("convert", model, *SMALL).strip()
    text = cli("inspect", sidecar)
    assert "made for    coef_ratio 2.5 at n_ctx 2048" in text
    assert "sinks 4 + 25, window 64 f16, n_ubatch 512, bases q8_0" in text
    work = r"^work +decode \d\.\dx the multiply-adds .*dense \d\.\dx\), prefill 1\.\d\dx; reads \d\.\d\dx its bytes"
    assert re.search(work, text, re.MULTILINE)
    assert "dense all: " in text and "bytes per layer, f16 256" in text
    assert re.search(r"predicted +distortion \d\.\d{4}$", text, re.MULTILINE)
    assert re.search(r"^0-1 +(\d+xq\d_0 )+ +128 ", text, re.MULTILINE)
    rows = [line.split() for line in text.splitlines()]
    header = next(row for row in rows if row[:1] == ["cache"])
    assert header == ["cache", "bytes/token", "2k", "4k", "32k", "128k"]
    assert [row[0] for row in rows[-4:]] == ["f16", "q8_0", "q4_0", "xkv"]
    assert rows[-4][1] == str(2 * 2 * 3 * 64)


def test_inspect_json(cli: Cli, model: Path) -> None:
    sidecar = cli("convert", model, *SMALL).strip()
    found = json.loads(cli("inspect", sidecar, "--json"))
    info = read_sidecar(sidecar).info
    assert found["kind"] == "sidecar"
    plan = found["plan"]
    assert (plan["knob"], plan["value"], plan["n_ctx"]) == ("coef_ratio", "2.5", 2048)
    assert 2.5 <= plan["coef_ratio"] < 3
    assert plan["total_bytes"] == sum(plan["parts"].values())
    assert [g["layers"] for g in plan["groups"]] == [list(g.layers) for g in info.groups]
    assert all(0 < g["kept_v"] <= 1 for g in plan["groups"])
    work = plan["work"]
    assert 0 < work["decode"] <= work["dense"]
    assert 0 < work["bytes_read"] <= work["bytes_read_dense"]
    assert work["bytes_read_f16"] == 2 * 2 * 64
    alone = Path(sidecar).rename(Path(sidecar).with_name("alone.xkv.gguf"))
    # how many heads the model has, the sidecar alone does not tell
    assert json.loads(cli("inspect", alone, "--json"))["plan"]["work"] is None
    assert "work  " not in cli("inspect", alone)
    assert found["caches"]["xkv"]["bytes_per_token"] == 2 * 3 * 64 * 2 / plan["coef_ratio"]
    assert list(found["caches"]["xkv"]["totals"]) == [str(n) for n in (2048, *CONTEXTS)]
    assert found["caches"]["q8_0"]["totals"]["4096"] == 2 * 3 * 64 * 4096 * 34 // 32


def test_inspect_tries_other_size_targets(cli: Cli, model: Path) -> None:
    sidecar = cli("convert", model, *SMALL).strip()
    for file in (sidecar, model):
        plan = json.loads(cli("inspect", file, "--budget", "1MiB", "--n-ctx", 8192, "--json"))["plan"]
        assert (plan["knob"], plan["value"], plan["n_ctx"]) == ("budget", str(2**20), 8192)
        assert 0.9 * 2**20 < plan["total_bytes"] <= 2**20
        # the heads of query are as many as the model's, which the sidecar alone does not tell
        assert plan["parts"]["bases and means"] >= 4 * 3 * (2 * 64 + 128)
    low, high = (
        json.loads(cli("inspect", sidecar, "--quality", q, "--json"))["plan"]["distortion"] for q in ("low", "high")
    )
    assert low > high
    assert "ratio 99: out of reach at n_ctx 2048" in cli("inspect", sidecar, "--ratio", 99, fails=True)
    text = cli("inspect", sidecar, "--ratio", 13, "--n-ctx", 65536)
    assert "ratio 13 at n_ctx 65536" in text and "out of reach" in text
    assert "at n_ctx 1024: " in cli("inspect", sidecar, "--n-ctx", 1000)  # as large as a context is made
    assert "--n-ctx: 0, expected 1 or more" in cli("inspect", sidecar, "--n-ctx", 0, fails=True)


def test_inspect_model_with_an_old_sidecar(cli: Cli, model: Path, sidecar_file: Path, reseal: Any) -> None:
    data = sidecar_file.read_bytes()
    at = data.index(b"xkv.format_version") + len("xkv.format_version") + 4
    reseal(model.with_name("tiny.xkv.gguf"), data[:at] + b"\x01\0\0\0" + data[at + 4 :])
    assert "format version 1, which is older" in cli("inspect", model)
    assert json.loads(cli("inspect", model, "--json"))["plan"] is None


def test_inspect_model(cli: Cli, model: Path) -> None:
    assert "none yet" in cli("inspect", model)
    assert "there is no sidecar to plan with" in cli("inspect", model, "--ratio", 4, fails=True)
    cli("convert", model, *SMALL)
    found = json.loads(cli("inspect", model, "--json"))
    assert found["kind"] == "model"
    assert found["embd_k"] == found["embd_v"] == [64, 64, 64]
    assert found["sidecar"] == str(model.with_name("tiny.xkv.gguf"))


def test_errors_of_inspect(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert "no such file" in cli("inspect", tmp_path / "none", fails=True)
    assert "no such file" in cli("inspect", tmp_path / "none.xkv.gguf", fails=True)
    assert "draws the spectra of a sidecar" in cli("inspect", model, "--plot", tmp_path / "s.png", fails=True)
    sidecar = Path(cli("convert", model, *SMALL).strip())
    assert "ends in .png, .svg, .pdf" in cli("inspect", sidecar, "--plot", tmp_path / "s.txt", fails=True)
    sidecar.write_bytes(sidecar.read_bytes()[:-5])
    assert "truncated or damaged" in cli("inspect", sidecar, fails=True)


def test_plot(cli: Cli, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    sidecar = cli("convert", model, *SMALL).strip()
    cli("inspect", sidecar, "--plot", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = cli("convert", model, *SMALL).strip()
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install xkv-gguf[plot]" in cli("inspect", sidecar, "--plot", tmp_path / "s.png", fails=True)
    assert not (tmp_path / "s.png").exists()
