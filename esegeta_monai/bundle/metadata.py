"""Read a bundle's metadata.json; every entry is optional."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esegeta_monai.bundle.configs import parse_config
from esegeta_monai.engine.head import Declared

__all__ = ["BundleMetadata"]

logger = logging.getLogger("esegeta_monai")

_BACKGROUND = ("background", "bg", "back ground")
_SEGMENTATION = ("segmentation", "labels")
_DECLARED: dict[Declared, tuple[str, ...]] = {
    "regression": ("points", "tuples", "regression"),
    "probabilities": ("probability", "probabilities"),
    "logits": ("logit", "logits"),
}


class BundleMetadata:
    """The entries of a metadata.json, by meaning.

    >>> spleen = {"0": "background", "1": "spleen"}
    >>> metadata = BundleMetadata({"network_data_format": {"outputs": {"pred": {"channel_def": spleen}}}})
    >>> metadata.class_names, metadata.background, metadata.name
    ({0: 'background', 1: 'spleen'}, 0, None)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = dict(content)

    @classmethod
    def read(cls, bundle_root: str | Path, file: Path | None = None) -> BundleMetadata:
        """Read the metadata.json of a bundle; if there is none, warn and return empty metadata.

        Args:
            bundle_root: the bundle directory.
            file: its path (MONAI reads the file beside the first config); None: ``configs/metadata.json``.

        Raises:
            UsageError: the file is not a JSON object.
        """
        root = Path(bundle_root)
        file = file or root / "configs" / "metadata.json"
        shown = file.relative_to(root) if file.is_relative_to(root) else file
        if not file.is_file():
            logger.warning("%s has no %s: names of classes and channels are unknown", root.name, shown)
            return cls({})
        return cls(parse_config(file))

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
        """Free text on the purpose of the bundle, such as "Decathlon spleen segmentation"."""
        return self._text("task")

    @property
    def inputs(self) -> dict[str, Any]:
        """Formats of the network's inputs by name; may be empty."""
        return self._data_format("inputs")

    @property
    def outputs(self) -> dict[str, Any]:
        """Formats of the network's outputs by name; several for networks with several heads."""
        return self._data_format("outputs")

    @property
    def explained_output(self) -> str | None:
        """The output to explain: None for a single output, else the first one called a segmentation."""
        outputs = self.outputs
        if len(outputs) < 2 or "pred" in outputs:
            return None
        kinds = {name: str(f.get("format") if isinstance(f, Mapping) else "").lower() for name, f in outputs.items()}
        masks = [name for name, kind in kinds.items() if any(word in kind for word in _SEGMENTATION)]
        return str(next(iter(masks or kinds)))

    @property
    def declared(self) -> Declared | None:
        """The meaning of the output "pred" or of the only one by its type or format, or None."""
        outputs = self.outputs
        pred: Any = outputs.get("pred") or (next(iter(outputs.values())) if len(outputs) == 1 else None)
        words = [str(pred.get(key)).lower() for key in ("type", "format")] if isinstance(pred, Mapping) else []
        return next((kind for kind, known in _DECLARED.items() if any(word in known for word in words)), None)

    @property
    def class_names(self) -> dict[int, str]:
        """Class names by output channel, of the output "pred" or the first with channel names; may be empty."""
        for output in sorted(self.outputs, key=lambda name: name != "pred"):
            if names := _channel_names(self.outputs[output]):
                return names
        return {}

    @property
    def background(self) -> int | None:
        """The class named background, or None; sigmoid outputs and classifications often have none."""
        return next((index for index, name in self.class_names.items() if name.strip().lower() in _BACKGROUND), None)

    @property
    def channel_names(self) -> dict[int, str]:
        """Names by input channel, such as {0: "T1c", 1: "T1"}, of "image" or the first input; a single name for
        several channels is numbered."""
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
