"""All tasks by name."""

from __future__ import annotations

from ...base.text import closest
from ...errors import OptionError
from .task import Task
from .tasks_niah import niah_tasks
from .tasks_vt import vt_task
from .tasks_words import words_tasks

MULTITURN = "multiturn"
_NIAH = {task.name: task for task in niah_tasks()}
_LAST = _NIAH.pop(MULTITURN)
TASKS: dict[str, Task] = {**_NIAH, **{task.name: task for task in (vt_task(), *words_tasks(), _LAST)}}


def parse_tasks(text: str) -> list[Task]:
    """Read a list such as ``niah_single_1,vt``; ``all`` stands for every task.

    Raises
    ------
    OptionError
        A task is unknown or given twice.
    """
    if text.strip() == "all":
        return list(TASKS.values())
    names = [name.strip() for name in text.split(",")]
    for place, name in enumerate(names):
        if name not in TASKS:
            raise OptionError(f"--tasks: {name!r} is unknown{closest(name, TASKS)}; expected all or {', '.join(TASKS)}")
        if name in names[:place]:
            raise OptionError(f"--tasks: {name!r} is given twice")
    return [TASKS[name] for name in names]
