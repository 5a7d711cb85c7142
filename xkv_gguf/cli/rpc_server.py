"""``xkv-gguf rpc-server``: this machine's devices for models that run on another one."""

from __future__ import annotations

import argparse
import signal
import sys

from ..errors import OptionError
from ..runtime import rpc
from ..runtime.threads import default_threads
from ._args import check_counts

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50052
LOOPBACK = ("127.0.0.1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--host", default=DEFAULT_HOST, metavar="HOST", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, metavar="PORT", help="(default: %(default)s)")
    parser.add_argument(
        "--devices", metavar="LIST", help="devices, with commas between (default: the GPUs, or the CPU)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: all that may be used)")


def run(args: argparse.Namespace) -> int:
    """Serve until the process is ended."""
    check_counts(args, "threads")
    try:
        (endpoint,) = rpc.parse_servers([f"{args.host}:{args.port}"])
    except OptionError as error:
        raise OptionError(f"--host {args.host} --port {args.port}: expected HOST and a port from 1 to 65535") from error
    if args.host not in LOOPBACK:
        print(
            f"note: whoever reaches {endpoint} can read, change and end what runs here; use it in a network that you "
            "trust",
            file=sys.stderr,
        )
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the library does not return to Python
    rpc.serve(endpoint, args.devices, args.threads or default_threads())
    return 0
