"""Kinds of scenarios of `regression.py`, and the small networks that they use; `regression_table.py` lists them.

Every scenario builds its own network and image, in float64 on one thread. An exception is a result, recorded by type
and message. The scenarios use only public names of the package, and those of `MOVED`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
import torch.multiprocessing as mp
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Spacing
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.methods import METHODS
from esegeta_monai.targets import TARGETS
from esegeta_monai.transforms import Explaind, InvertAttributiond

MOVED = {  # names that no package exports: new module, then old module
    "Evaluator": ("esegeta_monai.explain.evaluation", "esegeta_monai.explain", "esegeta_monai.evaluation"),
    "ResultWriter": ("esegeta_monai.output.writer", "esegeta_monai.output", "esegeta_monai.writer"),
}
CHEAP = {"n_steps": 4, "n_samples": 4, "n_masks": 8, "n_iter": 4, "max_channels": 3, "octaves": 2, "max_steps": 32}
CHEAP_METRIC = {"n_samples": 10, "steps": 4, "stages": 2, "sizes": 2}
VOLATILE = frozenset({"seconds", "peak_memory_bytes", "versions", "created", "started", "finished", "updated", "time"})

Item = dict[str, Any]


def moved(name: str) -> Any:
    """Return the object of a name in `MOVED` from the first module that has it."""
    for module in MOVED[name]:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"{name} is in none of {', '.join(MOVED[name])}")


# ---- networks that count ---


class Count:
    """Counter of forward calls and rows in the running scenario; ``fuse``: number of calls before a network raises."""

    calls = rows = 0
    fuse: float = float("inf")

    @classmethod
    def reset(cls) -> None:
        cls.calls, cls.rows, cls.fuse = 0, 0, float("inf")

    @classmethod
    def add(cls, rows: int) -> None:
        cls.calls, cls.rows = cls.calls + 1, cls.rows + rows
        if cls.calls > cls.fuse:
            raise RuntimeError("the network was interrupted")

    @classmethod
    def clock(cls) -> float:
        """Return a time that increases by one second per forward call."""
        return float(cls.calls)


class Segmenter(nn.Module):
    """Network of two levels, skip connection, batch norm, pooling, upsampling: (B, 2, *spatial) to (B, 3, *spatial)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        norm, pool = ((nn.BatchNorm2d, nn.MaxPool2d), (nn.BatchNorm3d, nn.MaxPool3d))[dims - 2]
        self.first, self.norm, self.pool = conv(2, 4, 3, padding=1), norm(4), pool(2)
        self.second, self.up, self.last = conv(4, 5, 3, padding=1), nn.Upsample(scale_factor=2), conv(9, 3, 1)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        Count.add(len(x))
        a = self.act(self.norm(self.first(x if condition is None else x + condition)))
        return self.last(torch.cat([a, self.up(self.act2(self.second(self.pool(a))))], 1))


class Classifier(nn.Module):
    """Network of convolutions, global average pooling and a linear head: (B, 2, *spatial) to (B, 3)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, pool, mean = (
            (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
            (nn.Conv3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
        )[dims - 2]
        self.first, self.pool, self.second = conv(2, 4, 3, padding=1), pool(2), conv(4, 5, 3, padding=1)
        self.act, self.act2, self.mean, self.last = nn.ReLU(), nn.ReLU(), mean(1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        Count.add(len(x))
        return self.last(self.mean(self.act2(self.second(self.pool(self.act(self.first(x)))))).flatten(1))


class CountedUNet(UNet):
    """MONAI's U-Net with residual units and PReLU."""

    def forward(self, x: Tensor) -> Tensor:
        Count.add(len(x))
        return super().forward(x)


SHAPES = {"seg2": (12, 20), "unet2": (12, 20), "cls2": (12, 14)}
SHAPES |= {"seg3": (8, 8, 12), "unet3": (8, 8, 12), "cls3": (8, 8, 6)}


def network(kind: str, dtype: torch.dtype = torch.float64, seed: int = 9) -> nn.Module:
    """Return a network in evaluation mode with non-trivial batch norm statistics."""
    torch.manual_seed(seed)
    dims = int(kind[-1])
    if kind.startswith("unet"):
        net: nn.Module = CountedUNet(dims, 2, 3, (4, 8), (2,), num_res_units=1, norm="batch")
    else:
        net = Segmenter(dims) if kind.startswith("seg") else Classifier(dims)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.to(dtype).eval()


