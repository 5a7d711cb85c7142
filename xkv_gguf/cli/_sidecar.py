"""What verbs with a list of caches share: the sidecar of those that name none."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import OptionError
from ..lab.cache_spec import CacheSpec


def shared_sidecar(model: Path, specs: Sequence[CacheSpec], args: argparse.Namespace) -> str | None:
    """The sidecar of the caches that want one, ``args.sidecar`` or the model's; made here when there is none.

    Returns
    -------
    str or None
        None where no cache wants it.

    Raises
    ------
    OptionError
        One is given, and no cache takes it.
    XkvError
        It cannot be used, or not be made.
    """
    from ..convert.pipeline import ensure_sidecar

    if not any(spec.wants_sidecar for spec in specs):
        if args.sidecar is not None:
            names = ", ".join(spec.name for spec in specs)
            raise OptionError(f"--sidecar: {args.sidecar}, but none of the caches {names} takes it; leave it out")
        return None
    return str(ensure_sidecar(model, args.sidecar, threads=args.threads))


def with_sidecar(spec: CacheSpec, sidecar: str | None) -> CacheSpec:
    """The same cache, with the sidecar if it wants one."""
    if sidecar is None or not spec.wants_sidecar:
        return spec
    return replace(spec, options={**spec.options, "sidecar": sidecar})
