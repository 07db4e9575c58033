"""Describe the registered methods, targets and metrics, and those of a bundle's scripts, which are read as text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esegeta_monai.bundle.contents import BundleContents, printable
from esegeta_monai.bundle.listing import ExtensionSource, list_extensions
from esegeta_monai.cli.trust import listing
from esegeta_monai.errors import EsegetaError
from esegeta_monai.methods.base import METHODS, Method
from esegeta_monai.metrics import METRICS, Metric
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.names import plain_key
from esegeta_monai.utils.registry import Configurable, Registry, json_ready, registered_names_only

__all__ = ["bundle_listing", "describe", "entries_of"]

REGISTRIES: dict[str, Registry[Any]] = {r.kind: r for r in (METHODS, TARGETS, METRICS)}


def entries_of(kind: str, name: str | None = None, bundle: str | None = None) -> list[dict[str, Any]]:
    """Describe the classes of a kind, see `describe`, each with its full documentation under ``doc``.

    Args:
        kind: ``"method"``, ``"target"`` or ``"metric"``.
        name: only the class with this name or alias.
        bundle: folder of a bundle whose scripts are described as well.

    Raises:
        UsageError: there is no such name, or a script cannot be read.
    """
    registry = REGISTRIES[kind]
    sources = list_extensions(bundle, registry) if bundle else []
    own = {source.name: {**_describe_source(source), "doc": source.doc} for source in sources}
    chosen = _named(registry, name, sources) if name else None
    if isinstance(chosen, ExtensionSource):
        return [own[chosen.name]]
    classes = [chosen] if chosen is not None else [cls for cls in registry if cls.__name__ not in own]
    entries = [{**describe(cls, kind), "doc": inspect.getdoc(cls) or ""} for cls in classes]
    return entries if chosen is not None else sorted([*entries, *own.values()], key=lambda e: str(e["name"]))


def bundle_listing(bundle: str) -> list[str]:
    """Return lines that list what would run in a bundle, see `esegeta_monai.cli.trust.listing`."""
    configs = (Path(bundle) / "configs").glob("inference.*")
    return listing(BundleContents(bundle, None if any(configs) else []))


def _named(registry: Registry[Any], name: str, sources: Sequence[ExtensionSource]) -> Any:
    """Return the source or the registered class with this name or alias."""
    key = plain_key(name)
    for source in sources:
        aliases = source.stated.get("aliases")
        names = [source.name, *(aliases if isinstance(aliases, (list, tuple)) else ())]
        if key in (plain_key(str(known)) for known in names):
            return source
    with registered_names_only():
        return registry.get(name)


def _describe_source(source: ExtensionSource) -> dict[str, Any]:
    """Describe a class of a bundle by its source, with the keys of `describe`."""
    stated = source.attribute
    aliases = stated("aliases")
    entry: dict[str, Any] = {
        "name": source.name,
        "summary": printable(" ".join(source.doc.split("\n\n")[0].split()), 500),
        "parameters": {name: json_ready(value) for name, value in source.parameters.items()},
        "required": source.required,
        "file": source.file,
        "aliases": [printable(alias) for alias in aliases] if isinstance(aliases, (list, tuple)) else [],
        "reference": printable(stated("reference") or "", 300),
    }
    if issubclass(source.base, Method):
        entry |= {"produces": printable(stated("produces")), "signed": None}
        entry |= {"needs_gradient": bool(stated("needs_gradient")), "additive": bool(stated("additive"))}
    if issubclass(source.base, Metric):
        needs = stated("needs")
        entry |= {"group": printable(stated("group")), "higher_is_better": stated("higher_is_better")}
        entry |= {"needs": sorted(str(n) for n in needs) if isinstance(needs, (list, tuple, set, frozenset)) else []}
        entry |= {"meaning": printable(stated("meaning") or "", 500)}
    return entry


def describe(cls: type[Configurable], kind: str = "method") -> dict[str, Any]:
    """Describe a method, target or metric for the table, the JSON output and the documentation.

    >>> describe(METHODS.get("saliency"))["parameters"]
    {'abs': True}
    >>> describe(METHODS.get("ContrastiveLRP"))["parameters"]["composite"]
    {'convolution': 'ZPlus', 'dense': 'ZPlus'}
    """
    doc = inspect.getdoc(cls) or ""
    signature = inspect.signature(cls.__init__)
    defaults = {p: signature.parameters[p].default for p in cls.parameter_names()}
    if dataclasses.is_dataclass(cls):  # the signature has a placeholder for a default that a factory makes
        factories = {f.name: f.default_factory for f in dataclasses.fields(cls) if callable(f.default_factory)}
        defaults |= {p: make() for p, make in factories.items() if p in defaults}
    required = [p for p, value in defaults.items() if value is inspect.Parameter.empty]
    entry: dict[str, Any] = {
        "name": cls.__name__,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "parameters": {p: json_ready(value) for p, value in defaults.items() if p not in required},
        "required": required,
    }
    if issubclass(cls, Method):
        entry |= {
            "aliases": list(cls.__dict__.get("aliases", ())),
            "produces": cls.produces,
            "signed": _signed(cls),
            "needs_gradient": cls.needs_gradient,
            "additive": cls.additive,
            "reference": cls.reference,
        }
    if issubclass(cls, Metric):
        entry |= {
            "aliases": list(cls.__dict__.get("aliases", ())),
            "group": cls.group,
            "higher_is_better": cls.higher_is_better,
            "needs": sorted(cls.needs),
            "meaning": cls.meaning,
            "reference": cls.reference,
        }
    return entry


def _signed(cls: type[Method]) -> bool | None:
    """Return True if the map is signed with default parameters; None if a parameter has no default."""
    try:
        return METHODS.create(cls).signed
    except EsegetaError:  # a parameter has no default
        return None
