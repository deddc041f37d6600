"""Synthetic tasks with known answers, and the metrics of a compressor's quality."""

from condense_core.tasks.facts import KINDS, Fact, draw_facts
from condense_core.tasks.generators import TASKS, Task, TaskConfig, Turn, make_task, make_tasks
from condense_core.tasks.metrics import contained, exact_match, recovered, token_f1
from condense_core.tasks.sources import ListSource, ProseWriter, TextSource, open_source
from condense_core.tasks.wording import WORDINGS, draw_varied_facts, draw_worded_facts

__all__ = [
    "KINDS",
    "TASKS",
    "WORDINGS",
    "Fact",
    "ListSource",
    "ProseWriter",
    "Task",
    "TaskConfig",
    "TextSource",
    "Turn",
    "contained",
    "draw_facts",
    "draw_varied_facts",
    "draw_worded_facts",
    "exact_match",
    "make_task",
    "make_tasks",
    "open_source",
    "recovered",
    "token_f1",
]
