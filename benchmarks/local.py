"""Compare perturbed windows computed in parts with plain window passes, in turns within one run.

    python benchmarks/local.py [--size 64] [--perturbations 12] [--double 3] [--threads 1] [--only NAME]

For each network, occluder and target the script prints the share of work, the time of a perturbation over that of the
plain pass (processor time with one thread), the largest difference of the scores' part of the output in float32 and
float64 relative to its largest value, and the memory of the activations that are kept. With ``whole``, what the engine
does on a network in which nothing can be gained: its time over plain passes, all overhead included.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from monai.networks.nets import DenseNet121, SegResNet, UNet, resnet18
from torch import Tensor, nn

from esegeta_monai.engine.local.passes import LARGEST_SHARE, LocalPasses
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.targets import Box, Case, ClassScore


def mesh() -> nn.Module:
    """MeshNet: dilated convolutions without a norm."""
    layers: list[nn.Module] = []
    channels = 1
    for dilation in (1, 2, 4, 8, 16, 8, 4, 2, 1):
        layers += [nn.Conv3d(channels, 8, 3, padding=dilation, dilation=dilation), nn.ReLU()]
        channels = 8
    return nn.Sequential(*layers, nn.Conv3d(channels, 3, 1))


def unet(*channels: int, norm: str = "batch") -> nn.Module:
    return UNet(3, 1, 2, channels, (2,) * (len(channels) - 1), num_res_units=2, norm=norm)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet batch norm, 3 levels": lambda: unet(16, 32, 64),
    "UNet batch norm, 5 levels (spleen bundle)": lambda: unet(16, 32, 64, 128, 256),
    "MeshNet (no norm)": mesh,
    "ResNet18 3D classifier": lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=2),
    "DenseNet121 2D classifier": lambda: DenseNet121(2, 1, 2),
    "UNet instance norm": lambda: unet(16, 32, 64, norm="instance"),
    "SegResNet (group norm)": lambda: SegResNet(3, 8, 1, 2),
}


def trained_like(network: nn.Module, window: Tensor) -> nn.Module:
    """Give batch norms the statistics of an image, as training would; else the values of deep networks vanish."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.cat([window, window.flip(-1)]))
    return network.eval()


def objective_of(network: nn.Module, window: Tensor, target: str) -> Objective:
    """The case of one window, with a target of 8³ voxels near the middle, or a class."""
    with torch.no_grad():
        prediction = network(window)[0]
    if target == "class":
        wanted = ClassScore(1)
    elif target == "lesion":
        wanted = Box(1, (28,) * 3, (36,) * 3)
    else:
        wanted = Box(1, (0,) * 3, tuple(window.shape[2:]))
    plan = plan_windows(None, tuple(window.shape[2:]))
    scores = wanted.bind(prediction, Case())
    return Objective(Model(network, window.device), window[0], plan, scores, prediction)


def occluders(shape: Sequence[int], size: int, count: int) -> list[tuple[slice, ...]]:
    """Occluders of a grid, evenly chosen."""
    grid = list(itertools.product(*(range(0, n - size + 1, max(size, n // 4)) for n in shape)))
    step = max(1, len(grid) // count)
    return [tuple(slice(a, a + size) for a in at) for at in grid[::step]][:count]


def compare(network: nn.Module, window: Tensor, target: str, boxes: list[tuple[slice, ...]]) -> dict[str, float]:
    """Run perturbations in parts and plainly, in turns."""
    objective = objective_of(network, window, target)
    local = LocalPasses(objective, lambda window, out: [[] for _ in objective.scores])
    local.largest_share = float("inf")  # measure also what the engine would compute plainly
    local._checked, local._largest = {"corner", "border", "middle"}, float("inf")  # checked here, not in the times
    local.expect(0, len(boxes))
    parts, plain, worst = [], [], 0.0
    with frozen(network), torch.inference_mode():
        local.run(window, [((), 0)])
        for i, box in enumerate([boxes[0], *boxes]):
            x = window.clone()
            x[(..., *box)] = 0
            began = time.process_time()
            ours = local.run(x, [((i,), 0)])
            middle = time.process_time()
            right = objective.run(x, [0])
            if i:  # the first one also checks and warms up
                parts.append(middle - began)
                plain.append(time.process_time() - middle)
            seen = (slice(None), slice(None), *(slice(28, 36) for _ in range(3))) if target == "lesion" else ...
            worst = max(worst, float((ours[seen] - right[seen]).abs().max() / right[seen].abs().max()))
    note = local.note()
    return {
        "share": note.get("share_of_work", 1.0),
        "time": sum(parts) / sum(plain),
        "milliseconds": 1e3 * sum(plain) / len(plain),
        "difference": worst,
        "bytes": note.get("cache_bytes", 0),
    }


def whole(network: nn.Module, window: Tensor, boxes: list[tuple[slice, ...]]) -> float:
    """Return the time of scores with the engine's choice over that without passes in parts, in turns."""
    times: dict[bool, float] = {True: 0.0, False: 0.0}
    starts, stops = [[s.start for s in box] for box in boxes], [[s.stop for s in box] for box in boxes]
    for local in (True, False, True, False):
        objective = objective_of(network, window, "lesion")
        objective.context.local = local
        with frozen(network):
            began = time.process_time()
            score_changes(objective, Boxes(starts, stops))
            times[local] += time.process_time() - began
    return times[True] / times[False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--perturbations", type=int, default=12)
    parser.add_argument("--double", type=int, default=3, help="perturbations in float64, 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, windows of {args.size}³ and 224²")
    print(
        "| network | target | occluder | share of work | time | plain ms | difference float32, float64 | memory MiB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, make in NETWORKS.items():
        if args.only not in name:
            continue
        flat, classifier = "2D" in name, "classifier" in name
        shape = (224, 224) if flat else (args.size,) * 3
        torch.manual_seed(0)
        window = torch.randn(1, 1, *shape)
        network = trained_like(make(), window)
        for target in ("class",) if classifier else ("all voxels", "lesion"):
            for size in (28,) if flat else (8, 16):
                boxes = occluders(shape, size, args.perturbations)
                row = compare(network.float(), window, target, boxes)
                exact = "not measured"
                if args.double:
                    double = compare(network.double(), window.double(), target, boxes[: args.double])
                    exact = f"{double['difference']:.1e}"
                print(
                    f"| {name} | {target} | {size} | {row['share']:.3f} | {row['time']:.3f} | "
                    f"{row['milliseconds']:.0f} | {row['difference']:.1e}, {exact} | "
                    f"{row['bytes'] / 2**20:.0f} |",
                    flush=True,
                )
        if not classifier and row["share"] > LARGEST_SHARE:
            boxes = occluders(shape, 8, 24)
            print(f"{name}: {whole(network.float(), window, boxes):.3f} of plain passes, overhead included", flush=True)


if __name__ == "__main__":
    main()
