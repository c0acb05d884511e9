"""The small suite: nine tasks built from pinned public packages, to measure what learning does.

Images are rebuilt on the machine that wants them and cached; none is committed. The canary that no
task may touch (names of openmoji, held-out concepts) is not here: it is part of the base's recipe.
"""

from trainer.suite.cards import CARDS, problems
from trainer.suite.recipes import TASKS, cached_file, licences, load_task

__all__ = ["CARDS", "TASKS", "cached_file", "licences", "load_task", "problems"]
