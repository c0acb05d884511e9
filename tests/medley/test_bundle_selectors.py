"""Selectors of every kind go through a bundle and come back; a forged one is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley import sealed
from medley.admission import admit
from medley.bundle import read_bundle, selector_tensors, write_bundle
from medley.classifier import Classifier
from medley.errors import BundleError
from medley.levels import GaussianLevel
from medley.manifest import FORMAT
from medley.routed import RoutedModel
from medley.selector import STRICTLY_LESS, TaskSelector
from tests.fakes import LEVEL_KINDS, random_level, tiny_bundle
from tests.models import tiny_backbone

WIDTHS = {"embedding": 6, "stem:mean_std": 8, "block7:cls": 7}
FEATURES = list(WIDTHS)

kinds = st.sampled_from(LEVEL_KINDS)
features = st.sampled_from(FEATURES)


def selector(*levels: tuple[str, str], reference: str | None = None, seed: int = 0) -> TaskSelector:
    """Build one of (kind, feature) levels; a reference has the first level's feature."""
    random = torch.Generator().manual_seed(seed)
    feature = levels[0][1]
    return TaskSelector(
        tuple(
            random_level(kind, f, WIDTHS[f], size=1 + seed % 4, random=random) for kind, f in levels
        ),
        threshold=0.5,
        alpha=0.02,
        reference=()
        if reference is None
        else (random_level(reference, feature, WIDTHS[feature], random=random),),
        margin=None if reference is None else STRICTLY_LESS,
    )


def taps(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {feature: torch.randn(9, F, generator=random) for feature, F in WIDTHS.items()}


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.tuples(kinds, features), min_size=1, max_size=5),
    reference=st.none() | kinds,
    seed=st.integers(0, 99),
)
def test_any_selector_comes_back_from_a_bundle_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    levels: list[tuple[str, str]],
    reference: str | None,
    seed: int,
) -> None:
    ours = selector(*levels, reference=reference, seed=seed)
    path = tmp_path_factory.getbasetemp() / "selector.safetensors"
    write_bundle(*tiny_bundle(selector=ours), path)
    bundle = read_bundle(path)
    theirs = bundle.selector()
    assert bundle.manifest.format == FORMAT
    assert all(a.same(b) for a, b in zip(ours.levels, theirs.levels, strict=True))
    assert all(a.same(b) for a, b in zip(ours.reference, theirs.reference, strict=True))
    assert (theirs.threshold, theirs.alpha, theirs.margin) == (0.5, 0.02, ours.margin)
    assert torch.equal(theirs.scores(taps()), ours.scores(taps()))
    assert torch.equal(theirs.accepted(taps()), ours.accepted(taps()))


def test_the_scale_of_a_gaussian_and_several_levels_of_a_reference_come_back(
    tmp_path: Path,
) -> None:
    random = torch.Generator().manual_seed(3)
    levels = (random_level("gaussian", f, WIDTHS[f], random=random) for f in FEATURES * 2)
    own, *others = (replace(x, scale="linear") for x in levels if isinstance(x, GaussianLevel))
    ours = TaskSelector((own,), math.inf, alpha=None, reference=tuple(others), margin=0.0)
    write_bundle(*tiny_bundle(selector=ours), tmp_path / "b.safetensors")
    theirs = read_bundle(tmp_path / "b.safetensors").selector()
    assert theirs.threshold == math.inf
    assert all(a.same(b) for a, b in zip(others, theirs.reference, strict=True))
    assert torch.equal(theirs.scores(taps()), ours.scores(taps()))
    assert torch.equal(theirs.accepted(taps()), ours.accepted(taps()))


def test_names_of_tensors_are_those_of_the_specification() -> None:
    names = selector_tensors(
        selector(("gaussian", "embedding"), ("prototype", "embedding"), reference="sigmoid")
    )
    assert list(names) == [
        "ddas.0.means",
        "ddas.0.whitening",
        "ddas.1.prototypes",
        *(f"ddas.reference.0.{name}" for name in AUTOENCODER_TENSORS),
    ]


