"""What a conversion takes: bounded for wide models, told beforehand, refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkv_gguf.convert import calibrate, estimate
from xkv_gguf.convert.capture import Capture
from xkv_gguf.convert.estimate import Work, format_time, split_runs
from xkv_gguf.convert.pipeline import convert
from xkv_gguf.convert.settings import Settings
from xkv_gguf.errors import OutOfMemoryError
from xkv_gguf.plan.groups import LayerGroups, default_group_size, group_layers
from xkv_gguf.plan.sizes import ModelShape
from xkv_gguf.sidecar.read import read_sidecar


def work(embd: int, n_layer: int, n_seq: int = 2) -> Work:
    size = min(5, max(1, 4096 // embd), n_layer)
    groups = LayerGroups.of(group_layers(range(n_layer), size), [embd] * n_layer, [embd] * n_layer)
    return Work(groups, 2, n_seq, 512, 16384, 18432, False)


def test_wide_layers_are_grouped_less() -> None:
    def size(n_layer: int, embd_k: int, embd_v: int, every: int = 1) -> int:
        k, v = (tuple(embd * (il % every == 0) for il in range(n_layer)) for embd in (embd_k, embd_v))
        return default_group_size(ModelShape(k, v, v, 64, 64))

    assert size(30, 192, 192) == 5
    assert size(32, 1024, 1024) == 4
    assert size(32, 4096, 4096) == 1
    assert size(32, 8192, 8192) == 1
    assert size(3, 64, 32) == 3
    assert size(12, 64, 64, every=4) == 3


def test_a_wide_model_is_converted_in_four_gigabytes() -> None:
    """32 layers of 32 KV heads of 128."""
    assert work(4096, 32).memory() < 4 << 30
    assert work(1024, 32).memory() < 4 << 30


def test_runs_take_all_groups_in_order() -> None:
    groups = work(4096, 80).groups
    runs = list(split_runs(groups))
    assert len(runs) == 3
    assert [g for run in runs for g in run] == list(range(80))
    assert len(list(split_runs(work(192, 30).groups))) == 1


@pytest.mark.parametrize(("seconds", "text"), [(41.4, "41 s"), (125, "2 minutes"), (9000, "2.5 hours")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_the_rate_is_that_of_the_fastest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others on the machine slow single batches down."""
    now = 0.0
    times = iter([5.0, 0.4, 0.1, 0.9, 0.2, 0.3])

    class Slow:
        n_decode = 0

        def open_context(self, n_seq: int, n_len: int) -> None:
            assert (n_seq, n_len) == (4, estimate.N_TRY + 1)

        def bos(self) -> list[int]:
            return [1]

        def decode(self, *_: object, **__: object) -> None:
            nonlocal now
            self.n_decode += 1
            now += next(times)

        def logits(self, _n: int) -> None:
            pass

        def close_context(self) -> None:
            pass

    monkeypatch.setattr(estimate, "perf_counter", lambda: now)
    monkeypatch.setattr(estimate, "TRY_SECONDS", 100.0)
    assert estimate.measure_rate(Slow(), 4) == pytest.approx(40)
    # a slow model is not run for long
    monkeypatch.setattr(estimate, "TRY_SECONDS", 2.0)
    times, slow = iter([5.0, 4.0]), Slow()
    assert estimate.measure_rate(slow, 4) == pytest.approx(1)
    assert slow.n_decode == 2


def test_told_before_it_begins(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(tiny_model, tmp_path / "s", Settings(tokens=512, threads=1))
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("calibration takes ") and " tokens a second, and at most " in first


def test_what_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda: 100 << 20)
    with pytest.raises(OutOfMemoryError, match=r"calibration takes 51\d\.\d MiB beside the model, 100\.0 MiB are free"):
        convert(tiny_model, tmp_path / "s", Settings(tokens=512, threads=1), show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["written", "files"])
def test_several_runs_find_what_one_does(
    source: str, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is written once and read again; rounding differs a little."""
    if source == "written":
        monkeypatch.setattr(calibrate, "package_texts", lambda: ["some text " * 26])
    settings = Settings(
        group_size=1, tokens=600, threads=1, basis_type="f32", data=(text_file,) if source == "files" else ()
    )
    captured: list[int] = []
    new = Capture.__init__

    def counted(self: Capture, engine: object, first: list[int], *rest: object) -> None:
        captured.append(len(first))
        new(self, engine, first, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Capture, "__init__", counted)
    whole = convert(tiny_model, tmp_path / "whole", settings, show_progress=False)
    monkeypatch.setattr(estimate, "SUM_BYTES", 40000)
    parts = convert(tiny_model, tmp_path / "parts", settings, show_progress=False)
    assert captured == [3, 2, 1]
    assert parts.info == whole.info
    for g in range(3):
        for kind in ("k", "v"):
            one, other = (read_sidecar(tmp_path / name) for name in ("whole", "parts"))
            assert one.spectrum(g, kind) == pytest.approx(other.spectrum(g, kind), rel=2e-2, abs=1e-3)
