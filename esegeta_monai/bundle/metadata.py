"""What a bundle says of itself in metadata.json; any of it may be missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esegeta_monai.errors import UsageError

__all__ = ["BundleMetadata"]

logger = logging.getLogger("esegeta_monai")

_BACKGROUND = ("background", "bg", "back ground")


class BundleMetadata:
    """The content of a metadata.json, by meaning.

    >>> spleen = {"0": "background", "1": "spleen"}
    >>> metadata = BundleMetadata({"network_data_format": {"outputs": {"pred": {"channel_def": spleen}}}})
    >>> metadata.class_names, metadata.background, metadata.name
    ({0: 'background', 1: 'spleen'}, 0, None)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = dict(content)

    @classmethod
    def read(cls, bundle_root: str | Path, file: Path | None = None) -> BundleMetadata:
        """The metadata.json of a bundle; empty, with a warning, where there is none.

        Args:
            bundle_root: the bundle.
            file: where it lies, since MONAI reads the one beside the first config; None: ``configs/metadata.json``.

        Raises:
            UsageError: the file is no JSON object.
        """
        root = Path(bundle_root)
        file = file or root / "configs" / "metadata.json"
        shown = file.relative_to(root) if file.is_relative_to(root) else file
        if not file.is_file():
            logger.warning("%s has no %s: names of classes and channels are unknown", root.name, shown)
            return cls({})
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{shown} is no valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{shown} must hold a JSON object")
        return cls(content)

    @property
    def name(self) -> str | None:
        """The bundle's name."""
        return self._text("name")

    @property
    def version(self) -> str | None:
        """The bundle's version."""
        return self._text("version")

    @property
    def task(self) -> str | None:
        """Free text on what the bundle does, such as "Decathlon spleen segmentation"."""
        return self._text("task")

    @property
    def inputs(self) -> dict[str, Any]:
        """The network's inputs: name to format; empty where nothing is said."""
        return self._data_format("inputs")

    @property
    def outputs(self) -> dict[str, Any]:
        """The network's outputs: name to format; several for networks with several heads."""
        return self._data_format("outputs")

    @property
    def class_names(self) -> dict[int, str]:
        """Output channel to name, of the output "pred" or else the first that names its channels; may be empty."""
        for output in sorted(self.outputs, key=lambda name: name != "pred"):
            if names := _channel_names(self.outputs[output]):
                return names
        return {}

    @property
    def background(self) -> int | None:
        """The class that is named background, or None: sigmoid outputs and classifications often have none."""
        return next((index for index, name in self.class_names.items() if name.strip().lower() in _BACKGROUND), None)

    @property
    def channel_names(self) -> dict[int, str]:
        """Input channel to name, such as {0: "T1c", 1: "T1"}, of "image" or else the first input; one name that
        stands for several channels is numbered."""
        data_format: Any = self.inputs.get("image") or next(iter(self.inputs.values()), {})
        names = _channel_names(data_format)
        count = data_format.get("num_channels") if isinstance(data_format, Mapping) else None
        if isinstance(count, int) and count > len(names):
            stem = names.get(0, "channel")
            return {i: names[i] if i in names and len(names) > 1 else f"{stem} {i}" for i in range(count)}
        return names

    def _text(self, key: str) -> str | None:
        value = self.content.get(key)
        return None if value is None else str(value)

    def _data_format(self, side: str) -> dict[str, Any]:
        formats = self.content.get("network_data_format")
        declared = formats.get(side) if isinstance(formats, Mapping) else None
        return dict(declared) if isinstance(declared, Mapping) else {}


def _channel_names(data_format: Any) -> dict[int, str]:
    known = data_format if isinstance(data_format, Mapping) else {}
    names = known.get("channel_def") or known.get("label_def")
    if isinstance(names, (list, tuple)):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping):
        return {}
    return {int(index): str(name) for index, name in names.items() if str(index).isdigit()}
