"""The verb `convert`: calibrate a model and write its sidecar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

from ..base.text import format_bytes
from ..convert.hf import OUTTYPES
from ..convert.settings import (
    AUTO_SIZES,
    BASIS_TYPES,
    N_SCORE,
    THOROUGH_SCORE,
    THOROUGH_TOKENS,
    TOKENS,
    WEIGH,
    Settings,
)
from ..plan.groups import FRAME, FRAMES, GROUP_SIZE, MAX_DIM, WIDE_FRAME, WIDE_HEAD
from ..plan.size_target import DEFAULT_TARGET, one_target
from ..plan.sizes import PLAN_CTX
from ._args import add_size, model_path, size_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="GGUF file or Hugging Face folder (default: the demo model)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="sidecar to write (default: MODEL.xkv.gguf)")
    parser.add_argument(
        "--force", action="store_true", help="replace the sidecar of another model, too; what is no sidecar never is"
    )
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--group-size",
        type=_group_size,
        metavar="N",
        help=f"most layers that share coefficients, or auto for the best of {', '.join(map(str, AUTO_SIZES))} "
        f"(default: {GROUP_SIZE}, fewer where a group would have more than {MAX_DIM} numbers per token)",
    )
    plan.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help=f"context in tokens that the cache size is meant for (default: {PLAN_CTX}, at most the model's own)",
    )
    plan.add_argument(
        "--frame",
        type=int,
        metavar="C",
        help=f"tokens per chunk: {', '.join(map(str, FRAMES))} (default: {FRAME}, {WIDE_FRAME} where heads have "
        f"more than {WIDE_HEAD} numbers)",
    )
    plan.add_argument(
        "--basis-type",
        default="f16",
        metavar="TYPE",
        help=f"type of the bases in the file: {', '.join(BASIS_TYPES)} (default: %(default)s)",
    )
    plan.add_argument(
        "--weigh",
        choices=WEIGH,
        help="what is weighed by what its loss costs: groups of layers, layers one by one, which takes longer and "
        f"loses less, or none, which is quicker and loses more (default: {WEIGH[0]})",
    )
    plan.add_argument(
        "--thorough",
        action="store_true",
        help=f"{THOROUGH_TOKENS} calibration tokens, layers weighed one by one, and twice as much text scored for it: "
        "takes several times as long and loses less",
    )
    add_size(parser, f"it is recorded, and can be chosen anew in use (default: {DEFAULT_TARGET})")
    text = parser.add_argument_group("calibration text")
    text.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="plain text files (default: texts of the package, and text by the model where they are too few)",
    )
    text.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"calibration tokens, about (default: {TOKENS}, more for wide groups)",
    )
    text.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same bytes (default: %(default)s)")
    parser.add_argument(
        "--outtype",
        metavar="TYPE",
        help=f"type of the GGUF made from a Hugging Face folder: {', '.join(OUTTYPES)} (default: f16)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all that may be used)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and the file's name alone")


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Raises
    ------
    XkvError
        See `convert.pipeline.convert` and `convert.hf.convert_folder`.
    """
    from ..base.files import check_writable
    from ..convert.hf import check_folder, convert_folder, gguf_path
    from ..convert.pipeline import convert
    from ..errors import OptionError
    from ..sidecar.info import sidecar_beside

    settings = Settings(
        group_size=args.group_size,
        target=one_target(size_values(args)) or DEFAULT_TARGET,
        n_ctx=args.n_ctx,
        frame=args.frame,
        data=tuple(map(Path, args.data)),
        tokens=args.tokens if args.tokens is not None else THOROUGH_TOKENS if args.thorough else None,
        seed=args.seed,
        basis_type=args.basis_type,
        weigh=args.weigh if args.weigh is not None else "layers" if args.thorough else WEIGH[0],
        n_score=THOROUGH_SCORE if args.thorough else N_SCORE,
        **({} if args.threads is None else {"threads": args.threads}),
    )
    model = Path(model_path(args))
    out = Path(args.output) if args.output is not None else None
    if model.is_dir():
        folder, model = model, gguf_path(model, out, args.outtype or "f16")
        check_folder(folder)
        check_writable(out if out is not None else sidecar_beside(model))
        if not args.quiet:
            print(f"{folder}: converting to {model}", file=sys.stderr)
        convert_folder(folder, model, args.outtype or "f16")
    elif args.outtype is not None:
        raise OptionError(f"--outtype is for Hugging Face folders, {model} is not a folder")
    done = convert(model, out, settings, show_progress=not args.quiet, force=args.force)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if not args.quiet:
        print(planned(model, done.path), file=sys.stderr)
    print(done.path)
    return 0


def planned(model: Path, path: Path) -> str:
    """What the sidecar at `path` makes of the model's cache."""
    from ..describe import plan_of
    from ..plan.sizes import known_shape
    from ..runtime.shape import find_shape
    from ..sidecar.read import read_sidecar

    sidecar = read_sidecar(path)
    info = sidecar.info
    shape = known_shape(find_shape(model), info.embd_k, info.embd_v)
    plan = plan_of(sidecar, shape, info.target, info.n_ctx)
    return f"{info.target} at n_ctx {info.n_ctx}: {format_bytes(plan.total_bytes)}, {plan.ratio:.2f}x smaller than f16"


def _group_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number or auto") from error
