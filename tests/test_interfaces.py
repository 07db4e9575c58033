"""All interfaces give the same answer for networks, outputs and scans that are easily misread.

Command line, ``monai.bundle.run`` with the included overlay, handler, transform and Python: the same maps, status,
results of the checks, warnings and reasons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator

import esegeta_monai
from esegeta_monai import Explainer
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.main import main
from esegeta_monai.handlers import ExplanationHandler
from esegeta_monai.transforms import Explaind
from tests.support.odd import SITUATIONS, Situation, write_bundle

OVERLAY = Path(esegeta_monai.__file__).parent / "bundle" / "explain.json"


@dataclass
class Answer:
    """The answer of an interface for a target and a method; ``map`` is (C, *spatial) or None."""

    status: str
    reason: str | None
    warnings: list[str]
    checks: list[dict[str, Any]]
    map: np.ndarray | None


Answers = dict[tuple[str, str], Answer]  # by the names of class and method


Interface = Callable[[Path, Situation], Answers]


def _class_of(label: str | None) -> str:
    return str(label).rsplit("-", 1)[-1]


def written(output: Path) -> Answers:
    answers = {}
    for entry in json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]:
        values = None
        if entry.get("map"):
            volume = np.asarray(nib.load(output / entry["map"]).dataobj)
            values = volume[None] if volume.ndim == 3 else np.moveaxis(volume, -1, 0)
        checks = [c for c in entry.get("checks", []) if c["check"] != "geometry"]
        key = (_class_of(entry["target"]), str(entry["method"]))
        answers[key] = Answer(entry["status"], entry.get("reason"), entry.get("warnings", []), checks, values)
    return answers


def by_command(bundle: Path, situation: Situation) -> Answers:
    words = ["explain", "--bundle", bundle, "--input", bundle / "scan.nii.gz", "--output", bundle / "cli"]
    main([*map(str, words), "--methods", situation.methods, "--no-pictures"])
    return written(bundle / "cli")


def by_overlay(bundle: Path, situation: Situation) -> Answers:
    files = [str(bundle / "configs" / "inference.json"), str(OVERLAY)]
    changes = {"explain_methods": situation.methods, "explain_handler#pictures": False}
    monai.bundle.run(config_file=files, bundle_root=str(bundle), output_dir=str(bundle / "overlay"), **changes)
    return written(bundle / "overlay")


def by_handler(bundle: Path, situation: Situation) -> Answers:
    reader = BundleReader(bundle)
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=reader.resolve("dataloader"),
        network=reader.network,
        inferer=reader.inferer,
        postprocessing=reader.postprocessing,
        amp=situation.amp,
    )
    handler = ExplanationHandler(situation.methods, None, bundle / "handler", bundle, pictures=False)
    handler.attach(engine)
    engine.run()
    return written(bundle / "handler")


def _parts(bundle: Path) -> tuple[BundleReader, dict[str, Any], dict[str, Any]]:
    reader = BundleReader(bundle)
    options = {"class_names": reader.class_names, "postprocessing": reader.output_use, "on_error": "record"}
    return reader, reader.preprocessing({"image": str(bundle / "scan.nii.gz")}), options


def by_python(bundle: Path, situation: Situation) -> Answers:
    reader, data, options = _parts(bundle)
    explainer = Explainer(reader.network, reader.inferer, **options)
    answers: Answers = {}
    for a in explainer(data["image"][None], situation.methods, ["PredictedClasses"]):
        r = a.record
        answers[_class_of(a.label), str(a.method.name)] = Answer(
            r["status"], r.get("reason"), r["warnings"], r["checks"], None if a.map is None else a.map.numpy()
        )
    return answers


def by_transform(bundle: Path, situation: Situation) -> Answers:
    reader, data, options = _parts(bundle)
    explain = Explaind("image", reader.network, reader.inferer, situation.methods, None, **options)
    answers: Answers = {}
    for key, value in explain(data).items():
        if key not in data:
            r = json.loads(value.meta["record"])
            checks = [c for c in r["checks"] if c["check"] != "geometry"]
            answers[_class_of(key.rsplit("_", 1)[0]), r["method"]] = Answer(
                r["status"], r.get("reason"), r["warnings"], checks, value.numpy()
            )
    return answers


FILES = (by_command, by_overlay, by_handler)
ENGINES = (by_overlay, by_handler)
INTERFACES = (*FILES, by_transform, by_python)
Asked = Callable[[str], tuple[Situation, dict[Interface, Answers]]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Function of the name of a situation that returns it and the answer of each interface, computed once."""
    torch.set_num_threads(1)

    @cache
    def ask(name: str) -> tuple[Situation, dict[Interface, Answers]]:
        situation = SITUATIONS[name]
        bundle = write_bundle(tmp_path_factory.mktemp("odd") / "bundle", situation)
        return situation, {interface: interface(bundle, situation) for interface in INTERFACES}

    return ask


