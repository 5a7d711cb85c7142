"""Sequences of operations by seed; the long form is ``python -m tests.property.run``.

make test-property [COUNT=10000] [SEED=0]
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import machine
from .options import FAMILIES
from .pair import Tally
from .rig import close_rig, rig

BLOCK = 50
"""Sequences of a seed."""


def run(family: str, number: int, count: int, few: bool = False, shrink: bool = True, n_step: int = 20) -> None:
    """Run the sequences of a seed; raises AssertionError with the shortest one that fails."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    how = settings(
        max_examples=count,
        stateful_step_count=n_step,
        phases=phases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    one = machine(family, few)
    seed(number)(one)
    run_state_machine_as_test(one, settings=how)


def table(tally: Tally) -> str:
    """Operations and refusals, most frequent ones first."""
    rows = [f"largest deviation: {tally.worst:.2f} of the tolerance"]
    for title, counts in (("done", tally.done), ("refused", tally.refusals)):
        rows.append(f"{title}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="sequences over all families (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one: what a run that was stopped printed last")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    args = parser.parse_args()
    families = args.family or list(FAMILIES)
    n_block = -(-args.count // BLOCK)
    failed = []
    for number in range(args.seed, args.seed + n_block):
        family = families[number % len(families)]
        start = time.monotonic()
        print(f"seed {number} of {args.seed + n_block}: {family}", end=" ", flush=True)
        try:
            run(family, number, BLOCK)
            print(f"{time.monotonic() - start:.1f} s", flush=True)
        except Exception:
            failed.append(number)
            print("FAILED", flush=True)
            traceback.print_exc()
    print(table(rig().tally))
    close_rig()
    if failed:
        print(f"seeds that failed: {failed}; one again: --seed {failed[0]} --count {BLOCK}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
