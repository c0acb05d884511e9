from collections.abc import Sequence

import torch

from trainer.pretrain.examination import Sheet, ask, class_features

AXES = torch.eye(8)
NAMES = [f"thing {index}" for index in range(8)]


def test_right_answers_count() -> None:
    result = ask("toy", "shipped", Sheet(AXES[:2], NAMES[:2]), AXES, NAMES)
    assert (result.images, result.classes, result.top1, result.top5) == (2, 8, 100.0, 100.0)


def test_a_name_in_second_place_is_in_the_top_five_only() -> None:
    image = torch.nn.functional.normalize(2 * AXES[:1] + AXES[1:2], dim=-1)
    result = ask("toy", "shipped", Sheet(image, [NAMES[1]]), AXES, NAMES)
    assert (result.top1, result.top5) == (0.0, 100.0)


def test_no_images_is_no_success() -> None:
    assert ask("toy", "shipped", Sheet(AXES[:0], []), AXES, NAMES).top1 == 0.0


def test_a_sheet_can_be_narrowed_by_name() -> None:
    part = Sheet(AXES, NAMES).only(lambda name: name.endswith(("1", "3")))
    assert part.names == ["thing 1", "thing 3"]
    assert torch.equal(part.features, AXES[[1, 3]])


def test_classes_are_the_name_and_its_caption() -> None:
    asked: list[str] = []

    def read(texts: Sequence[str]) -> torch.Tensor:
        asked.extend(texts)
        return AXES[: len(texts)]

    assert torch.equal(class_features(read, ["cat"]), AXES[:1])
    assert asked == ["cat", "an icon of a cat"]
