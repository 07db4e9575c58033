"""The overlay that fits a bundle: the included ``explain.json``, adapted to the ids of the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.errors import UsageError

__all__ = [
    "METRICS_OVERLAY",
    "MULTI_GPU_OVERLAY",
    "OVERLAY",
    "evaluator_of",
    "fitted_overlay",
    "multi_gpu_overlay",
    "shipped_overlay",
]

OVERLAY, METRICS_OVERLAY, MULTI_GPU_OVERLAY = "explain.json", "explain_metrics.json", "multi_gpu_explain.json"
HANDLERS = {OVERLAY: "@explain_handler", METRICS_OVERLAY: "@explain_metrics_handler"}


def shipped_overlay(name: str = OVERLAY) -> Path:
    """Return the path of an overlay in this package, for bundles with the ids ``handlers`` and ``output_dir``.

    ``explain.json`` explains, ``explain_metrics.json`` evaluates the maps.
    """
    return Path(str(files("esegeta_monai.bundle") / name))


def fitted_overlay(parser: ConfigParser, metadata: BundleMetadata, name: str = OVERLAY) -> dict[str, Any]:
    """Return the content of an overlay for a bundle's config, to be merged after the config.

    It differs from the included one in the list of handlers (``handlers``, ``val_handlers``, the evaluator's own, or a
    new one), the output folder if the config has no ``output_dir``, the explained output if metadata.json has several,
    and the target of a regression.

    Args:
        parser: the bundle's config; nothing of it is evaluated.
        metadata: the bundle's metadata.json.
        name: file name of the included overlay. ``explain_metrics.json`` runs alone, or after ``explain.json`` unless
            the bundle's handlers are an expression, which only one overlay can extend.

    Raises:
        UsageError: the config has no evaluator.

    >>> parser = ConfigParser({"evaluator": {"_target_": "SupervisedEvaluator"}, "bundle_root": "."})
    >>> overlay = fitted_overlay(parser, BundleMetadata({}))
    >>> overlay["evaluator#val_handlers"], overlay["explain_output_dir"]
    (['@explain_handler'], "$@bundle_root + '/explained'")
    """
    overlay: dict[str, Any] = json.loads(shipped_overlay(name).read_text(encoding="utf-8"))
    del overlay["+handlers"]
    if "bundle_root" not in parser:
        overlay["bundle_root"] = "."
    if "output_dir" not in parser:
        overlay["explain_output_dir"] = "$@bundle_root + '/explained'"
    overlay["explain_output"] = metadata.explained_output
    if metadata.declared == "regression":
        overlay["explain_targets"] = ["OutputValue(channel=0)"]
    overlay.update(_joined(parser, HANDLERS[name], behind=name == METRICS_OVERLAY))
    return overlay


def multi_gpu_overlay(parser: ConfigParser) -> dict[str, Any]:
    """Return the content of ``multi_gpu_explain.json`` for a config.

    It starts the process group, assigns a device to each process, and distributes the evaluator's cases by a
    ``DistributedSampler``.

    Raises:
        UsageError: the evaluator's data loader is not an id of the config.

    >>> loader = {"_target_": "DataLoader", "dataset": "@data"}
    >>> parser = ConfigParser({"evaluator": {"val_data_loader": "@test_loader"}, "test_loader": loader, "data": {}})
    >>> multi_gpu_overlay(parser)["test_loader#sampler"]
    '@explain_sampler'
    """
    overlay: dict[str, Any] = json.loads(shipped_overlay(MULTI_GPU_OVERLAY).read_text(encoding="utf-8"))
    evaluator = evaluator_of(parser)
    named = str(parser.get(f"{evaluator}#val_data_loader"))
    loader = named.removeprefix("@").replace("::", "#") if named.startswith("@") else f"{evaluator}#val_data_loader"
    if not isinstance(parser.get(loader), Mapping):
        raise UsageError(
            f"the data loader of {evaluator} is {named}, which is not a part of the config to which a sampler could be "
            "added: share each case's windows instead, 'torchrun -m esegeta_monai explain --share windows'"
        )
    del overlay["dataloader#sampler"]
    overlay["explain_sampler"]["dataset"] = f"@{loader}#dataset"
    overlay[f"{loader}#sampler"] = "@explain_sampler"
    return overlay


def evaluator_of(parser: ConfigParser) -> str:
    """Return the id of the evaluator that a config runs.

    Raises:
        UsageError: the config has no evaluator.
    """
    for key in ("evaluator", "validate#evaluator"):
        if isinstance(parser.get(key), Mapping):
            return key
    config: Any = parser.config or {}
    built = [
        key
        for key, value in config.items()
        if isinstance(value, Mapping) and str(value.get("_target_", "")).endswith("Evaluator")
    ]
    if built:
        return str(built[0])
    raise UsageError(
        "this config builds no evaluator to which a handler could be added; explain with 'esegeta-monai explain "
        "--bundle DIR', or from Python with esegeta_monai.Explainer"
    )


def _joined(parser: ConfigParser, handler: str, behind: bool) -> dict[str, Any]:
    """Return the entry that adds the handler after the evaluator's own ones; a checkpoint loader must stay first.

    Args:
        behind: True if another overlay may have created the list.
    """
    own = f"{evaluator_of(parser)}#val_handlers"
    handlers = parser.get(own)
    if handlers is None:
        return {f"+{own}" if behind else own: [handler]}
    if isinstance(handlers, list):
        return {f"+{own}": [handler]}
    name = str(handlers).removeprefix("@").replace("::", "#")
    if str(handlers).startswith("@") and isinstance(parser.get(name), list):
        return {f"+{name}": [handler]}
    expression = str(handlers).removeprefix("$")
    return {own: f"$list({expression}) + [{handler}]"}
