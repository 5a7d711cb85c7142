"""What is kept of a conversion that may be interrupted: text that the model wrote, and measured divergences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xkv_gguf._partial import Partial, part_key


@dataclass(frozen=True)
class Kept:
    """Parts by what they are.

    Attributes
    ----------
    partial : Partial
    basis : mapping
        Plain values that all parts depend on: model, build, settings.
    """

    partial: Partial
    basis: Mapping[str, Any]

    def get(self, **what: Any) -> Any:
        """A part that is finished, or None."""
        return self.partial.get(part_key(**self.basis, **what))

    def put(self, part: Any, **what: Any) -> None:
        """Keep a part."""
        self.partial.put(part_key(**self.basis, **what), part)