def test_a_level_may_be_stored_in_half_precision(tmp_path: Path) -> None:
    manifest, tensors = tiny_bundle(selector=ALL)
    halved = {n: t.bfloat16() if n.startswith("ddas.") else t for n, t in tensors.items()}
    bundle = write_bundle(manifest, halved, tmp_path / "b.safetensors")
    assert bundle.selector().scores(taps()).isfinite().all()


AUTOENCODER_TENSORS = ("mean", "std", "encoder", "encoder_bias", "decoder", "decoder_bias")
SCALE = {"feature": "embedding", "center": 0.0, "spread": 1.0}

# A selector with a level of each kind and a reference, and what a forger can do to it.
ALL = selector(*((kind, "embedding") for kind in LEVEL_KINDS), reference="autoencoder")
AUTOENCODER, SIGMOID, GAUSSIAN, PROTOTYPE = range(4)


def forged(
    change: Callable[[dict[str, Any]], object] = lambda spec: None,
    spoil: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> bytes:
    manifest, tensors = tiny_bundle(selector=ALL)
    body = json.loads(manifest.model_dump_json(exclude={"seal"}))
    change(body["selector"])
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    spoil(tensors)
    return sealed.pack(json.dumps(body), tensors)


def problems(data: bytes) -> list[str]:
    with pytest.raises(BundleError) as caught:
        read_bundle(data)
    assert caught.value.code == "bundle_invalid"
    return caught.value.problems


def test_the_untouched_selector_of_these_tests_is_valid() -> None:
    read_bundle(forged())


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        (AUTOENCODER, "kind", "exec"),
        (AUTOENCODER, "kind", None),
        (AUTOENCODER, "kind", ["autoencoder"]),
        (AUTOENCODER, "kind", {"a": 1}),
        (AUTOENCODER, "kind", "gaussian"),
        (AUTOENCODER, "output", "tanh"),
        (AUTOENCODER, "output", None),
        (AUTOENCODER, "rank", 3),
        (GAUSSIAN, "classes", 0),
        (GAUSSIAN, "classes", 10**30),
        (GAUSSIAN, "classes", 2.5),
        (GAUSSIAN, "rank", 0),
        (GAUSSIAN, "rank", "5"),
        (GAUSSIAN, "code_size", 3),
        (GAUSSIAN, "output", "linear"),
        (GAUSSIAN, "spread", -0.7),
        (GAUSSIAN, "spread", 0),
        (GAUSSIAN, "center", "0"),
        (GAUSSIAN, "kind", "autoencoder"),
        (PROTOTYPE, "prototypes", 0),
        (PROTOTYPE, "spread", -1),
        (PROTOTYPE, "feature", "alexnet:fc7"),
        (PROTOTYPE, "feature", "embedding\n"),
        (PROTOTYPE, "feature", "block0:mean"),
        (PROTOTYPE, "surprise", 1),
    ],
)
def test_a_level_that_breaks_the_schema_is_named(place: int, field: str, value: object) -> None:
    found = problems(forged(lambda spec: spec["levels"][place].update({field: value})))
    assert all(problem.startswith(f"manifest: selector.levels.{place}") for problem in found)


@pytest.mark.parametrize("field", ["classes", "rank", "width", "center", "spread", "feature"])
def test_a_level_without_one_of_its_fields_is_refused(field: str) -> None:
    (problem,) = problems(forged(lambda spec: spec["levels"][GAUSSIAN].pop(field)))
    assert problem.startswith(f"manifest: selector.levels.{GAUSSIAN}.gaussian.{field}: ")


@pytest.mark.parametrize("levels", [[7], ["gaussian"], [None], [[]], {"0": {}}])
def test_a_level_that_is_no_object_is_refused(levels: object) -> None:
    found = problems(forged(lambda spec: spec.update(levels=levels)))
    assert found[0].startswith("manifest: selector.levels")


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.pop("margin"),
        lambda spec: spec.update(margin=None),
        lambda spec: spec.pop("reference"),
        lambda spec: spec.update(reference=None),
        lambda spec: spec.update(reference=spec["reference"] * 17),
        lambda spec: spec.update(margin="0"),
        lambda spec: spec.update(margin=math.nan),
        lambda spec: spec.update(margin=-math.inf),
        lambda spec: spec.update(reference=[]),
        lambda spec: spec.update(reference="base"),
        lambda spec: spec["reference"][0].update(spread=-1),
        lambda spec: spec["reference"][0].update(kind="zero-shot"),
    ],
)
def test_a_reference_without_its_margin_and_the_other_way_round_is_refused(
    change: Callable[[dict[str, Any]], object],
) -> None:
    (problem,) = problems(forged(change))
    assert problem.startswith("manifest: selector")


