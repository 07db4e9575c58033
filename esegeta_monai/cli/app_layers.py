"""Jobs of the app that look into the network: its layers, and the channels of one of them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.cli import explain
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.concepts import case_concepts
from esegeta_monai.explain.network_layers import cell_of, central_window, layer_output, network_layers
from esegeta_monai.files.pictures.picture import display_affine
from esegeta_monai.targets.base import TARGETS

if TYPE_CHECKING:
    from esegeta_monai.cli.app_jobs import Resident

__all__ = ["channels", "layers"]

SHOWN = 48
"""Number of channels with a picture: the first ones in the chosen order."""


def layers(resident: Resident, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network's layers with shapes and times, on the window that holds the middle of the image."""
    loaded = resident.case(request["case"])
    network = loaded.predicted.objective([])
    window = central_window(network, [n // 2 for n in network.plan.spatial_shape])
    rows = network_layers(network, window)
    return {
        "layers": [asdict(row) for row in rows],
        "window": list(network.plan.roi),
        "device": str(network.model.device),
    }


def channels(resident: Resident, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return pictures of a layer's channels at a place, in the order of activation or of relevance.

    The picture is the slice through the place of what the layer gives for the window that holds it. Activation is the
    mean of |A| over the window; relevance is that of `LayerLRP` for the question's target, over all windows.

    Args:
        request: ``case``; ``layer``: its name; ``world``: place, mm; ``plane``: axes ``through``, ``across``, ``up``
            of the picture in RAS order, and ``mirrored``; ``order``: activation or relevance; ``target``.

    Raises:
        EsegetaError: the layer has no picture for each channel, or its relevance cannot be computed.
    """
    loaded, layer = resident.case(request["case"]), request["layer"]
    network = loaded.predicted.objective([])
    voxel = resident.voxel(loaded, request["world"])
    window = central_window(network, voxel)
    output = layer_output(network, layer, window)
    mean = output.flatten(1).abs().mean(1) if output.ndim > 1 else output.abs()
    share = None if request["order"] == "activation" else _relevance(resident, request)
    if share is not None and len(share) != len(mean):
        raise UsageError(
            f"the layer {layer!r} gives {len(mean)} channels, its relevance {len(share)}: sort by activation"
        )
    order = (mean if share is None else share).argsort(descending=True, stable=True).tolist()[:SHOWN]
    entries: list[dict[str, Any]] = [
        {"channel": c, "activation": float(mean[c]), "share": None if share is None else float(share[c])} for c in order
    ]
    answer: dict[str, Any] = {"layer": layer, "channels": entries, "total": len(mean), "voxel": list(voxel)}
    if output.ndim == 1:
        for entry in entries:
            entry["value"] = float(output[entry["channel"]])
        return answer
    cell = cell_of(voxel, network, window, output.shape[1:])
    affine, _ = display_affine(loaded.prepared.image)
    for entry in entries:
        picture, at = _slice(output[entry["channel"]], cell, affine, request["plane"])
        low, high = float(picture.min()), float(picture.max())
        grey = np.rint(255 * (picture - low) / (high - low if high > low else 1.0)).astype(np.uint8)
        entry |= {"low": low, "high": high, "grey": base64.b64encode(grey.tobytes()).decode("ascii")}
        answer |= {"height": picture.shape[0], "width": picture.shape[1], "at": at}
    return answer


def _relevance(resident: Resident, request: Mapping[str, Any]) -> Tensor:
    """Return the share of each channel of the layer in the relevance of the target, (C,)."""
    case = request["case"]
    targets = explain.bundle_targets(resident.reader) if request.get("target") is None else None
    chosen = TARGETS.create_all([request["target"]]) if targets is None else targets
    prepared = resident.case(case).prepared
    explainer = explain.explainer_for(resident.reader, resident.options("explain", case))
    image = prepared.image[None]
    assert isinstance(image, MetaTensor)
    concepts = case_concepts(explainer, image, resident.cases[case].name, chosen, request["layer"], **prepared.given)
    if not concepts:
        raise UsageError("the target is empty on this case: ask about another one, or sort by activation")
    return torch.stack([entry.share for entry in concepts]).mean(0)


def _slice(
    values: Tensor, cell: tuple[int, ...], affine: np.ndarray, plane: Mapping[str, Any]
) -> tuple[np.ndarray, list[int]]:
    """Return a slice as the viewer shows it, rows downwards, and the row and column of a position.

    Args:
        values: (*positions), in the order of the image's axes.
        cell: the position.
        affine: (4, 4) of the image, RAS mm.
        plane: see `channels`.

    >>> plane = {"through": 2, "across": 0, "up": 1, "mirrored": True}
    >>> picture, at = _slice(torch.arange(6.0).reshape(2, 3, 1), (0, 0, 0), np.eye(4), plane)
    >>> picture.tolist(), at
    ([[5.0, 2.0], [4.0, 1.0], [3.0, 0.0]], [2, 1])
    """
    array = values.cpu().numpy()
    array, at = array.reshape(*array.shape, *(1,) * (3 - array.ndim)), [*cell, *(0,) * (3 - len(cell))]
    towards = nib.orientations.io_orientation(affine)
    for source, (axis, sign) in enumerate(towards):
        if np.isfinite(axis) and sign < 0:
            array = np.flip(array, source)
            at[source] = array.shape[source] - 1 - at[source]
    order = np.argsort(towards[:, 0])
    array, at = array.transpose(order), [at[i] for i in order]
    picture = np.take(array, at[plane["through"]], plane["through"])
    across, up = at[plane["across"]], at[plane["up"]]
    picture = picture if plane["up"] < plane["across"] else picture.T
    picture, up = picture[::-1], picture.shape[0] - 1 - up
    if plane["mirrored"]:
        picture, across = picture[:, ::-1], picture.shape[1] - 1 - across
    return np.ascontiguousarray(picture), [int(up), int(across)]