def image_of(kind: str, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return an image (B, 2, *spatial): a noisy bright box on an empty background."""
    shape = SHAPES[kind]
    noise = torch.randn((batch, 2, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    box = torch.zeros(shape, dtype=torch.float64)
    box[tuple(slice(1, n - 2) for n in shape)] = 1
    return (box * (1 + noise)).to(dtype)


def explainer_of(kind: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Explainer:
    dims = int(kind[-1])
    inferer = None if kind.startswith("cls") else SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")
    settings = {"on_error": "record", "class_names": {1: "one"}, "channel_names": ["T1", "T2"], **options}
    return Explainer(network(kind, dtype), inferer, **settings)


# ---- recorded results -----------


def plain(value: Any) -> Any:
    """Convert a result to JSON types, without entries that differ between runs."""
    if hasattr(value, "to_json"):
        value = value.to_json()
        value = json.loads(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (Tensor, np.ndarray)):
        array = np.ascontiguousarray(torch.as_tensor(value).detach().cpu().numpy())
        return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name not in VOLATILE}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):  # `torch.load` refuses it
        return value.value
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def items_of(attributions: Iterable[Any]) -> Iterator[Item]:
    for i, a in enumerate(attributions):
        values = None if a.map is None else torch.as_tensor(a.map).as_subclass(Tensor).detach().clone()
        affine = None if a.map is None else plain(a.map.affine)
        about = {"label": a.label, "input": a.input, "case": a.case, "mask": plain(a.mask), "affine": affine}
        error = None if a.error is None else f"{type(a.error).__name__}: {a.error}"
        name = f"{i} {a.case} {a.label} {a.method.name} {a.input or ''}".strip()
        yield {"name": name, "map": values, "record": plain(a.record), "about": {**about, "error": error}}


def costs_less(value: Any, default: Any) -> bool:
    return not (isinstance(value, int) and isinstance(default, int)) or value < default


def cheap(registry: Any, values: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every class of a registry with its defaults, except ``values`` that it needs or that make it cheap."""
    for cls in registry:
        known = inspect.signature(cls).parameters
        given = {k: v for k, v in values.items() if k in known and costs_less(v, known[k].default)}
        if cls.__name__ == "KernelShap":  # at least two samples per feature
            given["n_samples"] = 256
        if "cases" in known:
            given["cases"] = [image_of(kind, seed=s)[0] for s in (5, 6, 7)]
        if cls.__name__ == "DataRandomisation":
            yield cls.__name__, lambda cls=cls: cls(network=network(kind, seed=5))
        else:
            yield cls.__name__, partial(cls, **given)


# ---- kinds of scenarios ---


def explain(kind: str, methods: Any, targets: Any, batch: int = 1, call: Any = None, **options: Any) -> Iterator[Item]:
    """Explain targets by methods; ``call`` returns further arguments of the explainer's call."""
    made = methods() if callable(methods) else METHODS.create_all(methods)
    dtype = options.get("dtype", torch.float64)
    more = {} if call is None else call(kind)
    image = more.pop("image", None)
    image = image_of(kind, batch, dtype) if image is None else image
    yield from items_of(explainer_of(kind, **options)(image, made, TARGETS.create_all(targets), **more))


def evaluate(
    kind: str, metrics: Callable[[], Any], target: str, methods: str = "Saliency(abs=False)"
) -> Iterator[Item]:
    """Compute metrics of maps of one case, with the control maps."""
    shape = SHAPES[kind]
    label = torch.zeros(shape, dtype=torch.int64)
    label[tuple(slice(2, n // 2) for n in shape)] = 1
    label[tuple(slice(n // 2, n - 2) for n in shape)] = 2
    image = MetaTensor(image_of(kind)[0], affine=torch.diag(torch.tensor([1.5] * (len(shape)) + [1.0])))
    result = moved("Evaluator")(explainer_of(kind), metrics())(image, methods, target, label=label)
    for row in [*result.rows, *result.regions]:
        row = plain(row)
        yield {"name": " ".join(str(row.get(k)) for k in ("target", "method", "metric", "region")), "record": row}
    yield {"name": "not judged", "record": {"failed": plain(result.failed), "empty": plain(result.empty)}}


def resume(method: str, output: str, how: str, window_batch: int = 2) -> Iterator[Item]:
    """Interrupt a run, and continue it from its scores; the clock counts forward calls."""
    target = f"MultiClassMask(1, output='{output}')"
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.monotonic", Count.clock):
        (whole,) = explain("seg2", method, target, window_batch=window_batch)
        calls = Count.calls
        limits = (0.7 * calls, 0.3 * calls, None) if how == "limit" else (None, None)
        for i, limit in enumerate(limits):
            Count.fuse = Count.calls + 0.75 * calls if how == "network" and not i else float("inf")
            call = lambda kind: {"scores_dir": Path(folder) / "scores"}  # noqa: E731
            (item,) = explain("seg2", method, target, call=call, window_batch=window_batch, time_limit=limit)
            item["name"] = f"run {i} {item['name']}"
            item["about"]["tables"] = len(list((Path(folder) / "scores").glob("*")))
            if item["map"] is not None:
                gap = float((item["map"] - whole["map"]).abs().max() / whole["map"].abs().max())
                item["about"]["equals the whole run"] = gap <= 1e-12
            yield item


def costs(kind: str, methods: Callable[[], Any], target: str) -> Iterator[Item]:
    """Compute the predicted passes; for an estimate, record only that it is one."""
    with mock.patch("time.monotonic", Count.clock):
        for cost in explainer_of(kind).costs(image_of(kind), methods(), TARGETS.create_all(target)):
            passes = cost.passes if getattr(cost, "exact", True) else "about"
            yield {"name": f"{cost.method} {cost.target}", "record": {"passes": passes, "refused": cost.note}}
    Count.reset()  # the algorithm of the dry run may change


def _rank(rank: int, folder: str, kind: str, methods: Sequence[str], targets: Sequence[str]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("esegeta_monai").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    items = []
    for target, method in product(targets, methods):
        for item in explain(kind, method, target, distributed=True):
            items.append({**item, "name": f"rank {rank} {target} {method} {item['name']}"})
    counts = {"name": f"rank {rank} counts", "record": {"calls": Count.calls, "rows": Count.rows}}
    torch.save([*items, counts], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def ranks(kind: str, methods: Sequence[str], targets: Sequence[str]) -> Iterator[Item]:
    """Compute one case in two processes together."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, kind, methods, targets), nprocs=2)
        for rank in range(2):
            yield from torch.load(f"{folder}/{rank}.pt", weights_only=True)


def write(methods: str, targets: str) -> Iterator[Item]:
    """Write the files of one preprocessed scan twice; the second run skips finished maps."""
    chosen, wanted = METHODS.create_all(methods), TARGETS.create_all(targets)
    with tempfile.TemporaryDirectory() as name:
        scan, out = Path(name) / "scan.nii.gz", Path(name) / "out"
        affine = np.array([[-1.2, 0.2, 0, 4], [0.2, 1.5, 0, -3], [0, 0, 2.0, 1], [0, 0, 0, 1]])
        nib.save(nib.Nifti1Image(np.moveaxis(image_of("seg3")[0].float().numpy(), 0, -1), affine), scan)
        image = Compose([LoadImage(), EnsureChannelFirst(), Spacing((1.6, 1.6, 1.6))])(str(scan))
        for run in range(2):
            writer = moved("ResultWriter")(out, chosen, wanted)
            with writer.run:
                explainer = explainer_of("seg3", dtype=torch.float32)
                writer.explain(explainer, image, "alpha", chosen, wanted)
            files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
            yield {"name": f"run {run} files", "record": {"files": files}}
            entries = plain(json.loads((out / "run.json").read_text(encoding="utf-8")))
            yield {"name": f"run {run} run.json", "record": entries}
        for file in files:
            if file.endswith(".nii.gz"):
                volume = nib.load(out / file)
                values = torch.from_numpy(np.asarray(volume.dataobj).astype(np.float64))
                yield {"name": file, "map": values, "record": {"affine": plain(volume.affine)}}
            elif file.endswith(".json") and file != "run.json":
                record = plain(json.loads((out / file).read_text(encoding="utf-8")))
                record = {k: v for k, v in record.items() if k not in ("scan_sha256", "map_sha256", "map_bytes")}
                yield {"name": file, "record": record}


def transforms() -> Iterator[Item]:
    """Run a chain of dictionary transforms, and invert an additive map."""
    image = MetaTensor(image_of("seg3")[0].float(), affine=torch.diag(torch.tensor([1.5, 1.5, 2.0, 1.0])))
    data = {"image": Spacing((1.6, 1.6, 1.6))(image)}
    inferer = SlidingWindowInferer((8, 8, 8), 3, 0.5, "gaussian")
    methods = ["InputXGradient", "GradCam", "Occlusion(window=4)"]
    chain = Explaind("image", network("seg3", torch.float32), inferer, methods, ["MultiClassMask(1, name='a')"])
    data = InvertAttributiond("image_a_InputXGradient")(chain(data))
    for key in sorted(k for k in data if k != "image"):
        record = plain(json.loads(data[key].meta["record"])) if "record" in data[key].meta else {}
        yield {"name": key, "map": torch.as_tensor(data[key]).as_subclass(Tensor).clone(), "record": record}
