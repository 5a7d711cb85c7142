"""The command line ``xkv-gguf``: one module per verb, imported when it is called.

A verb's module has ``add_arguments(parser)`` and ``run(args) -> int``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..errors import OptionError, XkvError

PROGRAM = "xkv-gguf"
VERBS = {
    "convert": "calibrate a model and write its sidecar",
    "inspect": "show what is in a sidecar or model",
    "fit": "tell which caches and contexts fit into a memory",
    "run": "answer one prompt",
    "chat": "chat in the terminal",
    "bench": "measure speed and memory of caches side by side",
    "eval": "score caches against f16 on texts: divergence, perplexity, bytes",
    "ruler": "score caches on the RULER tasks",
    "doctor": "show which devices there are, and what an xkv cache runs on",
    "rpc-server": "lend this machine's devices to models that run on another one",
}
EXIT_ERROR = 1
EXIT_INTERRUPT = 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that they are printed like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below its usage lines."""
        raise OptionError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, 1 after an error (one line on standard error), 130 after Ctrl-C.
    """
    _take_any_text()
    warnings.showwarning = _note
    try:
        args, unknown = build_parser(sys.argv[1:] if argv is None else argv).parse_known_args(argv)
        if unknown:
            page = " ".join(filter(None, (PROGRAM, args.verb, "--help")))
            raise OptionError(f"unrecognized arguments: {' '.join(unknown)} (see {page})")
        if args.verb is None:
            raise OptionError(f"no verb given, expected one of {', '.join(VERBS)} (see {PROGRAM} --help)")
        status: int = verb_module(args.verb).run(args)
        sys.stdout.flush()
    except XkvError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # the reader of a pipe went away; Python's own flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPT
    return status


def _take_any_text() -> None:
    """Replace what is no text in the stream's encoding, or cannot be shown in it: a lost letter, not a lost chat."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning in one line."""
    print(f"{PROGRAM}: note: {' '.join(str(message).split())}", file=sys.stderr)


def build_parser(argv: Sequence[str]) -> Parser:
    """Parser for a command line: only the verb that `argv` names is imported."""
    parser = Parser(prog=PROGRAM, description="GGUF models on a cross-layer low-rank KV cache.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    named = next((word for word in argv if not word.startswith("-")), None)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        if verb == named:
            verb_module(verb).add_arguments(sub)
    return parser


def verb_module(verb: str) -> ModuleType:
    """Import the module of a verb."""
    return importlib.import_module(f".{verb.replace('-', '_')}", __name__)


def _fail(message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR
