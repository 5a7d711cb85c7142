from __future__ import annotations

from pathlib import Path

import pytest

from xkv_gguf import KvPart, KvReport
from xkv_gguf.base.pictures import check_picture
from xkv_gguf.errors import OptionError
from xkv_gguf.lab.eval_plot import plot_rows
from xkv_gguf.lab.eval_rows import Row, make_row, table

FIGURES = {"kld_mean": 0.01, "kld_median": 0.005, "kld_p99": 0.1, "kld_p999": 0.2, "top1": 0.9375, "ppl": 12.0}
F16 = KvReport("f16", 1024, (KvPart("K and V", 4 * 2**20),), n_exact=1024)
XKV = KvReport(
    "xkv",
    1024,
    (KvPart("K coefficients", 600), KvPart("V coefficients", 400), KvPart("bases", 2**20 - 1000)),
    n_exact=524,
    n_stored=500,
)


def rows() -> list[Row]:
    exact = {**FIGURES, "kld_mean": 0.0, "top1": 1.0}
    found = []
    for text in ("prose", "code"):
        found.append(make_row("f16", text, F16, 4 * 2**20, 64, exact))
        found.append(make_row("xkv:7", text, XKV, 4 * 2**20, 64, FIGURES))
    return found


def test_a_row_holds_the_figures_and_counts_all_bytes() -> None:
    row = rows()[1]
    assert row == {
        "cache": "xkv:7",
        "text": "prose",
        "n_ctx": 1024,
        "cache_bytes": 2**20,
        "ratio": 4.0,
        **FIGURES,
        "n_scored": 64,
        "cache_parts": {"K coefficients": 600, "V coefficients": 400, "bases": 2**20 - 1000},
        "n_exact": 524,
        "n_stored": 500,
        "coef_bytes_per_token": 2.0,
    }
    assert "coef_bytes_per_token" not in rows()[0]


def test_the_table_has_a_line_per_cache() -> None:
    lines = table(rows()).splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["cache", "bytes", "ratio", "prose:", "KLD", "top-1", "code:", "KLD", "top-1"]
    assert lines[2].split() == ["xkv:7", "1.0", "MiB", "4.00x", "0.01000", "93.75%", "0.01000", "93.75%"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_plot_is_drawn(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plot.{ending}"
    check_picture(path)
    plot_rows(rows(), path, "title")
    assert path.stat().st_size > 1000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_plot_names_caches_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot_rows(rows(), tmp_path / "plot.svg", "a title")
    drawn = (tmp_path / "plot.svg").read_text()
    for text in ("xkv:7", "prose", "code", "f16 (no divergence)", "a title", "nats", "MiB"):
        assert f"{text}" in drawn


def test_a_plot_without_any_divergence_is_drawn(tmp_path: Path) -> None:
    plot_rows([row for row in rows() if row["cache"] == "f16"], tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").is_file()


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected a name that ends in"):
        check_picture(tmp_path / "plot.jpeg")
