from __future__ import annotations

import json

from xkv_gguf import KvDevice, KvPart, KvReport
from xkv_gguf.base.text import format_bytes, format_table

REPORT = KvReport(
    "xkv",
    1024,
    (KvPart("coefficients", 3 * 2**20), KvPart("means", 512)),
    n_exact=260,
    n_stored=64,
    n_update=2,
    n_check=7,
    renew_seconds=1.25,
    n_ubatch=512,
    notes=("something is less than usual",),
)


def test_the_total_is_the_sum_of_the_parts() -> None:
    assert REPORT.total_bytes == 3 * 2**20 + 512


def test_json_holds_everything() -> None:
    assert json.loads(REPORT.to_json()) == {
        "kv_mode": "xkv",
        "n_ctx": 1024,
        "total_bytes": 3 * 2**20 + 512,
        "parts": {"coefficients": 3 * 2**20, "means": 512},
        "scratch_bytes": 0,
        "scratch": {},
        "n_exact": 260,
        "n_stored": 64,
        "n_update": 2,
        "n_check": 7,
        "renew_seconds": 1.25,
        "devices": {},
        "n_ubatch": 512,
        "notes": ["something is less than usual"],
    }


def test_text_has_a_line_per_part_and_the_total() -> None:
    assert str(REPORT).splitlines() == [
        "KV cache xkv, n_ctx 1024: 260 tokens exact, 64 compressed; bases renewed 2 times in 7 checks (1.2 s)",
        "  coefficients  3.0 MiB",
        "  means         0.5 KiB",
        "  total         3.0 MiB",
        "  note: something is less than usual",
    ]


def test_scratch_stands_beside_the_total() -> None:
    report = KvReport("f16", 512, (KvPart("K and V", 2**20),), scratch=(KvPart("compute buffers", 2**21),))
    assert (report.total_bytes, report.scratch_bytes) == (2**20, 2**21)
    assert str(report).splitlines()[-1].split() == ["scratch:", "compute", "buffers", "2.0", "MiB"]


def test_plain_caches_have_no_bases() -> None:
    assert str(KvReport("f16", 512, (KvPart("K and V", 1024),))).splitlines()[0].endswith("0 compressed")


def test_bytes_are_printed_in_a_unit_that_shows_them() -> None:
    assert [format_bytes(n) for n in (0, 512, 100 * 1024, 2**20, 3 * 2**30)] == [
        "0.0 KiB",
        "0.5 KiB",
        "100.0 KiB",
        "1.0 MiB",
        "3072.0 MiB",
    ]


def test_tables_align_their_columns() -> None:
    assert format_table([["a", "10"], ["bcd", "5"]], "<>") == ["a    10", "bcd   5"]


def test_devices_are_told_where_there_are_several_or_an_op_is_missing() -> None:
    def lines(*devices: KvDevice) -> list[str]:
        report = KvReport("xkv", 1024, (KvPart("all", 2**20),), devices=devices)
        return [line.strip() for line in str(report).splitlines() if line.strip().startswith("on ")]

    cpu = KvDevice("CPU", 2**20, 2**20, 4, 4)
    idle = KvDevice("CPU_REPACK", 0, 2**20)
    assert lines(cpu) == lines(cpu, idle) == []
    assert lines(KvDevice("CPU", 2**20, 0, 4, 0)) == ["on CPU: 1.0 MiB, 4 layers, attention by stock ops"]
    assert lines(cpu, KvDevice("CUDA0", 2**21, 0, 6, 6)) == [
        "on CPU: 1.0 MiB, 4 layers, attention by fused op",
        "on CUDA0: 2.0 MiB, 6 layers, attention by fused op",
    ]
