"""Preprocessing that hides from its trace where the voxels went, explained by the command line on tiny bundles.

The true map on the scan's grid is that of the network's image, put back by `PipelineCase.place`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

from esegeta_monai.cli.main import main
from esegeta_monai.methods.base import METHODS, Method
from tests.odd.base import OddCase, mask_sum
from tests.support.cli import NETWORK, SIZE, make_bundle, make_scan, metadata, run_json

CLASS, LEVEL = 1, 0.1
METHODS_OF_ONE_CASE = tuple(cls.__name__ for cls in METHODS if "cases" not in {f.name for f in dataclasses.fields(cls)})
"""Methods that need no other scans."""
SHAPE, CUBE = (8, 10, 6), (8, 8, 8)
Place = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PipelineCase(OddCase):
    """A pipeline and its truth.

    Attributes:
        transforms: JSON of the transforms after `LoadImaged`.
        shape: of the scan.
        place: from a map (C, *spatial) on the network's grid to the scan's grid; None: no map there can be right.
        dims: spatial axes of the network.
    """

    transforms: tuple[dict[str, Any], ...] = ()
    shape: tuple[int, ...] = SHAPE
    place: Place | None = None
    dims: int = 3

    def results(self, methods: Sequence[Method]) -> dict[str, tuple[str, list[str], str, Tensor | None]]:
        """Return status, warnings, reason and map of each method, by its name, as the command line writes them."""
        methods = [m for m in methods if type(m).__name__ in METHODS_OF_ONE_CASE]
        texts = [f"{type(m).__name__}({', '.join(_given(m))})" for m in methods]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            preprocessing = {
                "_target_": "Compose",
                "transforms": [
                    {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                    *self.transforms,
                ],
            }
            definition = {**NETWORK, "spatial_dims": self.dims}
            bundle = make_bundle(
                root / "bundle",
                imports=["$import torch", "$import numpy"],
                network_def=definition,
                preprocessing=preprocessing,
                inferer={"_target_": "SimpleInferer"},
            )
            info = metadata()
            info["network_data_format"]["inputs"]["image"]["spatial_shape"] = [SIZE] * self.dims
            (bundle / "configs" / "metadata.json").write_text(json.dumps(info), encoding="utf-8")
            torch.save(self.odd().state_dict(), bundle / "models" / "model.pt")
            scan = make_scan(root / "scan.nii.gz", self.shape)
            words = ["explain", "--bundle", bundle, "--input", scan, "--output", root / "out", "--no-pictures"]
            words += ["--methods", ",".join(texts), "--target", f"MultiClassMask({CLASS})", "--device", "cpu"]
            printed = io.StringIO()
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                main([str(word) for word in words])
            assert (root / "out" / "run.json").exists(), printed.getvalue()
            by_method = {_plain(e["method"]): self._read(root / "out", e) for e in run_json(root / "out")["results"]}
            failed = by_method.get(None)  # type: ignore[call-overload]  # of the whole case
            return dict.fromkeys([str(m.name) for m in methods], failed) if failed else by_method

    @staticmethod
    def _read(out: Path, entry: dict[str, Any]) -> tuple[str, list[str], str, Tensor | None]:
        values = None
        if entry.get("map"):
            stored = torch.from_numpy(np.asarray(nib.load(out / entry["map"]).dataobj, dtype=np.float64))
            values = stored.movedim(-1, 0) if stored.ndim == 4 else stored[None]
        return entry["status"], entry.get("warnings") or [], str(entry.get("reason") or ""), values


def _plain(name: str | None) -> Any:
    """Return the name of the class of a method; Captum's algorithms are one class, named by algorithm."""
    return "Captum" if name is not None and name.startswith("Captum") else name


def _given(method: Method) -> list[str]:
    """Return the parameters of a method as the command line takes them, without inner methods."""
    own = method.parameters.items()
    parameters = {
        k: v for k, v in own if k != "name" and v is not None and (k == "arguments" or not isinstance(v, dict))
    }
    if isinstance(getattr(method, "baseline", None), Tensor):
        parameters["baseline"] = LEVEL
    return [f"{k}={v!r}" for k, v in parameters.items()]


def unet(dims: int) -> nn.Module:
    torch.manual_seed(4)
    return UNet(**{k: v for k, v in {**NETWORK, "spatial_dims": dims}.items() if k != "_target_"})


