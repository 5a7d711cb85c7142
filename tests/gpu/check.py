"""`make test-gpu`: whether a device computes what the reference and the CPU compute. Writes RESULTS/test.json."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shape import write_model, write_random_sidecar
from xkv_gguf.base.divergence import kl_divergence, log_softmax

from .on_device import GROUP_SIZE, SHAPE

# as tests/native/test_full_rank.py: of the largest logit; and how much more than plain flash attention
TOL_F32 = 1e-3
TOL_FLASH = 5.0
# nats, and times f16's own between the devices: the op and stock ops round the same coefficients each in its way
TOL_KLD = 2e-4
TOL_F16 = 1e-2

# small, and through every kernel: what a checker that is a hundred times slower gets through
SANITIZED = (
    "quantized queries 2",
    "more chunks than spans queries 1",
    "quantized, refined where it matters queries 8",
    "quantized queries 9",
    "streams queries 9",
    "plain q8_0 queries 1",
    "plain q8_0 queries 9",
    "exact only queries 70",
)
SANITIZERS = ("memcheck", "racecheck")


@dataclass
class Checks:
    """What was found so far: a line each, and whether it is as it should be."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def note(self, name: str, ok: bool, text: str) -> None:
        """Add a line and print it."""
        self.rows.append({"name": name, "ok": ok, "text": text})
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)


