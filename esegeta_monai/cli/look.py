"""``esegeta-monai info`` and ``esegeta-monai layers``: show installed versions and the contents of a bundle."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.bundle.contents import BundleContents, NnunetContents
from esegeta_monai.bundle.nnunet.totalsegmentator_task import TotalSegmentatorTask
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.static import StaticBundle, describe_nnunet
from esegeta_monai.cli.cases import Preprocessor, find_cases
from esegeta_monai.cli.reading import check_options, open_reader
from esegeta_monai.cli.trust import listing
from esegeta_monai.cli.values import layer_axes, overrides
from esegeta_monai.engine.default_layer import default_layer, layer_shapes
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen, unwrap
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.errors import MethodError, UsageError

__all__ = ["run_info", "run_layers", "scan_or_noise"]


def run_info(args: Namespace, *_: object) -> int:
    """Print versions, devices and the description of a bundle, and what of it would run; nothing is run."""
    sections: dict[str, Any] = {"versions": storage.versions(), "devices": _devices()}
    check_options(args)
    runs: list[BundleContents] = []
    if args.totalsegmentator:
        task = TotalSegmentatorTask.read(args.totalsegmentator, "fast" if args.fast else "default")
        sections["task"] = task.description
        runs = [NnunetContents(folder) for folder in dict.fromkeys(task.folders)]
    elif args.nnunet:
        sections["bundle"] = describe_nnunet(args.nnunet)
        runs = [NnunetContents(args.nnunet)]
    elif args.bundle:
        runs = [BundleContents(args.bundle, args.config)]
        sections["bundle"] = StaticBundle(BundleReader(args.bundle, args.config, overrides(args.override))).describe()
    if args.json:
        if runs:
            sections["runs"] = [asdict(entry) for contents in runs for entry in contents.runnables]
            sections["refused"] = {name: module for contents in runs for name, module in contents.hiding.items()}
        print(json.dumps(sections, indent=2, ensure_ascii=False))
        return 0
    for title, content in sections.items():
        print(f"{title}:")
        for key, value in content.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {key:<22} {'-' if text is None or text == '' else text}")
    for contents in runs:
        print("\n".join(([f"{contents.root.parent.name}:"] if len(runs) > 1 else []) + listing(contents)))
    return 0


def _devices() -> dict[str, Any]:
    devices: dict[str, Any] = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"}
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return devices


def run_layers(args: Namespace, *_: object) -> int:
    """Print the layers of a bundle's network in the order of execution, with their output shapes for one window."""
    reader = open_reader(args, "optional")
    network, inferer = unwrap(reader.network), as_inferer(reader.inferer)
    image = scan_or_noise(reader, args.input).as_subclass(Tensor).float()
    with torch.random.fork_rng(devices=[]), frozen(network):
        plan = plan_windows(inferer, image.shape[1:], torch.float32)
        window = plan.cut(image, 0)
        plan = plan_windows(inferer, window.shape[1:], torch.float32)
        model = Model(network, reader.device, output=args.network_output, layer_axes=layer_axes(args.layer_axes))
        with torch.inference_mode():
            axis = plan.slice_axis
            condition = reader.sample_condition(window.shape[1:])
            batch = None if condition is None else condition[None].to(reader.device)
            out = model(window[None].to(reader.device), slice_axis=axis, condition=batch)[0].cpu()
        score = WeightedScore(torch.ones(out.shape[1:], dtype=torch.bool), 0, out.shape[0])
        objective = Objective(model, window, plan, [score], out, condition=condition)
        shapes = layer_shapes(objective)
        try:
            default: str | None = default_layer(objective)
        except MethodError:  # no layer has a map, so none is marked
            default = None
    rows = [
        {"name": s.name, "kind": s.kind, "shape": list(s.shape), "calls": s.calls, "default": s.name == default}
        | {"map": None if s.grid is None else list(s.grid), "steps": s.steps}
        for s in shapes
        if s.name
    ]
    if args.json:
        print(json.dumps({"window": list(window.shape), "layers": rows}, indent=2))
        return 0
    print(f"{type(network).__name__}, one window of shape {_x(window.shape)} (channels first)")
    longest = max((len(str(r["name"])) for r in rows), default=0)
    for r in rows:
        more = f", runs {r['calls']} times" if int(str(r["calls"])) > 1 else ""
        if more:
            how = ", one call on the result of another" if r["steps"] else " on views of the window" if r["map"] else ""
            more += how if r["map"] or r["steps"] else " (not known where each call lies)"
        mark = "   <- default layer of class activation maps" if r["default"] else ""
        print(f"  {r['name']:<{longest}}  {_x(r['shape']):<18} {r['kind']}{more}{mark}")
    return 0


def _x(shape: Any) -> str:
    return "x".join(map(str, shape))


def scan_or_noise(reader: BundleReader, text: str | None) -> Tensor:
    """Return the preprocessed scan (C, *spatial) of the given file, else noise of the shape of one window."""
    if text is not None:
        cases = find_cases([text], [name for _, name in sorted(reader.channel_names.items())])
        return Preprocessor(reader)(cases[0])[1]
    expected = Preprocessor(reader) if reader.has("preprocessing") else None
    channels = expected.channels if expected is not None and expected.channels else 1
    dims = (expected.spatial_dims if expected is not None else None) or 3
    size: Any = reader.roi
    if not size:
        inputs = reader.metadata.inputs.values()
        size = next((i["spatial_shape"] for i in inputs if isinstance(i, dict) and "spatial_shape" in i), None)
    size = [size] * dims if isinstance(size, int) else size
    if size is None or not all(isinstance(n, int) and n > 0 for n in size):
        raise UsageError("the bundle does not declare a window size: give a scan by --input FILE")
    return torch.rand((channels, *size), generator=torch.Generator().manual_seed(0))
