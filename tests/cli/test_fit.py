"""The verb fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xkv_gguf.cli import main

from ..llama.tiny_models import write_alibi_model
from .test_cli import error_line

CACHES = "f16,q8_0,xkv:2,xkv:3"


def fit(capsys: pytest.CaptureFixture[str], model: Path, *argv: str) -> str:
    """Output of the verb."""
    assert main(["fit", str(model), "--caches", CACHES, *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_longest_context_of_each_cache(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(fit(capsys, tiny_model, "--memory", "1GiB", "--json"))
    assert (whole["memory"], whole["n_ctx"], whole["n_ctx_train"]) == (1 << 30, None, 2048)
    assert [(row["cache"], row["n_ctx"]) for row in whole["caches"]] == [(name, 2048) for name in CACHES.split(",")]
    f16 = whole["caches"][0]["bytes"]
    memory = f16["total"] - f16["cache"] // 2
    less = json.loads(fit(capsys, tiny_model, "--memory", str(memory), "--json"))
    found = {row["cache"]: row for row in less["caches"]}
    assert 256 <= found["f16"]["n_ctx"] < 2048 and found["f16"]["bytes"]["total"] <= memory
    assert found["f16"]["n_ctx"] < found["q8_0"]["n_ctx"] <= 2048


def test_what_fits_at_a_context(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads(fit(capsys, tiny_model, "--memory", "1GiB", "--n-ctx", "2048", "--json"))["caches"][0]
    assert row["bytes"]["cache"] == 2 * 2 * 3 * 64 * 2048 == row["parts"]["K and V"]
    assert row["bytes"]["total"] == sum(row["bytes"][name] for name in ("weights", "cache", "compute", "renewals"))
    assert sum(device["weights"] for device in row["devices"].values()) == row["bytes"]["weights"]
    lines = fit(capsys, tiny_model, "--memory", str(row["bytes"]["total"]), "--n-ctx", "2000").splitlines()
    assert lines[0].startswith("tiny") and lines[0].endswith("; the model's own context is 2048")
    assert lines[1].split()[:3] == ["cache", "n_ctx", "2048"]
    assert [line.split()[1] for line in lines[2:4]] == ["fits", "fits"]
    fewer = fit(capsys, tiny_model, "--memory", str(row["bytes"]["total"] - 1), "--n-ctx", "2000").splitlines()
    assert [line.split()[1] for line in fewer[2:4]] == ["no", "fits"]


def test_nothing_fits(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = fit(capsys, tiny_model, "--memory", "100KiB").splitlines()
    assert [line.split()[1] for line in lines[2:6]] == ["none"] * 4
    assert lines[6].startswith("f16: ") and lines[6].endswith("are needed at n_ctx 256, expected 100.0 KiB at most")


def test_a_cache_that_the_model_cannot_have_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alibi.gguf"
    write_alibi_model(path)
    out = fit(capsys, path, "--memory", "1GiB")
    rows = {line.split()[0]: line for line in out.splitlines()[2:6]}
    assert rows["f16"].split()[1] != "none"
    assert rows["xkv:2"].split()[1] == "none"
    assert any(line.startswith("xkv:2: ") and "ALiBi" in line for line in out.splitlines()[6:])


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "the following arguments are required: --memory"),
        (["--memory", "8GB"], "--memory: '8GB', expected bytes or a size such as 26MiB"),
        (["--memory", "8GiB", "--n-ctx", "0"], "--n-ctx: 0, expected 1 or more"),
        (["--memory", "8GiB", "--caches", "q3"], "--caches: 'q3' is unknown"),
        (["--memory", "8GiB", "--caches", "xkv:memory=1GiB"], "--caches: 'xkv:memory=1GiB' states a memory"),
    ],
)
def test_errors_are_one_line(
    argv: list[str], expected: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_line(capsys, "fit", str(tiny_model), *argv)


def test_memory_is_for_xkv(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "run", str(tiny_model), "-p", "x", "--kv-mode", "f16", "--memory", "1GiB")
    assert "--memory is for --kv-mode xkv, not f16" in line


def test_a_run_keeps_to_a_memory(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = fit(capsys, tiny_model, "--memory", "1GiB", "--n-ctx", "2048", "--json", "--caches", "xkv:6")
    memory = json.loads(size)["caches"][0]["bytes"]["total"]
    argv = ["run", str(tiny_model), "-p", "x", "-n", "2", "--raw", "--json", "--no-calibration", "--n-ctx", "2048"]
    found = []
    for words in (["--memory", str(memory)], ["--memory", "1GiB"]):
        assert main([*argv, *words]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        found.append(json.loads(out)["cache"]["total_bytes"])
    f16 = 2 * 2 * 3 * 64 * 2048
    assert found == pytest.approx([f16 / 6, f16 / 4], rel=0.1)