@cache
def scan_values(shape: tuple[int, ...]) -> Tensor:
    """Return the voxels (1, *shape) of the scan."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_scan(Path(folder) / "scan.nii.gz", shape)
        return torch.from_numpy(np.asarray(nib.load(path).dataobj, dtype=np.float32)).double()[None]


def lambd(function: str, **more: Any) -> dict[str, Any]:
    return {"_target_": "Lambdad", "keys": "image", "func": f"$lambda x: {function}", **more}


def case(
    name: str,
    transforms: Sequence[dict[str, Any]],
    prepare: Place,
    place: Place | None,
    shape: tuple[int, ...] = SHAPE,
    dims: int = 3,
) -> PipelineCase:
    x = prepare(scan_values(shape))[None]
    return PipelineCase(
        name, "pipelines", lambda: unet(dims), x, mask_sum(CLASS), f"MultiClassMask({CLASS})", twin=lambda odd: odd,
        x0=torch.full_like(x[0], LEVEL), tolerance=1e-4, transforms=tuple(transforms), shape=shape, place=place,
        dims=dims, layer="model.0", methods=METHODS_OF_ONE_CASE,
    )  # fmt: skip


def same(x: Tensor) -> Tensor:
    return x


def flip(x: Tensor) -> Tensor:
    return x.flip(1)


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def cut(x: Tensor) -> Tensor:
    return x[:, 2:8, :, 1:5]


def uncut(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 0, 0, 2, 0))


def in_slice(x: Tensor) -> Tensor:
    whole = torch.zeros(len(x), *SHAPE, dtype=x.dtype)
    whole[..., 3] = x
    return whole


def t(name: str, **more: Any) -> dict[str, Any]:
    return {"_target_": name, "keys": "image", **more}


CASES = [
    case("flip by Flipd", [t("Flipd", spatial_axis=0)], flip, flip),
    case("flip by Lambdad", [lambd("x.flip(1)")], flip, flip),
    case("flip by Lambdad, axes of equal length", [lambd("x.flip(1)")], flip, flip, CUBE),
    case("flip in numpy", [lambd("torch.from_numpy(numpy.flip(x.numpy(), 1).copy())", track_meta=False)], flip, flip),
    case("flip without metadata", [t("EnsureTyped", track_meta=False), t("Flipd", spatial_axis=0)], flip, flip),
    case("random flip, always", [t("RandFlipd", spatial_axis=0, prob=1.0)], flip, flip),
    case("metadata lost, voxels in place", [t("EnsureTyped", track_meta=False)], same, same),
    case("numpy in between", [t("ToNumpyd"), t("EnsureTyped")], same, same),
    case("axes exchanged by Transposed", [t("Transposed", indices=[0, 2, 1, 3])], swap, swap),
    case("axes exchanged by Transposed, of equal length", [t("Transposed", indices=[0, 2, 1, 3])], swap, swap, CUBE),
    case("turned by Rotate90d", [t("Rotate90d", k=1, spatial_axes=[0, 1])], lambda x: x.rot90(1, (1, 2)),
         lambda x: x.rot90(-1, (1, 2))),
    case("orientation LPS", [t("Orientationd", axcodes="LPS", labels=None)], lambda x: x.flip(1, 2),
         lambda x: x.flip(1, 2)),
    case("crop by SpatialCropd", [t("SpatialCropd", roi_start=[2, 0, 1], roi_end=[8, 10, 5])], cut, uncut),
    case("crop by Lambdad", [lambd("x[:, 2:8, :, 1:5]")], cut, uncut),
    case("padding by SpatialPadd", [t("SpatialPadd", spatial_size=[8, 10, 8])], lambda x: F.pad(x, (1, 1)),
         lambda x: x[..., 1:7]),
    case("one slice by Lambdad, 2D network", [lambd("x[..., 3]")], lambda x: x[..., 3], in_slice, dims=2),
    case("inverted intensities", [lambd("1 - x")], lambda x: 1 - x, same),
    case("every other slice by Lambdad", [lambd("x[..., ::3]")], lambda x: x[..., ::3], None),
    case("resampled by Lambdad", [lambd("torch.nn.functional.interpolate(x[None], scale_factor=(1, 0.6, 1))[0]")],
         lambda x: F.interpolate(x[None], scale_factor=(1, 0.6, 1))[0], None),
]  # fmt: skip

FOREIGN = re.compile(r"^[A-Z]\w*(Error|Exception|Interrupt): ")
"""How a reason starts that is another exception than the package's own."""