@pytest.mark.parametrize(
    ("place", "field", "tensors"),
    [
        (AUTOENCODER, "code_size", {"encoder", "encoder_bias", "decoder"}),
        (GAUSSIAN, "classes", {"means"}),
        (GAUSSIAN, "rank", {"whitening"}),
        (GAUSSIAN, "width", {"means", "whitening"}),
        (PROTOTYPE, "prototypes", {"prototypes"}),
        (PROTOTYPE, "width", {"prototypes"}),
    ],
)
def test_a_size_that_is_not_that_of_the_tensors_is_refused(
    place: int, field: str, tensors: set[str]
) -> None:
    found = problems(forged(lambda spec: spec["levels"][place].update({field: 999_999})))
    named = {problem.split()[1] for problem in found}
    assert named == {f"ddas.{place}.{tensor}" for tensor in tensors}


SELECTOR_TENSORS = sorted(selector_tensors(ALL))


@pytest.mark.parametrize("name", SELECTOR_TENSORS)
def test_a_missing_tensor_of_a_selector_is_named(name: str) -> None:
    assert problems(forged(spoil=lambda t: t.pop(name))) == [f"tensor {name} is missing"]


@pytest.mark.parametrize("name", SELECTOR_TENSORS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_of_a_selector_that_is_not_finite_is_refused(name: str, value: float) -> None:
    found = problems(forged(spoil=lambda t: t[name].view(-1)[-1:].fill_(value)))
    assert f"tensor {name} has values that are not finite" in found


def test_the_tensors_of_another_kind_do_not_do() -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[f"ddas.{GAUSSIAN}.prototypes"] = tensors.pop(f"ddas.{GAUSSIAN}.means")

    assert len(problems(forged(spoil=swap))) >= 2


def test_a_reference_that_the_manifest_does_not_name_is_refused() -> None:
    found = problems(forged(lambda spec: spec.update(reference=[], margin=None)))
    assert len(found) == 6
    assert all(p.startswith("tensor ddas.reference.") and "not expected" in p for p in found)


def test_a_standard_deviation_of_a_reference_must_be_positive_too() -> None:
    (problem,) = problems(forged(spoil=lambda t: t["ddas.reference.0.std"][:1].neg_()))
    assert problem == "tensor ddas.reference.0.std has values that are not positive"


@pytest.mark.parametrize("factor", [0.0, 0.98, 1.02, 1e30])
def test_prototypes_of_another_length_are_refused(factor: float) -> None:
    name = f"ddas.{PROTOTYPE}.prototypes"
    (problem,) = problems(forged(spoil=lambda t: t[name][-1].mul_(factor)))
    assert problem == f"tensor {name} has rows that are not of unit length"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_selector_that_is_read_can_be_built_and_never_fails(data: st.DataObject) -> None:
    # Whatever survives the reader has to be safe for the thread that owns the model.
    place = data.draw(st.sampled_from(["0", "1", "2", "3", "reference"]))
    field = data.draw(
        st.sampled_from(
            ["kind", "output", "scale", "classes", "rank", "prototypes", "center", "feature"]
        )
    )
    value = data.draw(
        st.sampled_from([*LEVEL_KINDS, "linear", "stem:mean_std", "embedding", 1, 3, 5, 6, None])
        | st.floats(allow_nan=False, allow_infinity=False)
    )

    def change(spec: dict[str, Any]) -> None:
        level = spec["reference"][0] if place == "reference" else spec["levels"][int(place)]
        level[field] = value

    try:
        bundle = read_bundle(forged(change))
    except BundleError:
        return
    everywhere = {feature: torch.zeros(4, 6) for feature in FEATURES}
    assert bundle.selector().scores(everywhere).shape == (4,)


# Format 1: a bundle and scores written with the code of that time.

GOLDEN = Path(__file__).parents[1] / "golden"
OLD = GOLDEN / "bundle_format_1.safetensors"


def old_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    file = sealed.unpack(OLD.read_bytes())
    body = json.loads(file.text)
    del body["seal"]
    change(body)
    return sealed.pack(json.dumps(body), file.tensors)


def test_a_bundle_of_format_1_is_read_under_its_own_seal() -> None:
    bundle = read_bundle(OLD)
    assert bundle.manifest.format == 1
    assert bundle.digest == (
        "sha256:eb845bcf4a5a0c61b78c0537ef7d8df4d70db7fcb2574574d3d5fcfe683bda73"
    )
    levels = bundle.manifest.selector.levels
    assert [level.feature for level in levels] == ["stem:mean_std", "block3:mean", "embedding"]
    assert {level.kind for level in levels} == {"autoencoder"}
    assert bundle.selector().reference == ()


def test_the_scores_of_a_bundle_of_format_1_are_what_they_were() -> None:
    recorded = safetensors.torch.load_file(GOLDEN / "bundle_format_1.scores.safetensors")
    expected_B = recorded.pop("scores")
    scores_B = read_bundle(OLD).selector().scores(recorded)
    # Another machine's matrix products may round otherwise; on one machine they are the same bits.
    torch.testing.assert_close(scores_B, expected_B, rtol=1e-6, atol=1e-5)


def test_the_scores_of_a_bundle_of_format_1_are_the_old_formulas_bit_for_bit() -> None:
    recorded = safetensors.torch.load_file(GOLDEN / "bundle_format_1.scores.safetensors")
    bundle = read_bundle(OLD)
    parts: dict[str, Tensor] = {}
    for i, level in enumerate(bundle.manifest.selector.levels):
        mean, std, encoder, encoder_bias, decoder, decoder_bias = (
            bundle.tensors[f"ddas.{i}.{name}"] for name in AUTOENCODER_TENSORS
        )
        z = (recorded[level.feature] - mean) / std
        code = torch.addmm(encoder_bias, z, encoder).relu()
        error = (torch.addmm(decoder_bias, code, decoder) - z).square().mean(-1)
        log_error = error.clamp_min(torch.finfo(torch.float32).tiny).log()
        parts[level.feature] = (log_error - level.center) / level.spread
    expected_B = torch.zeros(8)
    for feature in sorted(parts):
        expected_B += parts[feature]
    assert torch.equal(bundle.selector().scores(recorded), expected_B)


@pytest.mark.parametrize("format", [1, 2])
def test_a_bundle_of_an_older_format_is_admitted_and_answers_as_it_did(format: int) -> None:
    classifier = Classifier(RoutedModel(tiny_backbone(), first_expert_block=1), buckets=(4,))
    bundle = read_bundle(GOLDEN / f"bundle_format_{format}.safetensors")
    assert bundle.manifest.format == format
    assert bundle.prototypes is None
    assert admit(bundle, classifier) in classifier.selectors.tasks


def test_what_was_read_in_format_1_is_written_in_the_present_one(tmp_path: Path) -> None:
    old = read_bundle(OLD)
    new = write_bundle(old.manifest, old.tensors, tmp_path / "b.safetensors")
    assert new.manifest.format == FORMAT == 3
    assert new.digest != old.digest
    assert new.manifest.selector == old.manifest.selector


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["levels"][0].update(kind="autoencoder"),
        lambda spec: spec["levels"][0].update(output="linear"),
        lambda spec: spec["levels"][0].update(output="sigmoid"),
        lambda spec: spec.update(reference=[]),
        lambda spec: spec.update(margin=None),
        lambda spec: spec.update(extractors={}),
        lambda spec: spec["levels"].append(
            {"kind": "prototype", "prototypes": 1, "width": 24} | SCALE
        ),
    ],
)
def test_format_1_has_nothing_of_format_2(change: Callable[[dict[str, Any]], object]) -> None:
    (problem,) = problems(old_with(lambda body: change(body["selector"])))
    assert problem.startswith("manifest: whole: Value error, format 1 has only linear autoencoders")
    read_bundle(old_with(lambda body: None))


def test_a_manifest_that_names_no_format_is_of_the_present_one() -> None:
    assert read_bundle(old_with(lambda body: body.pop("format"))).manifest.format == FORMAT
