"""Describe a bundle by the text of its configs: nothing is evaluated, imported or opened but JSON and YAML."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from esegeta_monai.bundle.configs import parse_config
from esegeta_monai.bundle.contents import printable
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.weights import components, find_weights, references
from esegeta_monai.errors import EsegetaError, UsageError

__all__ = ["StaticBundle", "describe_nnunet"]

_REFERENCE = re.compile(r"@(\w+(?:(?:::|#)\w+)*)")
_MAX_FOLLOWED = 20


class StaticBundle:
    """Description of a bundle by its configs, as text.

    References (``@id``) are followed as text, and texts that are only added (``$@bundle_root + '/models/model.pt'``)
    are joined. Everything else that needs an evaluation is shown as the expression that it is.

    Args:
        reader: the bundle; none of its parts is built.
    """

    def __init__(self, reader: BundleReader) -> None:
        self.reader = reader

    def value(self, key: str) -> Any:
        """Return the value of an id: a literal, else the text of its expression."""
        return self._plain(self.reader.parser[key])

    def component(self, part: str) -> str:
        """Return the target of a part such as "network", with the expression around it if there is one.

        Raises:
            UsageError: the config has no id for it.
        """
        key = self.reader.id_of(part)
        content = self.reader.parser[key]
        if isinstance(content, Mapping):
            return printable(content.get("_target_", "settings without _target_"))
        named = [t for k in sorted(references(self.reader.parser, key)) for t in self._targets(k) if k != key]
        return f"{', '.join(named)} ({printable(content)})" if named else printable(content)

    def options(self, part: str) -> dict[str, Any]:
        """Return the literal arguments of a part, by name."""
        content = self.reader.parser[self.reader.id_of(part)]
        if not isinstance(content, Mapping):
            return {}
        values = {str(k): self._plain(v) for k, v in content.items() if not str(k).startswith("_")}
        return {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str, list))}

    def weights(self) -> str:
        """Return the name of the checkpoint that the config loads, if it is there, and the entry that names it."""
        try:
            source = find_weights(
                self.reader.parser, self.reader.id_of("network"), self.reader.bundle_dir, self._resolved
            )
        except EsegetaError as error:
            return printable(error, 300)
        there = "found" if source.path.is_file() else "missing"
        return f"{printable(source.path.name)} ({there}, {printable(source.found_in)})"

    def image_key(self) -> str | None:
        """Return the key of the network's input as the config states it, or None."""
        parser = self.reader.parser
        if "image_key" in parser:
            return printable(self.value("image_key"))
        if not self.reader.has("preprocessing"):
            return None
        within = references(parser, self.reader.id_of("preprocessing"))
        for key, content in components(parser.config):
            roots = [root.replace("#", "::") for root in within]
            if str(content["_target_"]).rpartition(".")[2] == "LoadImaged" and any(
                key == root or key.startswith(f"{root}::") for root in roots
            ):
                keys = [str(k) for k in ensure_tuple(self._plain(content.get("keys", "image")))]
                return "image" if "image" in keys else printable(keys[0]) if keys else None
        return None

    def describe(self) -> dict[str, Any]:
        """Return the description that ``esegeta-monai info`` prints, JSON-ready."""
        reader = self.reader
        return {
            "name": printable(reader.name),
            "version": None if reader.version is None else printable(reader.version),
            "task": None if reader.task is None else printable(reader.task, 300),
            "configs": ", ".join(printable(file.name) for file in reader.config_files),
            "network": self.component("network"),
            "weights": self.weights(),
            "inferer": self.component("inferer") if reader.has("inferer") else None,
            "inferer_options": self.options("inferer") if reader.has("inferer") else {},
            "amp": self.value(reader.id_of("amp")) if reader.has("amp") else False,
            "classes": {str(k): printable(v) for k, v in reader.class_names.items()},
            "background": reader.background,
            "channels": {str(k): printable(v) for k, v in reader.channel_names.items()},
            "image_key": self.image_key(),
        }

    # -- internals --------------------------------------------------------------------------------------------------

    def _targets(self, key: str) -> list[str]:
        content = self.reader.parser[key]
        return [printable(content["_target_"])] if isinstance(content, Mapping) and "_target_" in content else []

    def _resolved(self, key: str) -> Any:
        value = self.reader.parser[key]
        literal = self._literal(value)
        if literal is None:
            raise UsageError(f"known only when the network is built: {value}")
        return literal

    def _plain(self, value: Any) -> Any:
        literal = self._literal(value)
        if literal is not None:
            return printable(literal) if isinstance(literal, str) else literal
        return (
            None
            if value is None
            else printable(json.dumps(value, default=str) if not isinstance(value, str) else value)
        )

    def _literal(self, value: Any, followed: int = 0) -> Any:
        """Return a value without expressions, with references and sums of texts replaced; None if that fails."""
        if isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, list):
            values = [self._literal(inner, followed + 1) for inner in value] if followed < _MAX_FOLLOWED else [None]
            return None if any(inner is None for inner in values) else values
        if not isinstance(value, str) or followed >= _MAX_FOLLOWED:
            return None
        if value.startswith("@"):
            key = value[1:]
            return self._literal(self.reader.parser[key], followed + 1) if key in self.reader.parser else None
        if not value.startswith("$"):
            return value
        try:
            tree = ast.parse(_REFERENCE.sub(lambda match: _as_name(match[1]), value[1:].strip()), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        return self._joined(tree, followed + 1)

    def _joined(self, node: ast.AST, followed: int) -> Any:
        if followed >= _MAX_FOLLOWED:
            return None
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
            return node.value
        if isinstance(node, ast.Name) and node.id.startswith(_MARK):
            key = _as_id(node.id)
            return self._literal(self.reader.parser[key], followed + 1) if key in self.reader.parser else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._joined(node.left, followed + 1), self._joined(node.right, followed + 1)
            if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) < 4096:
                return left + right
        return None


