"""``xkv-gguf doctor``: what there is to run on, and where attention falls back to stock ops, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .. import __version__
from ..base.text import format_bytes, format_table
from ..runtime import loader, rpc
from ..runtime.devices import cpu_features, devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--rpc", metavar="HOST:PORT,...", help="servers to look at as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the devices; 0 when the library loads and all servers answer."""
    library = loader.load()
    if args.rpc is not None:
        rpc.connect(rpc.parse_servers(args.rpc))
    found = devices()
    features = cpu_features()
    if args.json:
        print(
            json.dumps(
                {
                    "version": __version__,
                    "build_id": library.build_id,
                    "cpu_features": features,
                    "devices": [{**asdict(device), "attention": device.attention} for device in found],
                }
            )
        )
        return 0
    print(f"xkv-gguf {__version__}, library {library.path} (build {library.build_id})")
    print(f"CPU features in use: {features or 'none'}")
    rows = [["device", "kind", "memory", "attention of an xkv cache", ""]]
    for device in found:
        rows.append([device.name, device.kind, format_bytes(device.total), device.attention, device.description])
    print("\n".join(format_table(rows, "<<><<")))
    return 0
