"""`make bench-gpu`: caches at depth on a model of Llama-3.1-8B's shape with random weights. Writes RESULTS/bench.json.

A cache is measured in a context of its depth, in a process of its own: a prompt that fills it, single tokens, and one
more micro-batch. Small depths come first, and what there is no time left for is named, here and in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import shape
from xkv_gguf.base.text import format_bytes, format_table
from xkv_gguf.errors import XkvError
from xkv_gguf.model.file import open_model
from xkv_gguf.opening import scope_params
from xkv_gguf.options import XkvOptions
from xkv_gguf.placing import on_devices
from xkv_gguf.plan.segments import KINDS
from xkv_gguf.sidecar.read import read_sidecar

PLAIN = ("f16", "q8_0", "q4_0")
RATIO = 7
BASELINE = "f16"
MAX_QUERY = 8  # XKV_ATTN_MAX_QUERY
N_PREFILL = 512


def request(args: argparse.Namespace, model: Path, cache: str, depth: int) -> dict[str, Any]:
    """What `bench_one` is asked for."""
    options = None if cache in PLAIN else {"ratio": float(cache.partition(":")[2]), "fused": True}
    return {
        "model": str(model),
        "kv_mode": cache if cache in PLAIN else "xkv",
        "xkv": options,
        "depth": depth,
        "threads": args.threads,
        "n_gpu_layers": 0 if args.device == "cpu" else -1,
    }


def run_one(asked: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """A row: the last that the process printed, with a status: ok, partial, out of time, or failed and why."""
    command = [sys.executable, "-m", "tests.gpu.bench_one", json.dumps(asked)]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        lines, errors, code = done.stdout.splitlines(), done.stderr.strip().splitlines(), done.returncode
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        lines, errors, code = text.splitlines(), [], None
    row: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    row["wall_seconds"] = time.monotonic() - begin
    if code == 0:
        row["status"] = "ok"
    elif code is None:
        row["status"] = "partial, out of time" if lines else "out of time"
    else:
        row["status"] = f"failed: {errors[-1] if errors else f'status {code}'}"
    return row


def measure(args: argparse.Namespace, model: Path, end: float) -> list[dict[str, Any]]:
    """All caches at all depths, small depths first."""
    rows = []
    for depth in args.depths:
        for cache in args.caches:
            left = end - time.monotonic()
            row = run_one(request(args, model, cache, depth), left) if left > 5 else {"status": "out of time"}
            rows.append({"cache": cache, "depth": depth, **row})
            speed = f"decode {row['decode_tps']:.1f} tokens/s" if "decode_tps" in row else ""
            print(f"{cache} at {depth}: {row['status']} {speed}", flush=True)
    return rows


def op_words(args: argparse.Namespace, model: Path, depth: int) -> dict[str, Any]:
    """Arguments of xkv-gpu-bench for the first group of a cache of this depth.

    Raises
    ------
    XkvError
        There is no such cache.
    """
    one = shape.SHAPES[args.shape]
    sidecar = read_sidecar(model.with_suffix(".xkv.gguf"))
    options = XkvOptions.of({"ratio": RATIO, "fused": True})
    there = on_devices({"n_gpu_layers": 0 if args.device == "cpu" else -1}, rpc_fused=False)
    plan = scope_params(sidecar, options, depth, None, open_model(model), on_devices=there).plan
    segments: dict[str, str] = {
        kind: ",".join(f"{s.type}:{s.rank}:{s.type_basis}" for s in plan.of(0, kind)) for kind in KINDS
    }
    sizes = {"heads": one.n_head, "heads-kv": one.n_head_kv, "head-dim": one.head, "frame": sidecar.info.frame}
    settings = {"device": args.device, "threads": args.threads, "copy-mib": args.copy_mib}
    return {"tokens": depth, **segments, **sizes, **settings}


def run_op(args: argparse.Namespace, words: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What xkv-gpu-bench prints, with a status."""
    command = [str(args.programs / "xkv-gpu-bench"), *(w for k, v in words.items() for w in (f"--{k}", str(v)))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return {"status": "out of time"}
    if done.returncode != 0:
        return {"status": f"failed: {done.stderr.strip()[-300:]}"}
    return {"status": "ok", **json.loads(done.stdout)}


def measure_op(args: argparse.Namespace, model: Path, end: float) -> list[dict[str, Any]]:
    """The op by itself: with all directions and by the lead beside the device's copy rate, and a micro-batch."""
    found = []
    for depth in args.depths:
        for tolerance, queries in ((0.0, 1), (0.001, 1), (0.0, N_PREFILL)):
            asked = {"tolerance": tolerance, "queries": queries}
            reps = max(2, args.reps // 4) if queries > MAX_QUERY else args.reps
            try:
                words = {**op_words(args, model, depth), **asked, "reps": reps}
                row = run_op(args, words, end - time.monotonic())
            except XkvError as error:
                row = {"status": f"failed: {error}"}
            found.append({"tokens": depth, **asked, **row})
            print(f"op, {depth} tokens, {queries} queries, tolerance {tolerance}: {row['status']}{op_text(found[-1])}")
    return found


def op_text(row: Mapping[str, Any]) -> str:
    """How fast the op was; many queries are a matter of arithmetic, not of bytes."""
    if "seconds" not in row:
        return ""
    text = f", {row['seconds'] * 1e3:.3f} ms (f16 flash attention {row['f16_flash_seconds'] * 1e3:.3f})"
    if row["queries"] > MAX_QUERY:
        return text
    return f"{text}, {row['bytes_per_second'] / 1e9:.1f} GB/s, {row['share_of_copy']:.3f} of a copy's"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, with ratios to f16 at the same depth."""
    base = {row["depth"]: row for row in rows if row["cache"] == BASELINE}
    lines = [["cache", "depth", "prompt t/s", "", "prefill t/s", "", "decode t/s", "", "cache", "card, driver", ""]]
    for row in rows:
        cells = [row["cache"], str(row["depth"])]
        for key in ("prompt_tps", "prefill_tps", "decode_tps"):
            other = base.get(row["depth"], {}).get(key)
            there = key in row
            cells += [f"{row[key]:.1f}" if there else "-", f"x{row[key] / other:.2f}" if there and other else ""]
        report = row.get("report")
        cells.append(format_bytes(report["total_bytes"]) if report else "-")
        cells.append(format_bytes(row["card_bytes"]) if row.get("card_bytes") is not None else "-")
        cells.append("" if row["status"] == "ok" else row["status"])
        lines.append(cells)
    return "\n".join(format_table(lines, "<" + ">" * (len(lines[0]) - 2) + "<"))


def numbers(text: str) -> list[int]:
    """A list such as 32768,65536, ascending."""
    return sorted({int(word) for word in text.split(",")})


def main() -> int:
    """Measure; 0 unless something failed. What is out of time is named and no failure."""
    parser = argparse.ArgumentParser(description="Measure caches on a device, at the shape of an 8B model.")
    parser.add_argument("--device", default="gpu", help="gpu or cpu")
    parser.add_argument("--programs", type=Path, required=True, help="folder of xkv-gpu-bench")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--depths", type=numbers, default=[32768, 65536, 131072])
    parser.add_argument("--caches", type=lambda text: text.split(","), default=[*PLAIN, f"xkv:{RATIO}"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=int, default=240, help="after which nothing more is begun or waited for")
    parser.add_argument("--reps", type=int, default=20, help="of the op")
    parser.add_argument("--copy-mib", type=int, default=2048)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        shape.write_model(model, args.shape, args.layers, shape.N_VOCAB, seed=0)
        shape.write_random_sidecar(model, args.shape, args.layers, min(4, args.layers), 1.5, seed=0)
        op = measure_op(args, model, min(end, time.monotonic() + args.seconds / 3))
        rows = measure(args, model, end)
    result = {
        "device": args.device,
        "shape": args.shape,
        "layers": args.layers,
        "threads": args.threads,
        "rows": rows,
        "op": op,
    }
    (args.results / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    failed = [row for row in (*rows, *op) if row["status"].startswith("failed")]
    for row in failed:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
