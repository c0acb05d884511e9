"""The MTIL suite: eleven public data sets in folders that you bring. Nothing is downloaded.

Which folders, from whom, and under which terms: docs/data.md.
"""

from trainer.mtil.cards import CARDS, ORDERS, TASKS
from trainer.mtil.check import load_task, problems
from trainer.mtil.reading import home_of

__all__ = ["CARDS", "ORDERS", "TASKS", "home_of", "load_task", "problems"]
