"""The jobs of the app: each one is a command, run by the command's own functions on a network that stays loaded."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.cli import evaluate, explain
from esegeta_monai.cli.cases import PreparedCase, Preprocessor, ScanCase, find_cases
from esegeta_monai.cli.describe import describe
from esegeta_monai.cli.log import RunLog
from esegeta_monai.cli.main import build_parser
from esegeta_monai.cli.reading import open_reader, register_trusted
from esegeta_monai.errors import EsegetaError, InputError, UsageError
from esegeta_monai.explain.case import BatchInputs
from esegeta_monai.explain.layers import check_layers
from esegeta_monai.explain.prediction import Prediction
from esegeta_monai.explain.settings import DEFAULT_METHODS
from esegeta_monai.files.copies import mask_path, save_mask, save_scan_copy, scan_copy_path
from esegeta_monai.files.grids.resample import _background, has_metadata, to_scan_grid
from esegeta_monai.files.pictures.picture import display_affine
from esegeta_monai.methods.base import METHODS
from esegeta_monai.metrics import METRICS
from esegeta_monai.output.place import PlaceChecks
from esegeta_monai.output.report.page import write_report
from esegeta_monai.targets.base import TARGETS, class_output
from esegeta_monai.targets.classes import PredictedClasses, ranked_classes
from esegeta_monai.utils.files import read_json
from esegeta_monai.utils.heartbeat import Heartbeat
from esegeta_monai.utils.names import safe_name

__all__ = ["Resident"]

KEPT = 2
"""Number of cases whose image and prediction stay in memory."""
SHOWN_CLASSES = 12
"""Largest number of predicted classes that are shown as maps of the prediction."""
OPTIONS = (
    "config",
    "override",
    "folds",
    "step_size",
    "previous_stage",
    "device",
    "network_output",
    "layer_axes",
    "head",
)


@dataclass
class LoadedCase:
    """A case whose image and prediction are known.

    Attributes:
        prepared: what the command line's functions take.
        predicted: the case after its prediction.
        volume: the scan (C, *scan).
    """

    prepared: PreparedCase
    predicted: Prediction
    volume: MetaTensor


class Resident:
    """A bundle with its network, and the cases that were looked at last.

    Args:
        arguments: options of ``esegeta-monai app``, JSON-ready.
        folder: where the volumes of predictions are written.

    Raises:
        EsegetaError: as for ``esegeta-monai explain``.
    """

    def __init__(self, arguments: Mapping[str, Any], folder: str) -> None:
        self.arguments, self.folder = Namespace(**arguments), Path(folder)
        register_trusted(self.arguments)
        self.reader = open_reader(self.arguments)
        self.network = self.reader.network
        names = [name for _, name in sorted(self.reader.channel_names.items())]
        self.output = storage.writable_folder(self.arguments.output)
        self.cases = find_cases(self.arguments.input, names, leave_out=self.output)
        self.preprocess = Preprocessor(self.reader)
        self._loaded: OrderedDict[int, LoadedCase] = OrderedDict()
        self._places = PlaceChecks()

    def description(self) -> dict[str, Any]:
        """Return what the page shows before a case is chosen."""
        return {
            "bundle": self.reader.name,
            "version": self.reader.version,
            "device": str(self.reader.device),
            "classes": {str(index): name for index, name in sorted(self.reader.class_names.items())},
            "background": self.reader.background,
            "channels": [name for _, name in sorted(self.reader.channel_names.items())],
            "cases": [case.name for case in self.cases],
            "methods": [describe(cls, "method") for cls in METHODS],
            "targets": [describe(cls, "target") for cls in TARGETS],
            "metrics": [describe(cls, "metric") for cls in METRICS],
        }

    # -- cases --------------------------------------------------------------------------------------------------

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Preprocess and predict a case; write scan and prediction on the scan's grid for the viewer."""
        index = request["case"]
        loaded = self.case(index)
        name, predicted = self.cases[index].name, loaded.predicted
        image = loaded.prepared.image
        placed = has_metadata(image, loaded.volume)
        volume = loaded.volume if placed else image
        grid, folder = storage.Grid.of(volume), self.folder / f"case{index}"
        folder.mkdir(mode=0o700, exist_ok=True)
        affine, oriented = display_affine(volume)
        scan = scan_copy_path(folder, name, separate_folder=False)
        save_scan_copy(scan, _background(image, volume, image).as_tensor().numpy(), grid)

        def on_scan(values: Tensor, mode: str) -> Tensor:
            plain = MetaTensor(values.float().cpu(), affine=image.affine)
            return to_scan_grid(plain, volume, additive=False, mode=mode)[0]

        spatial = tuple(predicted.prediction.shape[1:])
        has_map = spatial == tuple(image.shape[1:])
        entries, classes = [], self._classes(predicted)
        for c in classes[:SHOWN_CLASSES] if has_map else []:
            label = c["name"]
            entry = {"target": label, "class": c["index"], "units": c["units"]}
            values = on_scan(self._values(predicted, c["index"], predicted.prediction)[None], "bilinear")
            mask = on_scan(c["mask"][None], "nearest")
            entry["map"] = self._save(folder / f"{name}_{label}", values, grid, "Prediction")
            entry["mask"] = str(save_mask(mask_path(folder, name, label, separate_folder=False), mask.numpy(), grid))
            entries.append(entry)
        if not entries:  # the viewer shows the scan beside a map
            empty = torch.zeros((1, *volume.shape[1:]))
            path = self._save(folder / f"{name}_scan-only", empty, grid, "Scan")
            entries.append({"target": "no map", "class": None, "units": "", "map": path, "mask": None})
        return {
            "case": index,
            "scan": str(scan),
            "affine": affine.tolist(),
            "scan_affine": np.asarray(volume.affine, dtype=float).tolist(),
            "oriented": oriented,
            "dims": image.ndim - 1,
            "has_map": has_map,
            "scores": [] if has_map else self._scores(predicted, predicted.prediction.flatten(1).mean(1)),
            "prediction": entries,
            "shown": [c["index"] for c in classes],
            "head": predicted.head.kind,
            "windows": len(predicted.plan),
        }

    def look(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the network's classes at a place, the largest output first."""
        loaded = self.case(request["case"])
        predicted, place = loaded.predicted, self.voxel(loaded, request["world"])
        if tuple(predicted.prediction.shape[1:]) != tuple(loaded.prepared.image.shape[1:]):
            values = predicted.prediction.flatten(1).mean(1)
        else:
            at: tuple[Any, ...] = (slice(None), *place)
            values = predicted.prediction[at]
        return {"voxel": place, "scores": self._scores(predicted, values)}

    def case(self, index: int) -> LoadedCase:
        """Return a case, whose preprocessing and prediction are computed once."""
        if index in self._loaded:
            self._loaded.move_to_end(index)
            return self._loaded[index]
        prepared = explain.prepared_case(self.reader, self.preprocess, self.cases[index], self.output)
        options = self.options("explain", index)
        settings = explain.explainer_for(self.reader, options).settings
        batch = BatchInputs(prepared.image[None], **prepared.given)
        predicted = Prediction(settings, next(batch.cases(settings.output, settings.postprocessing.keys)))
        model = predicted.model
        known = prepared.given.get("prediction") is not None
        if not known and settings.output is None and model.choice is None and model.integers is None:
            prepared.given["prediction"] = predicted.prediction[None]  # equal to what each job would predict again
        scan = prepared.scan
        volume = scan if isinstance(scan, MetaTensor) else storage.read_scan(scan)
        while len(self._loaded) >= KEPT:
            self._loaded.popitem(last=False)
        self._loaded[index] = LoadedCase(prepared, predicted, volume)
        return self._loaded[index]

    def _classes(self, predicted: Prediction) -> list[dict[str, Any]]:
        """Return the predicted classes of a segmentation with their voxels."""
        try:
            scores = PredictedClasses().bind(predicted.prediction, predicted._context)
        except EsegetaError:  # a regression, say: there are no classes
            return []
        names = self.reader.class_names
        return [
            {
                "index": score.class_index,
                "name": names.get(score.class_index, f"class{score.class_index}"),
                "mask": score.mask,
                "units": "probability" if predicted.head.kind != "raw" else "output",
            }
            for score in scores
            if not score.empty and score.mask is not None and score.class_index is not None
        ]

    def _values(self, predicted: Prediction, index: int, prediction: Tensor) -> Tensor:
        """Return the probability of a class (*spatial) for outputs (K, *spatial); of a raw head its output."""
        head = predicted.head
        which = class_output(index, len(prediction), predicted._context)
        if head.kind == "raw":
            return prediction[which.channel]
        values = prediction
        if head.values == "log_probability":
            values = values.exp()
        elif not head.inside:
            soft = head.activation("auto", len(prediction)) == "softmax"
            values = values.softmax(0) if soft else values.sigmoid()
        return 1 - values[which.channel] if which.complement else values[which.channel]

    def _scores(self, predicted: Prediction, values: Tensor) -> list[dict[str, Any]]:
        """Return number, name, output and probability of each class for outputs (K,), the largest first."""
        order = ranked_classes(values, predicted._context)
        names, head = self.reader.class_names, predicted.head
        scores = []
        for index in order[:SHOWN_CLASSES]:
            which = class_output(index, len(values), predicted._context)
            probability = None if head.kind == "raw" else float(self._values(predicted, index, values))
            output = float(values[which.channel]) * (-1 if which.complement else 1)
            name = names.get(index, f"class{index}")
            scores.append({"class": index, "name": name, "output": output, "probability": probability})
        return scores

    def voxel(self, loaded: LoadedCase, world: Sequence[float]) -> tuple[int, ...]:
        """Return the voxel of the network's grid at a place, mm.

        Raises:
            InputError: the place is outside the image.
        """
        image = loaded.prepared.image
        dims = image.ndim - 1
        affine = np.asarray(image.affine, dtype=float)
        affine = np.block([[affine[:dims, :dims], affine[:dims, -1:]], [np.zeros((1, dims)), np.ones((1, 1))]])
        place = np.rint(np.linalg.solve(affine, [*world[:dims], 1.0])[:-1]).astype(int).tolist()
        if any(not 0 <= p < n for p, n in zip(place, image.shape[1:])):
            raise InputError("this place is outside the image that the network reads")
        return tuple(place)

    @staticmethod
    def _save(stem: Path, values: Tensor, grid: Any, method: str) -> str:
        path = stem.with_name(f"{safe_name(stem.name)}.nii.gz")
        storage.save_map(path, values, grid, method=method)
        return str(path)

    # -- commands -----------------------------------------------------------------------------------------------

    def command(self, request: Mapping[str, Any], name: str = "explain") -> list[str]:
        """Return the arguments of the command that a request equals, without the name of the program."""
        targets = [] if request.get("target") is None else [request["target"]]
        argv = self._argv(name, request["case"], request.get("methods") or [], targets)
        if request.get("time_limit") is not None:
            argv += ["--time-limit", f"{request['time_limit']:g}"]
        if request.get("costly") and name == "explain":
            argv += ["--yes"]
        for metric in request.get("metrics") or [] if name == "evaluate" else []:
            argv += ["--metrics", metric]
        return argv

    def _argv(self, name: str, case: int, methods: Sequence[str], targets: Sequence[str]) -> list[str]:
        own, argv = self.arguments, [name]
        argv += ["--nnunet", own.nnunet] if own.nnunet is not None else ["--bundle", own.bundle]
        for option in OPTIONS:
            value = getattr(own, option)
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                argv += [f"--{option.replace('_', '-')}", str(one)]
        argv += [] if own.mirroring else ["--no-mirroring"]
        argv += ["--input", _input_of(self.cases[case]), "--output", own.output]
        for method in methods:
            argv += ["--methods", method]
        for target in targets:
            argv += ["--target", target]
        return argv

    def options(self, name: str, case: int, methods: Sequence[str] = (), targets: Sequence[str] = ()) -> Namespace:
        """Return the parsed arguments of a command on a case."""
        return self._parsed(self._argv(name, case, methods, targets))

    def _parsed(self, argv: Sequence[str]) -> Namespace:
        options = build_parser().parse_args([*argv, "--no-progress"])
        options.allowed, options.quiet = True, True  # `register_trusted` has asked
        options.heartbeat = Heartbeat()
        return options

    def shown(self, argv: Sequence[str], request: Mapping[str, Any]) -> dict[str, str]:
        """Return a command as a shell and as Python take it."""
        return {"command": shlex.join(["esegeta-monai", *argv]), "python": self._python(argv, request)}

    def _python(self, argv: Sequence[str], request: Mapping[str, Any]) -> str:
        if self.arguments.nnunet is not None or argv[0] != "explain" or self.arguments.override:
            return f"from esegeta_monai.cli.main import main\n\nmain({list(argv)!r})\n"
        files = [str(file) for file in self.cases[request["case"]].files]
        scan = files[0] if len(files) == 1 else files
        configs = f", {self.arguments.config!r}" if self.arguments.config else ""
        default = "None" if request.get("target") is None else repr([request["target"]])
        return "\n".join(
            [
                "from esegeta_monai import Explainer",
                "from esegeta_monai.bundle import BundleReader",
                "",
                f"reader = BundleReader({self.arguments.bundle!r}{configs})",
                f"data = reader.preprocessing({{reader.image_key: {scan!r}}})",
                "explainer = Explainer(",
                "    reader.network,",
                "    reader.inferer,",
                "    class_names=reader.class_names,",
                "    postprocessing=reader.output_use,",
                ")",
                f"methods, targets = {list(request.get('methods') or DEFAULT_METHODS)!r}, {default}",
                "for attribution in explainer(data[reader.image_key][None], methods, targets, data=data):",
                "    print(attribution.label, attribution.method.name, attribution.status)",
                "",
            ]
        )

    def explain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run ``esegeta-monai explain`` on a case."""
        request = self._with_box(request)
        argv = self.command(request)
        options = self._parsed(argv)
        methods, targets = explain.requested(options)
        cases = find_cases(options.input, (), leave_out=None)
        if [c.files for c in cases] != [self.cases[request["case"]].files]:
            raise UsageError(f"the command line cannot name this case: {self.cases[request['case']].name}")
        loaded = self.case(request["case"])
        with RunLog("ERROR") as log:
            writer = explain.explain_cases(
                self.reader,
                cases,
                methods,
                targets,
                self.output,
                options,
                log,
                prepare=lambda _: loaded.prepared,
                places=self._places,
            )
        entries = writer.run.results
        for entry in entries:
            entry.pop("traceback", None)
        return {**self.shown(argv, request), "case": request["case"], "results": entries, **self._change(entries)}

    def _change(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the change of F by the box, from the record of its map."""
        for entry in entries:
            if entry.get("map") and (entry.get("method") or "").startswith("FeatureAblation-box"):
                content = read_json(storage.sidecar_path(self.output / entry["map"])) or {}
                features = content.get("features") or []
                if features and content.get("value") is not None:
                    drop = features[0]["value"]
                    return {"box": {"before": content["value"], "after": content["value"] - drop, "change": -drop}}
        return {}

    def costs(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run ``esegeta-monai explain --dry-run`` on a case."""
        request = self._with_box(request)
        argv = self.command(request)
        options = self._parsed(argv)
        methods, targets = explain.requested(options)
        chosen = explain.bundle_targets(self.reader) if targets is None else targets
        check_layers(self.network, [*methods, *chosen])
        prepared = self.case(request["case"]).prepared
        explainer = explain.explainer_for(self.reader, options)
        estimates = explainer.costs(prepared.image[None], methods, chosen, calibration=1.0, **prepared.given)
        costs = [asdict(cost) for cost in estimates]
        return {**self.shown([*argv, "--dry-run"], request), "costs": costs}

    def evaluate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run ``esegeta-monai evaluate`` on a case."""
        argv = self.command(request, "evaluate")
        options = self._parsed(argv)
        with RunLog("ERROR") as log:
            code = evaluate.run(options, log, self.reader)
        return {**self.shown(argv, request), "case": request["case"], "exit_code": code}

    def report(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run ``esegeta-monai report``."""
        written = write_report(self.output)
        argv = ["report", str(self.arguments.output)]
        pages = {name: str(path) for name, path in written.cases.items()}
        return {**self.shown(argv, request), "index": str(written.index), "pages": pages}

    def _with_box(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the mask of the request's box, and return the request with the method that replaces it."""
        if request.get("box") is None:
            return request
        index = request["case"]
        loaded, name = self.case(index), safe_name(self.cases[index].name)
        corners = np.array([self.voxel(loaded, corner) for corner in request["box"]])
        low, high = corners.min(0), corners.max(0) + 1
        image = loaded.prepared.image
        mask = np.zeros(image.shape[1:], dtype=np.uint8)
        mask[tuple(slice(a, b) for a, b in zip(low, high))] = 1
        mask = mask.reshape(*mask.shape, *(1,) * (3 - mask.ndim))
        place = "-".join(f"{a}to{b - 1}" for a, b in zip(low, high))
        path = self.output / name / f"{name}_box-{place}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        affine = np.asarray(image.affine, dtype=float)
        if affine.shape[0] == 3:
            affine = np.block([[affine[:2, :2], np.zeros((2, 1)), affine[:2, 2:]], [np.zeros((2, 2)), np.eye(2)]])
        with storage.atomic(path) as temporary:
            nib.save(nib.Nifti1Image(mask, affine), temporary)
        baseline = request.get("baseline") or "auto"
        method = (
            f"FeatureAblation(feature_mask={str(path)!r}, baseline={baseline!r}, "
            f"name='FeatureAblation-box-{place}-{safe_name(str(baseline))}')"
        )
        return {**request, "methods": [method]}


def _input_of(case: ScanCase) -> str:
    """Return the value of ``--input`` that stands for a case alone."""
    files = ",".join(str(file) for file in case.files)
    return files if len(case.files) == 1 and storage.case_name(case.files[0]) == case.name else f"{case.name}={files}"
