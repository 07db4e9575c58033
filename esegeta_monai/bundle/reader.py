"""Read the parts of a MONAI bundle that an explanation needs, for any ids, without building an Ignite engine."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from monai.transforms import Compose, SaveImaged
from monai.utils import CommonKeys, ensure_tuple
from torch import Tensor, nn

from esegeta_monai.bundle.config_overrides import check_overrides
from esegeta_monai.bundle.configs import bundle_folder, check_macros, find_config_files, merged_config
from esegeta_monai.bundle.folds import folds_of_case
from esegeta_monai.bundle.imports import BundleImports
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.weights import WeightSource, components, find_weights, load_weights, references
from esegeta_monai.engine.head import Postprocessing
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.explain.mean_ensemble import MeanOfMembers, read_mean
from esegeta_monai.utils.files import refuse_remote
from esegeta_monai.utils.types import device_named, flag

__all__ = ["BundleReader", "bundle_network", "run_id_of"]

logger = logging.getLogger(__name__)

# Ids of each part in order of priority: what the evaluator uses is what runs.
_IDS = {
    "network": ("evaluator::network", "network", "network_def", "net", "model"),
    "networks": ("evaluator::networks", "networks"),
    "inferer": ("evaluator::inferer", "inferer"),
    "preprocessing": ("preprocessing", "dataset::transform", "transforms", "transform"),
    "postprocessing": ("evaluator::postprocessing", "postprocessing"),
    "amp": ("evaluator::amp", "amp", "use_amp"),
    "handlers": ("evaluator::val_handlers", "handlers", "val_handlers"),
}
_SAVER_DEFAULTS = {name: value.default for name, value in inspect.signature(SaveImaged.__init__).parameters.items()}
_READ = {
    "bundle_root",
    "device",
    "output_dir",
    "image_key",
    *_SAVER_DEFAULTS,
    *(i for ids in _IDS.values() for i in ids),
}


class BundleReader:
    """A MONAI bundle directory; each part is built on first use and cached.

    Code execution: reading runs nothing. A part (`network`, `inferer`, …) evaluates its own id and the ids that it
    refers to; the first such evaluation also runs the config's import statements (as MONAI's `ConfigParser` does). The
    bundle's `scripts/` are imported when a part names them, with the bundle root on `sys.path` meanwhile. `run`,
    `initialize`, `finalize`, the evaluator, its handlers and the logging configuration are never evaluated. In
    expressions that load weights, only the path is evaluated.

    Args:
        bundle_dir: the bundle root, the folder with `configs/`.
        config_files: merged from left to right as by `monai.bundle run --config_file`; relative paths are relative to
            the bundle. Default: `configs/inference` with the suffix json, yaml or yml.
        overrides: values by id (nested by `::` or `#`), as on MONAI's command line; they replace values of the files.
        device: device of the network; replaces the config's `device`.
        weights: "required" raises if the checkpoint is missing, "optional" keeps the random weights and warns.

    Raises:
        UsageError: the bundle or config file does not exist; on use: the config lacks an id, or weights are missing.
        NetworkError: on use: a part cannot be built, or the weights do not fit.

    Example:
        reader = BundleReader("bundles/brain_tissue_segmentation", overrides={"network_def#out_channels": 4})
        prediction = reader.inferer(image, reader.network)
        reader.class_names                                # {0: "background", 1: "cerebrospinal fluid", …}
    """

    def __init__(
        self,
        bundle_dir: str | Path,
        config_files: str | Path | Sequence[str | Path] | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        weights: Literal["required", "optional"] = "required",
    ) -> None:
        if weights not in ("required", "optional"):
            raise UsageError(f"weights must be 'required' or 'optional', not {weights!r}")
        refuse_remote(bundle_dir)
        self.bundle_dir = bundle_folder(bundle_dir)
        self.config_files = find_config_files(self.bundle_dir, config_files)
        self.device = device_named("device", device)
        self.weights = weights
        self.metadata = BundleMetadata.read(self.bundle_dir, self._metadata_file)
        self.parser = ConfigParser()
        self.parser.read_config(merged_config(self.config_files))
        self.parser[ConfigParser.meta_key] = self.metadata.content
        overrides = dict(overrides or {})
        self._overridden = set(overrides)
        check_overrides(self.parser.config, overrides, self._files, _READ)
        self.parser.update({**self._own_values(), **overrides})
        content: Any = self.parser.config
        self.macro_files = tuple(check_macros(content, self.config_files))
        try:
            self.parser.resolve_macro_and_relative_ids()
        except (KeyError, IndexError, ValueError) as error:
            raise UsageError(f"the relative ids of {self._files} cannot be resolved: {_cause(error)}") from error
        self.importable = BundleImports(self.bundle_dir)

    def __repr__(self) -> str:
        return f"BundleReader({self.name!r}, {self._files}, device={self.device})"

    # ------------------------------------------------------------------ executable parts

    @cached_property
    def network(self) -> nn.Module:
        """The network with its weights, on `device`, in evaluation mode; of an ensemble, the first one.

        Raises:
            UsageError: the config has no id for it, or required weights are missing.
            NetworkError: it cannot be built, is not a module, or the weights do not fit.
        """
        if self.is_ensemble:
            return self.networks[0]
        source = self.weight_source
        network = self._part("network")
        if not isinstance(network, nn.Module):
            raise NetworkError(f"'{self.id_of('network')}' of {self._files} is a {type(network).__name__}, no module")
        return self._loaded(network, source)

    @property
    def is_ensemble(self) -> bool:
        """True if the evaluator has several networks (`EnsembleEvaluator`)."""
        return self.has("networks") and "evaluator::network" not in self.parser

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks of an ensemble with their weights, on `device`, in evaluation mode.

        Raises:
            UsageError: required weights are missing, or it is not known which file belongs to which network.
            NetworkError: one cannot be built, is not a module, or the weights do not fit.
        """
        built = self._part("networks")
        if not isinstance(built, (list, tuple)) or not all(isinstance(network, nn.Module) for network in built):
            raise NetworkError(f"'{self.id_of('networks')}' of {self._files} is no list of networks")
        return [self._loaded(network, source) for network, source in zip(built, self.weight_sources)]

    def _loaded(self, network: nn.Module, source: WeightSource) -> nn.Module:
        if self.weights == "optional" and not source.path.is_file():
            logger.warning("%s: no weights at %s, the network keeps its random weights", self.name, source.path)
        else:
            load_weights(network, source, self.device)
        return network.to(self.device).eval()

    @cached_property
    def inferer(self) -> Inferer | Callable[..., Any]:
        """The inferer of the bundle, called as `inferer(inputs, network)`; of an ensemble, an `EnsembleInferer`.

        Raises:
            UsageError: an ensemble that is not averaged, see `esegeta_monai.explain.mean_ensemble.read_mean`.
        """
        if not self.is_ensemble:
            return self._part("inferer")
        inner = self._part("inferer") if self.has("inferer") else None
        mean = self._mean
        return EnsembleInferer(inner, self.networks, weights=mean.weights, average=mean.average)

    @cached_property
    def _mean(self) -> MeanOfMembers:
        """How the postprocessing averages the networks of an ensemble."""
        given = self.resolve("evaluator::pred_keys") if "evaluator::pred_keys" in self.parser else None
        keys = [f"pred_{i}" for i in range(len(self.weight_sources))] if given is None else ensure_tuple(given)
        return read_mean(self.postprocessing, [str(key) for key in keys])

    @property
    def roi(self) -> Sequence[int] | int | None:
        """Shape of a window, or its edge along all axes; None: the inferer has none."""
        return getattr(self.inferer, "roi_size", None)

    @cached_property
    def preprocessing(self) -> Compose:
        """The transforms from file names to the network's input, always a `Compose`."""
        return self._compose("preprocessing")

    @cached_property
    def postprocessing(self) -> Compose:
        """The transforms from prediction to output file; empty if the bundle has none."""
        return self._compose("postprocessing") if self.has("postprocessing") else Compose([])

    @cached_property
    def output_use(self) -> Postprocessing:
        """The use that the bundle makes of the network's output, by its postprocessing and metadata.

        Raises:
            NetworkError: the postprocessing cannot be built.
        """
        if self.is_ensemble:
            use = Postprocessing.of(list(self._mean.after), self._mean.key, self.metadata.declared)
        else:
            use = Postprocessing.of(self.postprocessing, declared=self.metadata.declared)
        explained = self.metadata.explained_output
        return use if explained is None else replace(use, keys=(explained, *use.keys))

    @cached_property
    def amp(self) -> bool:
        """True if the evaluator runs the network under autocast."""
        return flag("amp", self._part("amp")) if self.has("amp") else False

    # ------------------------------------------------------------------ metadata

    @property
    def name(self) -> str:
        """The name in the metadata, else the name of the folder."""
        return self.metadata.name or self.bundle_dir.name

    @property
    def version(self) -> str | None:
        """The version in the metadata, or None."""
        return self.metadata.version

    @property
    def task(self) -> str | None:
        """Free text in the metadata on the purpose of the bundle, or None."""
        return self.metadata.task

    @property
    def class_names(self) -> dict[int, str]:
        """Class names by output channel; empty if the metadata has none."""
        return self.metadata.class_names

    @property
    def background(self) -> int | None:
        """The class named background, or None."""
        return self.metadata.background

    @property
    def channel_names(self) -> dict[int, str]:
        """Names by input channel; empty if the metadata has none."""
        return self.metadata.channel_names

    @cached_property
    def image_key(self) -> str:
        """The dictionary key of the network's input: the config's `image_key`, else MONAI's default "image" if
        the preprocessing loads or creates it, else the first key it loads."""
        if "image_key" in self.parser:
            return str(self.resolve("image_key"))
        loaders = self._components("LoadImaged", "preprocessing")
        keys = ensure_tuple(self.resolve(f"{loaders[0][0]}::keys")) if loaders else tuple(self.metadata.inputs)
        if str(CommonKeys.IMAGE) in map(str, keys) or self._mentions_image("preprocessing"):
            return str(CommonKeys.IMAGE)
        if keys:
            return str(keys[0])
        raise self._lacks("image_key", ("image_key", "LoadImaged in preprocessing"), "image_key=image")

    @cached_property
    def output_dir(self) -> Path:
        """Output folder of the bundle; a relative path is relative to the working directory, as in MONAI."""
        if "output_dir" in self._overridden or self._saver is None or "output_dir" not in self._saver[1]:
            return Path(self.resolve("output_dir")) if "output_dir" in self.parser else self.bundle_dir / "eval"
        return Path(self._saved("output_dir"))

    @cached_property
    def output_postfix(self) -> str:
        """The postfix that the bundle's SaveImaged appends to file names (MONAI's default: "trans")."""
        return str(self._saved("output_postfix"))

    @cached_property
    def output_ext(self) -> str:
        """The extension that the bundle's SaveImaged writes, with its dot (MONAI's default: ".nii.gz")."""
        return "." + str(self._saved("output_ext")).lstrip(".")

    @cached_property
    def separate_folder(self) -> bool:
        """True if the bundle's SaveImaged gives each case a folder (MONAI's default)."""
        return bool(self._saved("separate_folder"))

    @cached_property
    def weight_source(self) -> WeightSource:
        """The checkpoint that the bundle loads, and the entry of the config that names it; the file may be missing."""
        if self.is_ensemble:
            return self.weight_sources[0]
        return find_weights(self.parser, self.id_of("network"), self.bundle_dir, self.resolve)

    @cached_property
    def weight_sources(self) -> list[WeightSource]:
        """The checkpoint of each network, several for an ensemble.

        Raises:
            UsageError: the networks of an ensemble are no list in the config, or nothing names the file of one.
        """
        if not self.is_ensemble:
            return [self.weight_source]
        key = self.id_of("networks")
        listed = self.parser[key]
        if not isinstance(listed, list):
            raise UsageError(
                f"'{key}' of {self._files} is no list, so it is not known which weights belong to which network: write "
                '["@network_0", "@network_1"]'
            )
        sources = [find_weights(self.parser, f"{key}::{i}", self.bundle_dir, self.resolve) for i in range(len(listed))]
        unnamed = [i for i, source in enumerate(sources) if source.found_in == "the bundle format"]
        if unnamed:
            raise UsageError(
                f"no CheckpointLoader or load_state_dict of {self._files} names the weights of network {unnamed[0]} of "
                f"'{key}': add one, with load_dict {{'model': '@network_{unnamed[0]}'}}"
            )
        return sources

    @property
    def provenance(self) -> dict[str, Any]:
        """Name and version, and the SHA-256 of each config file by file name, JSON-ready."""
        from esegeta_monai.bundle.provenance import bundle_provenance  # reads this module's overlays

        return bundle_provenance(self.bundle_dir)

    def case_arguments(
        self, image: Tensor, data: Mapping[Any, Any], path: Path | None = None, *, predict: bool = True
    ) -> dict[str, Any]:
        """Return the arguments of `esegeta_monai.Explainer` for a case, besides image, methods and targets.

        Args:
            image: the preprocessed image (C, *spatial).
            data: the data dictionary of the case.
            path: file name of the segmentation, without extension, where the model's own code writes one.
            predict: False: the model's own code does not predict, since only costs are estimated.
        """
        return {"data": data}

    def sample_condition(self, spatial: Sequence[int]) -> Tensor | None:
        """Return what stands for the network's ``condition`` (C, *spatial) on noise; None: it has none."""
        return None

    def training_folds(self, case: str) -> dict[str, str]:
        """Return for each fold of an ensemble whether a case was in its training set; empty if nothing is known.

        See `esegeta_monai.bundle.folds.folds_of_case`.
        """
        return folds_of_case(self.bundle_dir, case)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of weights (if present), config files and metadata.json by path in the bundle."""
        files = [*(source.path for source in self.weight_sources), *self.config_files, self._metadata_file]
        return {self._relative(file): _sha256(file) for file in files if file.is_file()}

    # ------------------------------------------------------------------ ids

    def has(self, part: str) -> bool:
        """Return True if the config has an id for `part` (an attribute of this class like "inferer", or "handlers")."""
        return self._find(part) is not None

    def id_of(self, part: str) -> str:
        """Return the id of `part` in the config; references are followed, so it is `handlers` and not
        `evaluator::val_handlers`.

        Raises:
            UsageError: there is none; the message lists the candidate ids and a suitable override.
        """
        key = self._find(part)
        if key is None:
            raise self._lacks(part, _IDS[part], f"{part}=@id_of_yours")
        seen = {key}
        while isinstance(value := self.parser[key], str) and value.startswith("@") and value[1:] in self.parser:
            key = value[1:]
            if key in seen:
                raise UsageError(f"'{key}' of {self._files} refers to itself")
            seen.add(key)
        return key

    @property
    def run_id(self) -> str | None:
        """The id that runs the evaluator (`run`, `evaluating`, …), or None."""
        return _running(self.parser)

    def resolve(self, key: str) -> Any:
        """Return the value of any id; the bundle's own `scripts/` can be imported meanwhile.

        Raises:
            UsageError: the id does not exist.
            NetworkError: building it failed; the message has the cause and a suitable override.
        """
        if key not in self.parser:
            raise self._lacks(key, (key,), f"{key.replace('::', '#')}=VALUE")
        with self.importable():
            try:
                value = self.parser.get_parsed_content(key)
            except Exception as error:  # a bundle's own code can raise anything
                parts = [name for name in sorted(references(self.parser, key)) if self._is_built(name)] or [key]
                raise NetworkError(
                    f"'{key}' of {self._files} cannot be built: {_cause(error)}; install what is missing, or override "
                    f"{' or '.join(parts[:4])}, whole or in part, on the command line "
                    f"--override {parts[0]}#ARGUMENT=VALUE"
                ) from error
        return getattr(value, "_raw", value)

    # ------------------------------------------------------------------ internals

    @property
    def _metadata_file(self) -> Path:
        return self.config_files[0].parent / "metadata.json"  # MONAI's rule: beside the first config

    def _own_values(self) -> dict[str, Any]:
        values: dict[str, Any] = {"bundle_root": str(self.bundle_dir)}
        if "device" in self.parser:
            values["device"] = self.device
        return values

    def _find(self, part: str) -> str | None:
        if part == "network" and self.is_ensemble:
            part = "networks"
        ids = sorted(_IDS[part], key=lambda key: key not in self._overridden)
        return next((key for key in ids if key in self.parser and self.parser[key] is not None), None)

    def _part(self, part: str) -> Any:
        return self.resolve(self.id_of(part))

    def _compose(self, part: str) -> Compose:
        transforms = self._part(part)
        if isinstance(transforms, Compose):
            return transforms
        if isinstance(transforms, (list, tuple)) or callable(transforms):
            return Compose(transforms)
        raise UsageError(f"'{self.id_of(part)}' of {self._files} is a {type(transforms).__name__}, not a transform")

    def _is_built(self, key: str) -> bool:
        return isinstance(self.parser[key], Mapping) and "_target_" in self.parser[key]

    def _mentions_image(self, part: str) -> bool:
        """Return True if `part` or anything it refers to mentions MONAI's default key of the image."""
        roots = references(self.parser, self.id_of(part)) if self.has(part) else ()
        text = json.dumps([self.parser[root] for root in roots], default=str)
        return f'"{CommonKeys.IMAGE}"' in text or f"'{CommonKeys.IMAGE}'" in text or "CommonKeys.IMAGE" in text

    def _components(self, target: str, part: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return all `target` components of `part` with their ids."""
        if not self.has(part):
            return []
        within = references(self.parser, self.id_of(part))
        everything = components(self.parser.config)
        return [
            (key, content)
            for key, content in everything
            if str(content["_target_"]).rpartition(".")[2] == target
            and any(key == root or key.startswith(f"{root.replace('#', '::')}::") for root in within)
        ]

    @cached_property
    def _saver(self) -> tuple[str, Mapping[str, Any]] | None:
        """Return the bundle's SaveImaged, that of the prediction if there are several."""
        savers = self._components("SaveImaged", "postprocessing")
        return next((saver for saver in savers if "pred" in str(saver[1].get("keys"))), next(iter(savers), None))

    def _saved(self, option: str) -> Any:
        if self._saver is not None and option in self._saver[1]:
            return self.resolve(f"{self._saver[0]}::{option}")
        if self._saver is None and option in self.parser:  # it saves with its own class, with MONAI's parameter names
            return self.resolve(option)
        return _SAVER_DEFAULTS[option]

    @property
    def _files(self) -> str:
        return " + ".join(map(self._relative, self.config_files))

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.bundle_dir).as_posix() if file.is_relative_to(self.bundle_dir) else file.name

    def _lacks(self, part: str, ids: Sequence[str], override: str) -> UsageError:
        return UsageError(
            f"bundle {self.name!r} has no {part}: {self._files} has none of the ids {', '.join(ids)}; set the id with "
            f"overrides, on the command line --override {override}"
        )


def bundle_network(bundle_dir: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Return a bundle's network with its weights, in evaluation mode.

    A config can use it as ``_target_`` if no engine loads the checkpoint (MONAI Label, MONAI Deploy).
    """
    return BundleReader(bundle_dir, device=device).network


def run_id_of(parser: ConfigParser) -> str:
    """Return the id that runs a config's evaluator.

    Raises:
        UsageError: no id runs it.
    """
    run_id = _running(parser)
    if run_id is None:
        raise UsageError("no id of this config runs its evaluator: name the one to run with run_id")
    return run_id


def _running(parser: ConfigParser) -> str | None:
    config: Any = parser.config
    ids = [key for key, value in config.items() if "@evaluator.run" in json.dumps(value, default=str)]
    return "run" if "run" in ids else next(iter(ids), None)


def _cause(error: BaseException) -> str:
    """Return the innermost cause in one line; MONAI wraps it in the place of the error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
