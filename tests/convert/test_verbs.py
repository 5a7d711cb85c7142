"""The verbs convert and inspect, through the command line."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.cli import main
from xkv_gguf.convert.sidecar import read_sidecar
from xkv_gguf.convert.sizes import CONTEXTS

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


SMALL = ("--tokens", 512, "--ratio", 2.5, "--group-size", 2, "--threads", 1, "--quiet")


def test_convert_writes_beside_the_model(cli: Cli, model: Path) -> None:
    assert cli("convert", model, *SMALL).strip() == str(model.with_name("tiny.xkv.gguf"))
    read_sidecar(model.with_name("tiny.xkv.gguf")).check_model(model)


def test_every_option_of_convert_arrives(cli: Cli, model: Path, text_file: Path, tmp_path: Path) -> None:
    plan = ("--group-size", 1, "--rank-k", 64, "--rank-v", 32, "--frame", 128, "--type-coef", "q4_0")
    text = ("--tokens", 700, "--seed", 5, "--basis-type", "f32", "--data", text_file, "--quiet")
    cli("convert", model, "-o", tmp_path / "o.gguf", *plan, *text)
    info = read_sidecar(tmp_path / "o.gguf").info
    assert [(g.first, g.count, g.rank_k, g.rank_v) for g in info.groups] == [(i, 1, 64, 32) for i in range(3)]
    assert (info.frame, info.calibration.seed, info.calibration.source) == (128, 5, "files")
    assert info.settings["basis_type"] == "f32"
    assert info.settings["type_coef"] == "q4_0"
    assert info.settings["tokens"] == 700


def test_progress_bar_with_time_left(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), "--tokens", "512", "--threads", "1", "--group-size", "1"]) == 0
    err = capsys.readouterr().err
    assert "calibrating" in err
    assert "512/512" in err
    assert "solving" in err
    assert "note: the default ratio 7 is out of reach" in err


def test_errors_of_convert(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert "no such file" in cli("convert", tmp_path / "none.gguf", fails=True)
    assert "ratio 1.5" in cli("convert", model, "--ratio", 1.5, fails=True)
    assert "group size 9: 1 to 3" in cli("convert", model, "--group-size", 9, fails=True)
    assert "does not exist" in cli("convert", model, "-o", tmp_path / "no" / "s", fails=True)
    assert "--outtype is for Hugging Face folders" in cli("convert", model, "--outtype", "f16", fails=True)
    assert "invalid int value" in cli("convert", model, "--tokens", "many", fails=True)
    (tmp_path / "text.gguf").write_text("no model")
    assert "GGUF magic" in cli("convert", tmp_path / "text.gguf", fails=True)


def test_inspect_sidecar(cli: Cli, model: Path) -> None:
    sidecar = cli("convert", model, *SMALL).strip()
    text = cli("inspect", sidecar)
    assert "planned for 2.5" in text
    rows = [line.split() for line in text.splitlines()]
    info = read_sidecar(sidecar).info
    assert ["0-1", str(info.groups[0].rank_k), "128"] in [row[:3] for row in rows]
    header = next(row for row in rows if row[:1] == ["cache"])
    assert header == ["cache", "bytes/token", "4k", "32k", "128k"]
    assert [row[0] for row in rows[-4:]] == ["f16", "q8_0", "q4_0", "xkv"]
    assert rows[-4][1] == str(2 * 2 * 3 * 64)


def test_inspect_json(cli: Cli, model: Path) -> None:
    sidecar = cli("convert", model, *SMALL).strip()
    found = json.loads(cli("inspect", sidecar, "--json"))
    info = read_sidecar(sidecar).info
    assert found["kind"] == "sidecar"
    assert found["ratio"] >= 2.5
    assert [g["rank_k"] for g in found["groups"]] == [g.rank_k for g in info.groups]
    assert all(0 < g["energy_v"] <= 1 for g in found["groups"])
    per_token = sum(g.rank_k + g.rank_v for g in info.groups) * 34 / 32
    assert found["caches"]["xkv"]["bytes_per_token"] == per_token
    assert list(found["caches"]["xkv"]["totals"]) == [str(n) for n in CONTEXTS]
    assert found["caches"]["q8_0"]["totals"]["4096"] == 2 * 3 * 64 * 4096 * 34 // 32


def test_inspect_model(cli: Cli, model: Path) -> None:
    assert "none yet" in cli("inspect", model)
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