_MARK = "__static_"


def _as_name(key: str) -> str:
    return _MARK + key.replace("::", "__of__").replace("#", "__of__")


def _as_id(name: str) -> str:
    return name.removeprefix(_MARK).replace("__of__", "::")


def describe_nnunet(folder: str | Path) -> dict[str, Any]:
    """Describe an nnU-Net model folder by ``plans.json``, ``dataset.json`` and its file names, JSON-ready.

    No checkpoint is opened, and nnU-Net is not imported.

    Args:
        folder: the model folder.

    Raises:
        UsageError: a file is missing, cannot be read, or has not the entries of nnU-Net v2.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise UsageError(f"no nnU-Net folder at {folder}: there is no such folder")
    plans, dataset = parse_config(root / "plans.json"), parse_config(root / "dataset.json")
    configuration = root.name.rpartition("__")[2]
    try:
        chosen = _inherited(plans["configurations"], configuration)
        channels = dataset.get("channel_names") or dataset.get("modality") or {}
        labels = dataset["labels"]
        architecture = chosen.get("architecture") or {}
        network = architecture.get("network_class_name") or chosen.get("UNet_class_name") or "not named in plans.json"
        return {
            "name": printable(f"{root.parent.name}_{configuration}"),
            "task": None if dataset.get("description") is None else printable(dataset["description"], 300),
            "configs": "plans.json, dataset.json",
            "configuration": printable(configuration),
            "network": printable(network),
            "window": chosen.get("patch_size"),
            "folds": ", ".join(sorted(printable(file.parent.name) for file in root.glob("fold_*/*.pth"))),
            "classes": {printable(name): printable(label) for name, label in labels.items()},
            "channels": {str(k): printable(v) for k, v in channels.items()},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{root.name}: plans.json and dataset.json are incomplete ({type(error).__name__}: {printable(error)})"
        ) from error


def _inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with the entries of those from which it inherits; empty if it is not in the plans."""
    entries: dict[str, Any] = {}
    visited: set[str] = set()
    while name in configurations and name not in visited:
        visited.add(name)
        entries = {**configurations[name], **entries}
        name = str(configurations[name].get("inherits_from"))
    return entries
