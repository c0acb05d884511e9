"""Damaged, forged and foreign files: each is refused with a BundleError, and nothing else happens.

A forger can seal what he forged, so most files here carry a right seal.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from medley import sealed
from medley.bundle import read_bundle
from medley.errors import BundleError
from tests.fakes import tiny_bundle

SEAL_START, SEAL_END = 47, 111


def valid() -> bytes:
    manifest, tensors = tiny_bundle()
    return sealed.pack(manifest.model_dump_json(exclude={"seal"}), tensors)


VALID = valid()
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


def refusal(data: bytes) -> BundleError:
    with pytest.raises(BundleError) as caught:
        read_bundle(data)
    assert caught.value.problems
    return caught.value


def resealed(data: bytes) -> bytes:
    zeroed = data[:SEAL_START] + b"0" * 64 + data[SEAL_END:]
    seal = hashlib.sha256(zeroed).hexdigest().encode()
    return data[:SEAL_START] + seal + data[SEAL_END:]


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def with_raw_header(header: bytes, payload: bytes = VALID[HEADER_END:]) -> bytes:
    return resealed(struct.pack("<Q", len(header)) + header + payload)


def with_header(change: Callable[[dict[str, Any]], object], payload: bytes | None = None) -> bytes:
    header = header_of(VALID)
    change(header)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return with_raw_header(text, VALID[HEADER_END:] if payload is None else payload)


def with_manifest(change: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(header_of(VALID)["__metadata__"]["medley"])
    change(manifest)
    return with_manifest_text(json.dumps(manifest, separators=(",", ":")))


def with_manifest_text(text: str) -> bytes:
    return with_header(lambda header: header["__metadata__"].update(medley=text))


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> bytes:
    manifest, tensors = tiny_bundle()
    change(tensors)
    return sealed.pack(manifest.model_dump_json(exclude={"seal"}), tensors)


def test_the_untouched_bundle_of_these_tests_is_valid() -> None:
    read_bundle(VALID)
    read_bundle(with_header(lambda header: None))
    read_bundle(with_manifest(lambda manifest: None))
    read_bundle(with_tensors(lambda tensors: None))


def test_a_bundle_cut_off_anywhere_is_refused() -> None:
    for length in range(len(VALID)):
        code = refusal(VALID[:length]).code
        assert code == ("truncated" if length > 8 else "not_safetensors")


def test_a_bundle_cut_off_at_a_tensor_and_sealed_again_is_refused() -> None:
    ends = {entry["data_offsets"][1] for entry in header_of(VALID).values() if "dtype" in entry}
    for end in sorted(ends)[:-1]:
        assert refusal(resealed(VALID[: HEADER_END + end])).code == "truncated"


def test_bytes_appended_to_a_bundle_are_refused() -> None:
    assert refusal(VALID + b"\0").code == "damaged"
    assert refusal(resealed(VALID + b"\0")).code == "not_safetensors"


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_one_changed_byte_anywhere_is_refused(mask: int) -> None:
    codes = {"damaged", "not_safetensors", "truncated", "not_a_bundle"}
    for place in range(len(VALID)):
        data = bytearray(VALID)
        data[place] ^= mask
        assert refusal(bytes(data)).code in codes, place


def test_a_changed_byte_of_padding_or_of_a_tensor_is_called_damage() -> None:
    assert VALID[HEADER_END - 1 : HEADER_END] == b" "
    for place in (HEADER_END - 1, HEADER_END, len(VALID) - 1):
        data = bytearray(VALID)
        data[place] ^= 0x04 if place >= HEADER_END else 0x29  # a tab is padding to JSON too
        assert refusal(bytes(data)).code == "damaged"


def test_two_bytes_of_a_seal_in_capitals_are_refused() -> None:
    seal = VALID[SEAL_START:SEAL_END]
    assert refusal(VALID.replace(seal, seal.upper(), 1)).code == "damaged"


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8
    ),
    st.integers(0, 100),
)
def test_a_mutated_bundle_with_a_right_seal_is_read_or_refused(
    changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(VALID[: len(VALID) - cut])
    for place, value in changes:
        data[place % len(data)] = value
    with suppress(BundleError):  # any other error fails the test
        read_bundle(resealed(bytes(data)))


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(data: bytes, with_length: bool) -> None:
    if with_length:
        data = struct.pack("<Q", len(data) + 1) + b"{" + data
    refusal(data)


FLOAT_TENSORS = sorted(n for n, t in tiny_bundle()[1].items() if t.is_floating_point())


@pytest.mark.parametrize("name", FLOAT_TENSORS)
def test_a_number_that_is_not_finite_is_refused(name: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):

        def poison(tensors: dict[str, Tensor], value: float = value) -> None:
            tensors[name].view(-1)[-1] = value

        error = refusal(with_tensors(poison))
        assert f"tensor {name} has values that are not finite" in error.problems
        assert error.code == "bundle_invalid"


def test_a_half_precision_nan_is_refused_too() -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["vision.1.router"] = tensors["vision.1.router"].bfloat16() * float("nan")

    (problem,) = refusal(with_tensors(poison)).problems
    assert problem == "tensor vision.1.router has values that are not finite"


def test_a_standard_deviation_that_is_not_positive_is_refused() -> None:
    (problem,) = refusal(with_tensors(lambda t: t["ddas.0.std"].view(-1)[:1].zero_())).problems
    assert problem == "tensor ddas.0.std has values that are not positive"


ALL_TENSORS = sorted(tiny_bundle()[1])


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_a_missing_tensor_is_named(name: str) -> None:
    assert refusal(with_tensors(lambda t: t.pop(name))).problems == [f"tensor {name} is missing"]


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_a_wrong_shape_is_named_with_the_right_one(name: str) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    (problem,) = refusal(with_tensors(widen)).problems
    assert problem.startswith(f"tensor {name} has shape (")
    assert ", expected (" in problem


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_a_tensor_without_numbers_is_a_wrong_shape(name: str) -> None:
    def empty(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:0]

    (problem,) = refusal(with_tensors(empty)).problems
    assert problem.startswith(f"tensor {name} has shape (0")


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_a_wrong_dtype_is_named(name: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].long()

    assert any(f"{name} has dtype torch.int64" in p for p in refusal(with_tensors(change)).problems)


@pytest.mark.parametrize("name", ["self_test.logits", "self_test.scores"])
def test_the_answers_of_the_self_test_are_not_stored_in_half_precision(name: str) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].half()

    (problem,) = refusal(with_tensors(halve)).problems
    assert problem == f"tensor {name} has dtype torch.float16, expected torch.float32"


@pytest.mark.parametrize(
    "name", ["vision.0.router", "vision.1.experts.gate", "ddas.1.mean", "x", "", "__class__"]
)
def test_an_extra_tensor_is_named(name: str) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(1)

    assert refusal(with_tensors(add)).problems == [f"tensor {name} is not expected"]


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["text.0.router"]
        tensors["extra"] = torch.zeros(1)
        tensors["class_text_features"] = tensors["class_text_features"].T
        tensors["self_test.scores"] = tensors["self_test.scores"] * float("nan")

    assert sorted(refusal(with_tensors(spoil)).problems) == [
        "tensor class_text_features has shape (5, 3), expected (3, 5)",
        "tensor extra is not expected",
        "tensor self_test.scores has values that are not finite",
        "tensor text.0.router is missing",
    ]


def test_a_list_of_a_thousand_problems_is_shortened() -> None:
    error = refusal(with_tensors(lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(999)})))
    assert len(error.problems) == 51
    assert error.problems[-1] == "and 949 more"


def test_an_expert_that_is_not_the_one_of_its_digest_is_named() -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["vision.2.experts.down"][1] += 1

    (problem,) = refusal(with_tensors(swap)).problems
    assert problem == "vision: expert 1 of block 2 is not the one its digest names"


def test_a_changed_router_is_not_an_experts_business() -> None:
    read_bundle(with_tensors(lambda tensors: tensors["vision.2.router"].add_(1)))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 100_000_000, len(VALID)])
def test_a_huge_header_length_is_refused(length: int) -> None:
    code = refusal(struct.pack("<Q", length) + VALID[8:]).code
    assert code == ("truncated" if length == len(VALID) else "not_safetensors")


@pytest.mark.parametrize("length", [0, 1, 2, 40, 47, 100])
def test_a_header_length_that_is_too_small_is_refused(length: int) -> None:
    assert refusal(struct.pack("<Q", length) + VALID[8:]).code == "not_safetensors"


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{} {}",
        b"{]",
        b"{'a': 1}",
        b'{"a": 1}',
        b'{"a": null}',
        b'{"a": {}}',
        b'{"__metadata__": 7}',
        b'{"__metadata__": {"medley": 7}}',
        b'{"__metadata__": []}',
        b'{"a": NaN}',
        b'{"\xff": 1}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": 1, "a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"9" * 100_000 + b"}",
    ],
)
def test_a_header_that_is_not_one_of_safetensors_is_refused(header: bytes) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(1000)
    assert refusal(data).code == "not_safetensors"


def test_a_foreign_safetensors_file_is_told_from_a_damaged_bundle() -> None:
    assert refusal(safetensors.torch.save({"a": torch.zeros(3)})).code == "not_a_bundle"
    assert refusal(safetensors.torch.save({})).code == "not_a_bundle"
    foreign = safetensors.torch.save({"a": torch.zeros(3)}, {"format": "pt"})
    assert refusal(foreign).code == "not_a_bundle"


def test_a_second_metadata_key_is_refused() -> None:
    data = with_header(lambda header: header["__metadata__"].update(more="x"))
    assert refusal(data).code == "not_a_bundle"


def offsets(name: str, begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [begin, end]

    return change


def test_overlapping_tensors_are_refused() -> None:
    first, second = header_of(VALID)["text.0.router"]["data_offsets"]
    size = second - first
    assert first > 0
    assert refusal(with_header(offsets("text.0.router", 0, size))).code == "not_safetensors"


def test_offsets_that_run_backwards_are_refused() -> None:
    begin, end = header_of(VALID)["text.0.router"]["data_offsets"]
    assert refusal(with_header(offsets("text.0.router", end, begin))).code == "not_safetensors"


@pytest.mark.parametrize("end", [2**63, 2**64, 2**200])
def test_offsets_beyond_the_end_are_refused(end: int) -> None:
    assert refusal(with_header(offsets("text.0.router", 0, end))).code == "truncated"


@pytest.mark.parametrize("shape", [[2**62, 2**62], [2**64], [0, 2**63], [7, 7, 7], [2**31] * 9])
def test_a_shape_that_its_bytes_cannot_hold_is_refused(shape: list[int]) -> None:
    data = with_header(lambda header: header["text.0.router"].update(shape=shape))
    assert refusal(data).code == "not_safetensors"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64", "float32", "", "__class__"])
def test_a_dtype_that_is_unknown_is_refused(dtype: str) -> None:
    data = with_header(lambda header: header["text.0.router"].update(dtype=dtype))
    assert refusal(data).code == "not_safetensors"


def test_a_header_beyond_16_mib_is_refused() -> None:
    assert refusal(with_raw_header(b"{" + b" " * (16 * 1024 * 1024) + b"}")).code == (
        "not_safetensors"
    )


def test_two_tensors_of_one_name_are_refused() -> None:
    text = VALID[8:HEADER_END].rstrip()
    entry = json.dumps(header_of(VALID)["text.0.router"], separators=(",", ":"))
    twice = text[:-1] + f',"text.0.router":{entry}}}'.encode()
    assert refusal(with_raw_header(twice)).code == "not_safetensors"


def test_half_a_surrogate_pair_is_refused_wherever_it_stands() -> None:
    half = b"\\ud800"
    for name in (b'"text.0.router"', b'\\"pets\\"'):
        assert name in VALID
        header = VALID[8:HEADER_END].replace(name, name[:-2] + half + name[-2:])
        assert refusal(with_raw_header(header)).code == "not_safetensors"
    data = with_manifest(lambda manifest: manifest.update(licence="\ud800"))
    assert refusal(data).code == "bundle_invalid"


def test_a_bundle_cannot_pass_for_another_by_a_second_seal() -> None:
    text = header_of(VALID)["__metadata__"]["medley"]
    forged = text[:-1] + f',"seal":"{"5" * 64}"}}'
    assert refusal(with_manifest_text(forged)).problems == ["manifest: a key is repeated"]


def test_a_bundle_cannot_pass_for_another_by_a_second_manifest() -> None:
    text = VALID[8:HEADER_END].rstrip()
    manifest = json.loads(header_of(VALID)["__metadata__"]["medley"]) | {"seal": "5" * 64}
    second = f',"medley":{json.dumps(json.dumps(manifest))}}}'.encode()
    first_end = text.index(b'"}') + 1
    assert refusal(with_raw_header(text[:first_end] + second + text[first_end + 1 :])).code == (
        "not_safetensors"
    )


def test_the_seal_of_a_bundle_is_the_one_at_its_place() -> None:
    assert read_bundle(VALID).digest == f"sha256:{VALID[SEAL_START:SEAL_END].decode()}"
    longer = VALID[:SEAL_END] + b"0" + VALID[SEAL_END : HEADER_END - 1] + VALID[HEADER_END:]
    assert refusal(resealed(longer)).code in {"bundle_invalid", "not_safetensors"}


@pytest.mark.parametrize("version", [0, 4, 999, -1, 10**30])
def test_another_format_version_is_called_so(version: int) -> None:
    error = refusal(with_manifest(lambda m: m.update(format=version, new_field={"x": 1})))
    assert error.code == "unsupported_format"
    assert error.problems == [f"this is bundle format {version}, only formats 1 to 3 can be read"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("format", "1", "format"),
        ("format", True, "format"),
        ("format", 1.0, "format"),
        ("task", "", "task"),
        ("task", "Pets", "task"),
        ("task", "../pets", "task"),
        ("task", "pets\n", "task"),
        ("task", "p" * 64, "task"),
        ("version", ".hidden", "version"),
        ("version", "1/2", "version"),
        ("version", 1, "version"),
        ("class_names", [], "class_names"),
        ("class_names", ["cat", "dog", "cat"], "class_names"),
        ("class_names", ["cat", "dog", ""], "class_names.2"),
        ("class_names", ["cat", "dog", " \t"], "class_names.2"),
        ("class_names", ["cat", "dog", "x" * 201], "class_names.2"),
        ("class_names", ["cat", "dog", 3], "class_names.2"),
        ("class_names", [f"c{i}" for i in range(10_001)], "class_names"),
        ("class_names", "cat", "class_names"),
        ("templates", [], "templates"),
        ("templates", ["a photo"], "templates.0"),
        ("templates", ["{} and {}"], "templates.0"),
        ("backbone.fingerprint", "sha256:xyz", "backbone.fingerprint"),
        ("backbone.image_size", [0, 4], "backbone.image_size.0"),
        ("backbone.embed_dim", -1, "backbone.embed_dim"),
        ("method", "exec", "method"),
        ("first_expert_block", -1, "first_expert_block"),
        ("first_expert_block", 2, "whole"),
        ("bottleneck", 0, "bottleneck"),
        ("bottleneck", 10**30, "bottleneck"),
        ("top_k", 0, "top_k"),
        ("scale", 0, "scale"),
        ("scale", "0.1", "scale"),
        ("vision.blocks", {"-1": ["sha256:" + "0" * 64]}, "vision.blocks.-1"),
        ("vision.blocks", {"1": []}, "vision.blocks.1"),
        ("vision.blocks", {"1": ["sha256:short"]}, "vision.blocks.1.0"),
        ("selector.levels", [], "selector.levels"),
        ("selector.alpha", 1.5, "selector.alpha"),
        ("selector.threshold", "low", "selector.threshold"),
        ("selector.calibration.false_reject_rate", 2, "selector.calibration.false_reject_rate"),
        ("training.seed", -1, "training.seed"),
        ("training.settings", {"a": {"deep": 1}}, "training.settings.a"),
        ("training.metrics", {"a": "good"}, "training.metrics.a"),
        ("training.after", ["latest"], "training.after.0"),
        ("licence", "", "licence"),
        ("self_test.images", 0, "self_test.images"),
        ("self_test.tolerance", 0, "self_test.tolerance"),
        ("surprise", 1, "surprise"),
        ("backbone.surprise", 1, "backbone.surprise"),
    ],
)
def test_a_manifest_that_breaks_the_schema_names_the_field(
    path: str, value: object, named: str
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            manifest = manifest[parent]
        manifest[last] = value

    error = refusal(with_manifest(change))
    assert error.code == "bundle_invalid"
    assert any(problem.startswith(f"manifest: {named}") for problem in error.problems)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e39"])
@pytest.mark.parametrize("field", ["scale", "threshold", "center", "spread"])
def test_a_manifest_number_that_is_not_finite_is_refused(field: str, number: str) -> None:
    text = header_of(VALID)["__metadata__"]["medley"]
    value = {"scale": "0.1", "threshold": "2.5", "center": "-1.5", "spread": "0.25"}[field]
    forged = text.replace(f'"{field}":{value}', f'"{field}":{number}')
    assert forged != text
    assert refusal(with_manifest_text(forged)).code == "bundle_invalid"


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "}",
        ',"a":' + "[" * 100_000,
        ',"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        ',"a":' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        ',"seed":' + "9" * 100_000 + "}",
        ',"a":"' + "x" * 10_000_000 + '"}',
        ',"format":' + "9" * 100_000 + "}",
    ],
    ids=["cut", "bare", "deep-open", "deep-list", "deep-object", "digits", "long", "version"],
)
def test_a_monstrous_manifest_is_refused(rest: str) -> None:
    error = refusal(with_manifest_text('{"seal":"' + "0" * 64 + '"' + rest))
    assert error.code == "bundle_invalid"
    assert len(str(error)) < 10_000


def test_a_class_list_that_is_not_that_of_the_tensors_is_refused() -> None:
    error = refusal(with_manifest(lambda manifest: manifest["class_names"].append("fish")))
    assert "tensor self_test.logits has shape (2, 3), expected (2, 4)" in error.problems
    assert "tensor class_text_features has shape (3, 5), expected (4, 5)" in error.problems


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.mark,))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    checkpoint = io.BytesIO()
    torch.save(Trap(mark), checkpoint)
    for data in (pickle.dumps(Trap(mark)), checkpoint.getvalue()):
        assert refusal(data).code == "not_safetensors"
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # the trap does work


def a_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("manifest.json", "{}")
    return file.getvalue()


def a_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(8),
        bytes(1000),
        b"{}",
        b"hello, world",
        a_zip(),
        a_png(),
        gzip.compress(VALID),
    ],
    ids=["empty", "one-byte", "8-zeros", "zeros", "json", "text", "zip", "png", "gzip"],
)
def test_what_is_not_safetensors_at_all_is_called_so(data: bytes) -> None:
    assert refusal(data).code == "not_safetensors"


def test_a_bundle_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(VALID)
    read_bundle(path, max_bytes=len(VALID))
    for source in (VALID, path):
        with pytest.raises(BundleError) as caught:
            read_bundle(source, max_bytes=len(VALID) - 1)
        assert caught.value.code == "too_large"


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(Path("/dev/zero"), max_bytes=10_000)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("name", ["absent.safetensors", "."])
def test_a_path_that_cannot_be_read_is_one_line_without_its_folder(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path / name)
    assert caught.value.code == "unreadable"
    assert str(tmp_path) not in str(caught.value)
