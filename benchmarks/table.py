"""The README's table: `python benchmarks/table.py BENCH.json EVAL.json [EVAL.json ...]`.

BENCH.json is of `xkv-gguf bench --json`, EVAL.json of `xkv-gguf eval --json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

MIB = 2**20


def table(bench: dict[str, Any], evals: list[dict[str, Any]]) -> str:
    """Lines of Markdown: one row per cache, at the largest depth that was measured.

    Parameters
    ----------
    bench : dict
        Of `xkv-gguf bench --json`.
    evals : list of dict
        Of `xkv-gguf eval --json`; figures are means over all texts.
    """
    depth = max(row["depth"] for row in bench["rows"])
    rows = {row["cache"]: row for row in bench["rows"] if row["depth"] == depth}
    plain = rows["f16"]
    lost: dict[str, list[dict[str, Any]]] = {}
    for result in evals:
        for row in result["rows"]:
            lost.setdefault(row["cache"], []).append(row)
    head = (
        "| cache | bytes | smaller | process peak | prefill at depth | whole prompt | decode | KLD | same top token |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    lines = [head]
    for name, row in rows.items():
        speeds = [
            f"{row[key]:.3g} ({row[key] / plain[key]:.2f}x)" for key in ("prefill_tps", "prompt_tps", "decode_tps")
        ]
        texts = lost.get(name, [])
        quality = (
            [f"{mean(t['kld_mean'] for t in texts):.4f}", f"{100 * mean(t['top1'] for t in texts):.1f} %"]
            if texts
            else ["-", "-"]
        )
        cells = [
            name,
            f"{row['cache_bytes'] / MIB:.1f} MiB",
            f"{plain['cache_bytes'] / row['cache_bytes']:.2f}x",
            f"{row['peak_rss_bytes'] / MIB:.0f} MiB",
            *speeds,
            *quality,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Print the README's table.")
    parser.add_argument("bench", type=Path)
    parser.add_argument("evals", type=Path, nargs="+")
    args = parser.parse_args()
    print(table(json.loads(args.bench.read_text()), [json.loads(path.read_text()) for path in args.evals]))


if __name__ == "__main__":
    main()
