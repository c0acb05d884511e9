"""The methods: what a task's learner trains, and how it turns images and prompts into features.

They share one loop (`trainer/training.py`) and differ in a `Learner`.
"""

from collections.abc import Sequence

from medley.backbone import Backbone
from medley.errors import DataError
from trainer.methods.finetune import Finetune
from trainer.methods.learner import Learner, ParameterCounts
from trainer.methods.lora import Lora
from trainer.methods.moe_adapter import FrozenExperts, MoeAdapter
from trainer.methods.own_towers import OwnTowers
from trainer.settings import TrainSettings

__all__ = [
    "Finetune",
    "FrozenExperts",
    "Learner",
    "Lora",
    "MoeAdapter",
    "OwnTowers",
    "ParameterCounts",
    "make_learner",
]


def make_learner(
    backbone: Backbone,
    class_prompts: Sequence[str],
    settings: TrainSettings,
    frozen: FrozenExperts,
) -> Learner:
    """Make the learner of `settings.method`, untrained: it computes what the backbone computes.

    Args:
        backbone: stays as it is.
        class_prompts: what the steps of the loop are to tell apart.
        settings: of the run.
        frozen: experts of earlier tasks, which only `moe_adapter` can use.

    Raises:
        DataError: the settings do not suit the backbone, or the method cannot use earlier experts.
    """
    if settings.method == "moe_adapter":
        return MoeAdapter(backbone, class_prompts, settings, frozen)
    if frozen.vision or frozen.text:
        raise DataError(f"{settings.method} cannot use experts of earlier tasks", code="settings")
    learner = {"finetune": Finetune, "lora": Lora}[settings.method]
    return learner(backbone, class_prompts, settings)