def run_op(checks: Checks, args: argparse.Namespace) -> None:
    """The cases of the op against the reference, and with the checkers of memory and races where they are installed."""
    program = [str(args.programs / "xkv-gpu-check"), "--device", args.device]
    only = [word for text in args.only for word in ("--only", text)]
    out = args.results / "op.json"
    done = subprocess.run([*program, *only, "--json", str(out)], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"ended with status {done.returncode}"]
    checks.note("op against reference", done.returncode == 0, "; ".join(lines[-5:]))
    if args.device == "cpu":
        return
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("note compute-sanitizer is not installed: memory and races are not checked on the card", flush=True)
        checks.rows.append({"name": "compute-sanitizer", "ok": None, "text": "not installed"})
        return
    only = [word for text in SANITIZED for word in ("--only", text)]
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program, *only]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.sanitizer_seconds)
        except subprocess.TimeoutExpired:
            checks.note(tool, False, f"not done after {args.sanitizer_seconds} s")
            continue
        (args.results / f"{tool}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        checks.note(tool, done.returncode == 0, f"status {done.returncode}; {lines[-1]}")


def run_model(device: str, model: Path, folder: Path, sizes: Mapping[str, int]) -> tuple[Any, dict[str, Any]]:
    """The arrays of `on_device` and what ran where; a process for the CPU does not see the cards."""
    out = folder / f"{device}.npz"
    env = dict(os.environ)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.gpu.on_device", device, str(model), str(out), json.dumps(sizes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"on {device}: status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return np.load(out), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def deviation(found: Any, expected: Any) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_full_rank(checks: Checks, found: Any, where: Mapping[str, Any], on_card: bool) -> None:
    """With all directions kept, an xkv cache equals the plain one; all of it on the device."""
    paths = ("prompt", "single", "few", "many")
    flash = max(deviation(found[f"flash {path}"], found[f"plain {path}"]) for path in paths)
    for how in ("op", "stock"):
        worst = max(deviation(found[f"{how} {path}"], found[f"plain {path}"]) for path in paths)
        most = TOL_FLASH * flash + TOL_F32
        text = f"differs from the plain cache by {worst:.2e} of the largest logit, expected at most {most:.2e}"
        checks.note(f"full rank, {how}", worst <= most, text)
        parts = where[how]["parts"]
        there = {name: part for name, part in parts.items() if (name == "CPU") != on_card}
        layers = [sum(part[i] for part in there.values()) for i in range(2)]
        elsewhere = sum(part[2] for name, part in parts.items() if name not in there and "Host" not in name)
        ok = layers[0] > 0 and layers[1] == (layers[0] if how == "op" else 0) and elsewhere == 0
        text = f"{layers[0]} layers, {layers[1]} by the op, {elsewhere} bytes of the cache elsewhere"
        checks.note(f"where it ran, {how}", ok, text)
        splits = [where[name]["splits"] for name in (how, "flash")]
        text = f"the graph is cut {splits[0]} times, a plain cache's {splits[1]}"
        checks.note(f"splits, {how}", splits[0] <= splits[1], text)


def check_greedy(checks: Checks, name: str, found: tuple[Any, Any], expected: tuple[Any, Any], noise: float) -> None:
    """The same text, unless two tokens were as probable as each other within the noise."""
    (tokens, _), (wanted, logits) = found, expected
    same = int(np.argmin(tokens == wanted)) if (tokens != wanted).any() else len(wanted)
    text = f"{same} of {len(wanted)} greedy tokens are the same"
    ok = same == len(wanted)
    if not ok:
        margin = float(logits[same][wanted[same]] - logits[same][tokens[same]]) / float(np.abs(logits).max())
        ok = margin <= 2 * noise
        text += f"; the next two are {margin:.2e} of the largest logit apart, noise is {noise:.2e}"
    checks.note(name, ok, text)


def kld(found: Any, expected: Any) -> float:
    """Mean divergence of next-token distributions, in nats."""
    return float(np.mean(kl_divergence(log_softmax(expected), log_softmax(found))))


def check_ratio(checks: Checks, found: Any, cpu: Any) -> None:
    """What a compressed cache says: by the op as by stock ops, and on the device as on the CPU."""
    most = TOL_KLD + TOL_FLASH * kld(found["f16 at ratio"], cpu["f16 at ratio"])
    for name, one, other in (
        ("op and stock ops, both on the device", found["op at ratio"], found["stock at ratio"]),
        ("op on the device and on the CPU", found["op at ratio"], cpu["op at ratio"]),
    ):
        value = kld(one, other)
        checks.note(f"7x: {name}", value <= most, f"KLD {value:.2e}, expected at most {most:.2e}")
    value = kld(found["f16 at ratio"], cpu["f16 at ratio"])
    checks.note("f16 on the device and on the CPU", value <= TOL_F16, f"KLD {value:.2e}, expected at most {TOL_F16}")
    lossy = kld(found["op at ratio"], found["f16 at ratio"])
    checks.note(
        "7x: tokens are compressed", lossy > 10 * most, f"KLD {lossy:.2e} from f16, expected above {10 * most:.2e}"
    )
    stored = [int(some[f"{how} stored"]) for some in (found, cpu) for how in ("op", "stock")]
    checks.note("7x: tokens stored", len(set(stored)) == 1 and stored[0] > 0, str(stored))


def main() -> int:
    """Run all checks; 0 when all are as they should be."""
    parser = argparse.ArgumentParser(description="Check XKV_ATTN and xkv caches on a device against the CPU.")
    parser.add_argument("--device", default="gpu", help="gpu or cpu")
    parser.add_argument("--programs", type=Path, required=True, help="folder of xkv-gpu-check")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--tokens", type=int, default=1900, help="of the prompt at 7x")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases of the op with this in them")
    parser.add_argument("--sanitizer-seconds", type=int, default=75)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    checks = Checks()
    run_op(checks, args)
    n_vocab = 512
    sizes = {"n_layer": args.layers, "n_vocab": n_vocab, "threads": args.threads, "n_tokens": args.tokens}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model.gguf"
        write_model(model, SHAPE, args.layers, n_vocab, seed=0, weights="f32")
        write_random_sidecar(model, SHAPE, args.layers, min(GROUP_SIZE, args.layers), 1.5, seed=0)
        try:
            found, where = run_model(args.device, model, folder, sizes)
            cpu = found if args.device == "cpu" else run_model("cpu", model, folder, sizes)[0]
        except RuntimeError as error:
            checks.note("models", False, str(error))
        else:
            check_full_rank(checks, found, where, args.device != "cpu")
            noise = TOL_F32 + deviation(found["flash single"], found["plain single"])
            noise += deviation(found["plain single"], cpu["plain single"])
            pairs = {
                f"{cache} on {place}": (some[f"{cache} greedy"], some[f"{cache} greedy logits"])
                for place, some in (("device", found), ("cpu", cpu))
                for cache in ("plain", "op")
            }
            for other in ("plain on device", "plain on cpu", "op on cpu"):
                check_greedy(
                    checks, f"text of the op on the device, and {other}", pairs["op on device"], pairs[other], noise
                )
            check_ratio(checks, found, cpu)
    failed = [row["name"] for row in checks.rows if row["ok"] is False]
    result = {"device": args.device, "shape": SHAPE, **sizes, "failed": len(failed), "checks": checks.rows}
    (args.results / "test.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(checks.rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
