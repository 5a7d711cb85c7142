from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from xkv_gguf import KvPart, KvReport, demo
from xkv_gguf.sidecar.find import cached_sidecar


def test_the_table_compares_with_the_first_cache() -> None:
    sizes = {"f16": 12 * 2**20, "q8_0": 6 * 2**20, "xkv": 3 * 2**20}
    lines = demo.size_table([KvReport(mode, 64, (KvPart("all", size),)) for mode, size in sizes.items()]).splitlines()
    assert lines[1].split() == ["f16", "12,582,912", "12.0", "MiB", "1.00"]
    assert lines[3].split() == ["xkv", "3,145,728", "3.0", "MiB", "4.00"]


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_answers_right_on_a_third_of_the_memory(
    demo_model: Path, sidecar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "N_DOCUMENT", 1500)  # tests/needle has one of 6000 tokens
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    place = cached_sidecar(demo_model)
    place.parent.mkdir()
    shutil.copy(sidecar, place)
    assert demo.main() == 0
    out = capsys.readouterr().out
    needle = re.search(r"The special magic number for \w+ is (\d{7})\.", out)
    assert needle is not None
    # once as the fact, once in the answer
    assert out.count(needle[1]) >= 2
    smaller = re.search(r"^xkv .* (\d+\.\d+)$", out, re.MULTILINE)
    assert smaller is not None and float(smaller[1]) >= 3.0
