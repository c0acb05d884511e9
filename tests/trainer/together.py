"""Learns several tiny tasks; started once by a test, and as processes of a team by torchrun."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from medley.errors import DataError
from tests.models import tiny_backbone
from tests.trainer.test_training import LABEL, SETTINGS, Watch
from tests.trainer.tiny import pictures
from trainer.datasets import ImageSet
from trainer.distributed import Team, joined
from trainer.run import Outcome, learn
from trainer.settings import TrainSettings

BASE = replace(SETTINGS, num_experts=4, iterations=12)


@dataclass(frozen=True)
class Run:
    """Something to learn."""

    settings: TrainSettings
    per_class: int = 20
    resume: bool = False

    @property
    def images(self) -> ImageSet:
        """Of three colours."""
        return pictures(["red", "green", "blue"], self.per_class)


# 33 images to learn from: an epoch's last batch of 8 has one, so that somebody has none.
ODD = replace(BASE, batch_size=8)
RANKS = replace(BASE, bottleneck=16, redundancy_weight=0.5)  # two groups of eight
RUNS = {
    "cached": Run(BASE),
    "last batch of one": Run(replace(ODD, hold_out=0.3), per_class=16),
    "each image once": Run(replace(BASE, iterations=3)),
    "balanced": Run(replace(BASE, balance=0.1, num_experts=5)),
    "counted": Run(replace(BASE, freeze="count", augmented_copies=0)),
    "correlated": Run(replace(RANKS, redundancy="feature_correlation")),
    "cosines": Run(replace(RANKS, redundancy="output_cosine", batch_size=8, iterations=6)),
    "lora": Run(replace(BASE, method="lora")),
    "few shots": Run(replace(BASE, shots=5)),
    "resumed": Run(BASE, resume=True),
}


def learnt(name: str, folder: Path, team: Team) -> Outcome:
    """Learn one of the tasks into a folder."""
    run = RUNS[name]
    return learn(
        tiny_backbone(),
        run.images,
        run.settings,
        label=LABEL,
        folder=folder,
        resume=run.resume,
        watcher=Watch(),
        team=team,
    )


def main(folder: Path) -> None:
    """Learn all tasks in a team, and write down which bundles its processes ended with."""
    with joined("cpu") as team:
        for name in RUNS:
            with team.place(folder / name) as place:
                digests = team.pooled([learnt(name, place, team).bundle.digest])
                (place / "digests.json").write_text(json.dumps(digests))
        said = team.pooled([_disagreed(team)])
        if team.is_first:
            (folder / "disagreed.json").write_text(json.dumps(said))


def _disagreed(team: Team) -> str:
    try:
        team.agree(f"only process {team.rank} has this")
    except DataError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