@pytest.mark.parametrize("name", [name for name, s in SITUATIONS.items() if s.reason is None])
def test_all_interfaces_give_the_same_answer(asked: Asked, name: str) -> None:
    """Maps are equal bit for bit: scan and network have the same grid, and files hold float32, like the maps."""
    situation, answers = asked(name)
    expected = answers[by_python]
    assert len(expected) == situation.maps
    for interface in INTERFACES:
        assert answers[interface].keys() == expected.keys(), interface
        for key, answer in answers[interface].items():
            where = (interface.__name__, key)
            same = expected[key]
            assert (answer.status, answer.reason) == ("ok", None), where
            assert answer.map is not None, where
            assert same.map is not None, where
            assert answer.map.any(), where
            assert answer.map.tobytes() == same.map.tobytes(), where
            assert answer.checks == same.checks, where
            more = situation.of_engine if interface in ENGINES else ()
            assert len(answer.warnings) == len(same.warnings) + len(more), (where, answer.warnings)
            assert answer.warnings[len(more) :] == same.warnings, where
            assert all(part in text for part, text in zip(more, answer.warnings)), where


@pytest.mark.parametrize("name", [name for name, s in SITUATIONS.items() if s.verdicts])
def test_the_checks_find_what_is_odd(asked: Asked, name: str) -> None:
    situation, answers = asked(name)
    for check, verdict in situation.verdicts.items():
        results = [c for a in answers[by_python].values() for c in a.checks if c["check"] == check]
        assert {c["verdict"] for c in results} == {verdict}
        warned = {key for key, a in answers[by_python].items() if results[0]["text"] in a.warnings}
        gradient = {key for key in answers[by_python] if key[1] != "Occlusion"}
        assert warned == (gradient if verdict == "warned" else set())  # the only warning here is of the derivative


@pytest.mark.parametrize("name", [name for name, s in SITUATIONS.items() if s.reason is not None])
def test_interfaces_that_write_maps_on_the_scan_give_the_same_reason(asked: Asked, name: str) -> None:
    situation, answers = asked(name)
    for interface in FILES:
        assert answers[interface].keys() == answers[by_command].keys(), interface
        for key, answer in answers[interface].items():
            assert (answer.status, answer.map) == ("failed", None), (interface, key)
            assert situation.reason is not None
            assert answer.reason is not None
            assert situation.reason in answer.reason, (interface, key)
            assert answer.reason.replace("scan.nii.gz", "scan") == answers[by_handler][key].reason, (interface, key)


def test_a_flip_without_a_record_leaves_maps_of_the_network_right(asked: Asked) -> None:
    """Python knows no scan; the transform knows the file of the image and warns."""
    _, answers = asked("flip without a record")
    assert len(answers[by_transform]) == len(answers[by_python]) == 6
    for key, answer in answers[by_transform].items():
        same, refused = answers[by_python][key], answers[by_command][key]
        assert answer.map is not None
        assert same.map is not None
        assert answer.map.tobytes() == same.map.tobytes()
        (text,) = answer.warnings
        assert text == f"on the scan's grid this map would not be in its place: {refused.reason}"
        assert (same.status, same.warnings) == ("ok", [])


def test_a_constant_image_is_refused_in_python_and_by_the_transform_too(asked: Asked) -> None:
    _, answers = asked("constant scan")
    assert answers[by_transform] == {}
    (written_reason,) = {str(answer.reason).removeprefix("scan: ") for answer in answers[by_handler].values()}
    assert answers[by_python]
    for answer in answers[by_python].values():
        assert (answer.status, answer.map) == ("failed", None)
        assert str(answer.reason).removeprefix("image 0: ") == written_reason


def test_two_handlers_of_an_engine_record_the_same_calls(tmp_path: Path) -> None:
    """Also the first one: the second one does not replace its record of the calls by an empty one."""
    situation = SITUATIONS["writes into the whole image"]
    bundle = write_bundle(tmp_path / "bundle", situation)
    reader = BundleReader(bundle)
    engine = SupervisedEvaluator(
        torch.device("cpu"), reader.resolve("dataloader"), reader.network, inferer=reader.inferer
    )
    for name in ("first", "second"):
        ExplanationHandler("Saliency", None, tmp_path / name, bundle, pictures=False).attach(engine)
    engine.run()
    assert engine.inferer is reader.inferer
    alone = by_python(bundle, situation)
    for name in ("first", "second"):
        answers = written(tmp_path / name)
        assert len(answers) == 2
        for key, answer in answers.items():
            same = alone[key].map
            assert same is not None
            assert answer.map is not None
            assert answer.map.tobytes() == same.tobytes(), name
