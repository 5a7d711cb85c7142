"""What is computed for GPUs: by hand in small, the kernels' own constants, and the tables of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.roofline import LAYERS, Card, Stage

CARD = Card("none", memory=8e9, bandwidth=100.0, cache=1000.0, int8=50.0, f16=20.0, issue=1e6, launch=0.5)


@pytest.mark.parametrize(
    ("stage", "seconds", "binds"),
    [
        (Stage("bytes", bytes=800.0, int8=30.0), 800 / (100 * 0.8), "memory"),
        (Stage("cached", bytes=80.0, cached=3920.0), 4000 / (1000 * 0.8), "L2"),
        (Stage("products", bytes=8.0, int8=300.0, f16=60.0), 300 / (50 * 0.6) + 60 / (20 * 0.6), "products"),
        (Stage("launches", bytes=8.0, launches=4), 0.1 + 4 * 0.5, "launches"),
    ],
)
def test_what_binds_decides(stage: Stage, seconds: float, binds: str) -> None:
    assert stage.seconds(CARD) == pytest.approx(seconds)
    assert stage.binds(CARD) == binds


def test_instructions_bind_where_products_are_quick() -> None:
    quick = Card("none", memory=0, bandwidth=1e9, cache=1e9, int8=1e9, f16=1e9, issue=1.0)
    stage = Stage("products", int8=2 * roofline.PRODUCT)
    assert stage.seconds(quick) == pytest.approx(2 * roofline.INSTRUCTIONS / 0.6)
    assert stage.binds(quick) == "instructions"


def test_sizes_are_those_of_the_plan() -> None:
    plan = roofline.plan_8b(7, 32768)
    sizes = roofline.sizes_of(plan)
    n_group = LAYERS // roofline.GROUP_LAYERS
    for kind in ("k", "v"):
        assert n_group * sizes.n * sizes.coef[kind] == pytest.approx(
            plan.parts[f"{kind.upper()} coefficients"], rel=1e-6
        )
        assert 0 < sizes.lead_coef[kind] < sizes.coef[kind]
    bases = LAYERS * (sizes.basis["k"] + sizes.basis["v"])
    assert bases == pytest.approx(plan.parts["bases and means"], rel=0.02)
    assert plan.ratio == pytest.approx(7, abs=0.05)


def test_the_lead_by_hand() -> None:
    sizes = roofline.sizes_of(roofline.plan_8b(7, 32768))
    lead = roofline.decode_stages(sizes)[0]
    assert lead.bytes == pytest.approx(LAYERS * sizes.n * (sizes.lead_coef["k"] + sizes.lead_coef["v"]))
    # a query goes through 128 x 128 numbers for each chunk of 128 tokens, and meets 128 + 128 of each token
    assert lead.int8 == pytest.approx(LAYERS * sizes.n * 32 * 3 * 128)


def test_a_plain_cache_is_read_once() -> None:
    for name in ("f16", "q4_0"):
        assert roofline.plain_decode(4096, name).bytes == roofline.cache_bytes(name, 4096)
    assert roofline.cache_bytes("f16", 32768) == 4 << 30


def test_what_fits() -> None:
    small = next(card for card in roofline.CARDS if card.name == "RTX 4060")
    assert not roofline.fits(small, 32768, "f16")
    assert roofline.fits(small, 32768, "xkv")


def test_constants_are_those_of_the_kernels(repo_root: Path) -> None:
    folder = repo_root / "native" / "ops" / "xkv_attn" / "cuda"
    text = "".join(path.read_text() for path in sorted(folder.glob("*.cu*")))

    def number(pattern: str) -> int:
        found = re.findall(pattern, text)
        assert len(found) == 1, pattern
        return int(found[0])

    assert number(r"#define XKV_CU_AHEAD +(\d+)") == roofline.AHEAD
    assert number(r"XKV_CU_SPAN = (\d+) << 20;") << 20 == roofline.SPAN_BYTES
    assert number(r"XKV_CU_N_ROUND += (\d+);") == roofline.ROUNDS
    assert number(r"#define XKV_CU_BATCH +(\d+)") == roofline.BATCH


def test_tables_of_the_documentation(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (repo_root / "docs" / "performance.md").read_text()
    assert roofline.main([]) == 0
    assert roofline.main(["--stages", "RTX 3060"]) == 0
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith("| ---"):
            assert line in text, line
