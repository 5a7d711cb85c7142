"""The verb `inspect`: what is in a sidecar or a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("file", metavar="FILE", help="sidecar or GGUF model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="PICTURE", help="draw the spectra into a .png, .svg or .pdf file")


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Raises
    ------
    XkvError
        The file cannot be read, or the picture cannot be drawn.
    """
    from ..convert.describe import describe, is_sidecar
    from ..convert.sidecar import read_sidecar
    from ..errors import OptionError

    path = Path(args.file)
    if args.plot is not None and not is_sidecar(path):
        raise OptionError(f"--plot draws the spectra of a sidecar, {path} is none")
    found = describe(path)
    if args.plot is not None:
        from ..convert.plot import plot_spectra

        plot_spectra(read_sidecar(path), Path(args.plot))
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0


def lines(found: dict[str, Any]) -> Iterable[str]:
    """A description as text."""
    model = found["model"]
    if found["kind"] == "sidecar":
        calibration = found["calibration"]
        source = "text of its own" if calibration["source"] == "self" else "files"
        yield f"sidecar     {found['path']} ({mib(found['bytes'])}, format version {found['format_version']})"
        yield f"model       {model['architecture']} {model['name']!r}, fingerprint {model['fingerprint'][:16]}"
        yield (
            f"calibrated  on {calibration['tokens']} tokens of {source}, sequences of {calibration['n_ctx']}, "
            f"seed {calibration['seed']}"
        )
        planned = f"planned for {found['ratio_planned']:g}" if found["ratio_planned"] else "ranks given"
        yield (
            f"plan        ratio {found['ratio']:.2f} to f16 with {found['caches']['xkv']['type_coef']} coefficients "
            f"({planned}), frame {found['frame']}, sinks {found['n_sink']}"
        )
        yield ""
        yield from table(
            ("layers", "K rank", "of", "energy kept", "V rank", "of", "energy kept"),
            [
                (
                    f"{g['layers'][0]}-{g['layers'][1]}",
                    str(g["rank_k"]),
                    str(g["dim_k"]),
                    f"{g['energy_k']:.2%}",
                    str(g["rank_v"]),
                    str(g["dim_v"]),
                    f"{g['energy_v']:.2%}",
                )
                for g in found["groups"]
            ],
        )
    else:
        yield f"model       {found['path']} ({mib(found['bytes'])})"
        yield f"            {model['architecture']} {model['name']!r}, {found['layers']} layers"
        yield f"sidecar     {found['sidecar'] or 'none yet; make one with `xkv-gguf convert`'}"
    yield ""
    caches = found["caches"]
    contexts = list(caches["f16"]["totals"])
    rows = []
    for name, cache in caches.items():
        row = [name, f"{cache['bytes_per_token']:.0f}"]
        for n in contexts:
            total = cache["totals"][n]
            row.append(f"{mib(total)} ({caches['f16']['totals'][n] / total:.2f}x)")
        rows.append(row)
    yield from table(("cache", "bytes/token", *(f"{int(n) // 1024}k" for n in contexts)), rows)


def mib(n: int) -> str:
    """Bytes for people."""
    return f"{n / 2**20:.1f} MiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Columns aligned to the right, the first one to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
