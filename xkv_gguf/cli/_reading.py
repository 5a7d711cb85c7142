"""A progress bar while a long prompt is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from ..llama import Llama


@contextmanager
def reading(llm: Llama, then: Callable[[], None] | None = None) -> Iterator[None]:
    """Draw a bar on the terminal while the model reads more than a batch, and remove it afterwards.

    `then` is called once, when the prompt was read.
    """
    bar: tqdm[None] | None = None

    def show(n_done: int, n_all: int) -> None:
        nonlocal bar, then
        if bar is None and n_done < n_all:
            bar = tqdm(total=n_all, initial=n_done, desc="reading", unit="tok", leave=False, disable=None)
        if bar is not None:
            bar.update(n_done - bar.n)
            if n_done == n_all:
                bar.close()
                bar = None
        if then is not None and n_done == n_all:
            call, then = then, None
            call()

    llm.on_eval = show
    try:
        yield
    finally:
        llm.on_eval = None
        if bar is not None:
            bar.close()
