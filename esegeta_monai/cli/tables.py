"""``esegeta-monai methods``, ``targets`` and ``metrics``: list the registered classes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from argparse import ArgumentParser, Namespace
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
from esegeta_monai.utils.registry import Configurable, Registry, json_ready, registered_names_only

__all__ = ["add_arguments", "describe", "run_methods", "run_metrics", "run_targets"]

WIDTH = 100


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``methods``, ``targets`` and ``metrics``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the full description of one of them")
    parser.add_argument(
        "--bundle", metavar="DIR", help="also list those of this bundle's scripts/, which are read, not imported"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_methods(args: Namespace, *_: object) -> int:
    """Print the table of methods, or one method in full."""
    return _run(METHODS, args, "Use them with --methods NAME,NAME or --methods 'NAME(parameter=value)'.")


def run_targets(args: Namespace, *_: object) -> int:
    """Print the table of targets, or one target in full."""
    return _run(TARGETS, args, "Use them with --target 'NAME(parameter=value)'; classes by number or by name.")


def run_metrics(args: Namespace, *_: object) -> int:
    """Print the table of metrics, or one metric in full."""
    return _run(METRICS, args, "Use them with evaluate --metrics NAME,NAME or --metrics 'NAME(parameter=value)'.")


def _run(registry: Registry[Any], args: Namespace, usage: str) -> int:
    sources = list_extensions(args.bundle, registry) if args.bundle else []
    own = {source.name: _describe_source(source) for source in sources}
    docs = {source.name: source.doc for source in sources}
    chosen = _named(registry, args.name, sources) if args.name else None
    if chosen is None:
        classes = [cls for cls in registry if cls.__name__ not in own]
        entries = sorted([*(describe(c, registry.kind) for c in classes), *own.values()], key=lambda e: str(e["name"]))
    else:
        entries = [own[chosen.name] if isinstance(chosen, ExtensionSource) else describe(chosen, registry.kind)]
    if args.json:
        print(json.dumps(entries if not args.name else entries[0], indent=2, ensure_ascii=False))
        return 0
    if chosen is not None:
        doc = docs[chosen.name] if isinstance(chosen, ExtensionSource) else inspect.getdoc(chosen) or ""
        print(_heading(entries[0]), "", doc, sep="\n")
        print(*(f"\nReference: {entries[0]['reference']}",) if entries[0].get("reference") else ())
    else:
        for entry in entries:
            print(_block(entry), end="\n\n")
        print(usage, f"'esegeta-monai {registry.kind}s NAME' prints the full description of one.", sep="\n")
    if args.bundle:
        configs = (Path(args.bundle) / "configs").glob("inference.*")
        print("", *listing(BundleContents(args.bundle, None if any(configs) else [])), sep="\n")
    return 0


def _named(registry: Registry[Any], name: str, sources: Sequence[ExtensionSource]) -> Any:
    """Return the source or the registered class with this name or alias."""
    key = re.sub("[-_]", "", name).lower()
    for source in sources:
        aliases = source.stated.get("aliases")
        names = [source.name, *(aliases if isinstance(aliases, (list, tuple)) else ())]
        if key in (re.sub("[-_]", "", str(known)).lower() for known in names):
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


def _heading(entry: dict[str, Any]) -> str:
    parameters = [*entry["required"], *(f"{name}={value!r}" for name, value in entry["parameters"].items())]
    call = textwrap.wrap(f"{entry['name']}({', '.join(parameters)})", WIDTH, subsequent_indent="    ")
    aliases = f"    aliases: {', '.join(entry['aliases'])}" if entry.get("aliases") else ""
    return "\n".join([*call, *([aliases] if aliases else [])])


def _block(entry: dict[str, Any]) -> str:
    lines = textwrap.wrap(re.sub(r"`+", "", entry["summary"]), WIDTH - 4)
    if "file" in entry:
        lines.append(f"from {entry['file']} of the bundle")
    if "produces" in entry:
        sign = {True: "signed", False: "not signed", None: "signed or not"}[entry["signed"]]
        lines.append(f"{entry['produces']}, {sign}" + (f"; {entry['reference']}" if entry["reference"] else ""))
    if "group" in entry:
        way = {True: "higher is better", False: "lower is better"}
        needs = f"; needs {', '.join(entry['needs'])}" if entry["needs"] else ""
        lines.append(f"{entry['group']}, {way.get(entry['higher_is_better'], 'neither direction is better')}{needs}")
        lines += textwrap.wrap(entry["meaning"], WIDTH - 4)
    return "\n".join([_heading(entry), *(f"    {line}" for line in lines)])
