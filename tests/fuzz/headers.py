"""Damaged GGUF headers and sidecars for the Python readers: `make fuzz`, and some of it in a test.

A reader raises its own error, in one line and in time, or what it returns makes sense.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.small_sidecar import small_arrays, small_info
from tests.tiny import weights, write_tiny
from xkv_gguf.errors import SidecarError, SidecarVersionError
from xkv_gguf.model.gguf_read import GgufFormatError, _parse
from xkv_gguf.sidecar.read import DIGEST_AT, read_sidecar
from xkv_gguf.sidecar.write import write_sidecar

SECONDS = 20.0
"""Of one input, on a machine that does other things as well."""
NUMBERS = (
    0,
    1,
    2,
    4,
    8,
    9,
    12,
    31,
    32,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


def change(data: bytes, rng: random.Random, head: int) -> bytes:
    """A few changes, most of them in the first `head` bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(out) if rng.random() < 0.1 else min(head, len(out))))
        kind = rng.randrange(8)
        if kind <= 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and out:
            out[at] = rng.randrange(256)
        elif kind in (3, 4):
            size = 4 if kind == 3 else 8
            value = rng.choice((*NUMBERS, len(out), len(out) // 4, rng.getrandbits(64))) & ((1 << 8 * size) - 1)
            out[at : at + size] = value.to_bytes(size, "little")
        elif kind == 5:
            del out[at : at + rng.randrange(40)]
        elif kind == 6:
            place = rng.randrange(max(1, min(head, len(out))))
            out[place:place] = out[at : at + rng.randrange(40)]
        elif rng.random() < 0.1:
            del out[at:]
    return bytes(out)


def check_header(data: bytes) -> bool:
    """Whether it is taken."""
    try:
        header = _parse(Path("fuzz.gguf"), data)
    except GgufFormatError as error:
        assert "\n" not in str(error), error
        return False
    assert all(0 <= t.offset <= t.offset + t.n_bytes <= len(data) for t in header.tensors.values())
    assert all(1 <= len(t.shape) <= 4 for t in header.tensors.values())
    return True


def sidecar_checker(folder: Path) -> Callable[[bytes], bool]:
    """A check for sidecars, with a digest that is right, in a file in `folder`."""
    path = folder / "fuzz.xkv.gguf"

    def check(data: bytes) -> bool:
        if len(data) > DIGEST_AT + 64:
            blank = data[:DIGEST_AT] + b"0" * 64 + data[DIGEST_AT + 64 :]
            data = blank[:DIGEST_AT] + hashlib.sha256(blank).hexdigest().encode() + blank[DIGEST_AT + 64 :]
        path.write_bytes(data)
        try:
            sidecar = read_sidecar(path)
        except (SidecarError, SidecarVersionError) as error:
            assert "\n" not in str(error), error
            return False
        layers = [layer for group in sidecar.info.groups for layer in group.layers]
        assert len(set(layers)) == len(layers) > 0
        sidecar.statistics()
        return True

    return check


def run(name: str, data: bytes, check: Callable[[bytes], bool], count: int, seed: int) -> str:
    """Check `count` inputs; returns a line that says what came of them."""
    rng = random.Random(seed)
    head = struct.unpack_from("<Q", data, 8)[0] * 64 + 2048
    assert check(data), f"{name}: the undamaged file is refused"
    taken, slowest, began = 0, 0.0, time.monotonic()
    for i in range(count):
        bad = change(data, rng, head)
        start = time.monotonic()
        try:
            taken += check(bad)
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}, input {i}") if hasattr(error, "add_note") else None
            raise
        slowest = max(slowest, time.monotonic() - start)
        assert slowest < SECONDS, f"{name}, seed {seed}, input {i}: takes {slowest:.1f} s"
    seconds = time.monotonic() - began
    return f"{count} {name}: {taken} taken, the rest refused; {seconds:.0f} s, the slowest {slowest:.3f} s"


def main(argv: list[str] | None = None) -> int:
    """Check headers, and a tenth as many sidecars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "tiny.gguf", weights(0))
        info = small_info()
        write_sidecar(folder / "small.xkv.gguf", info, small_arrays(info))
        header = (folder / "tiny.gguf").read_bytes()
        sidecar = (folder / "small.xkv.gguf").read_bytes()
        print(run("model headers", header, check_header, args.count, args.seed), flush=True)
        print(run("sidecars", sidecar, sidecar_checker(folder), args.count // 10, args.seed), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
