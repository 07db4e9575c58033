"""Pin the public interface in `public_interface.json`, so that no change of the internals alters it unnoticed.

Pinned are exports and their parameters, the registries, the command line, the JSON overlays, and the names of files and
keys on disk. Pinned entries must stay; further exports, options, keys and parameters with defaults may be added. After
an intended change, write the data anew with ``python -m tests.test_public_interface --write``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirst, LoadImage

from esegeta_monai import Explainer, methods, metrics, targets
from esegeta_monai.errors import EsegetaError
from tests.support import synthetic
from tests.support.cli import NETWORK, make_bundle, make_scan

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_name("public_interface.json")
PUBLIC = ("methods", "targets", "metrics", "transforms", "handlers", "bundle")
"""Subpackages whose exports are public; any other module is internal and may move."""
RENAMED = {"Measured", "Subject"}
"""Exports that are to get other names (`MetricResult`, `MetricInput`); neither name is pinned."""

PLACES = {
    "main": ("esegeta_monai.cli.main", "esegeta_monai.cli"),
    "build_parser": ("esegeta_monai.cli.main", "esegeta_monai.cli"),
    "BASELINES": ("esegeta_monai.engine.baselines", "esegeta_monai.baselines"),
    "FEATURES": ("esegeta_monai.engine.feature_masks", "esegeta_monai.features"),
    "ResultWriter": ("esegeta_monai.output", "esegeta_monai.output.writer", "esegeta_monai.writer"),
}
"""Modules in which a name that has no public import is looked for: the coming one, and the present one."""

MEMBERS = {
    "Attribution": ("status",),
    "BundleReader": ("class_names", "channel_names", "image_key", "inferer", "network", "preprocessing", "resolve"),
    "Explaind": ("__call__", "output_keys"),
    "Method": ("attribute", "signed", "units"),
    "Target": ("bind",),
    "TargetWrapper": ("forward", "freeze"),
    **dict.fromkeys(("EvaluationHandler", "ExplanationHandler"), ("attach",)),
    **dict.fromkeys(("Explain", "Explainer", "InvertAttribution", "InvertAttributiond"), ("__call__",)),
    **dict.fromkeys(("METHODS", "METRICS", "TARGETS"), ("create", "create_all", "get")),
}
"""Members that users or plug-ins call or override; those of other exports are not pinned."""

SUBSETS = ("aliases", "choices", "flags", "keys")
"""Lists that may grow. Any other list must stay as it is, order included."""

LISTED = ("required", "produces", "signed", "needs_gradient", "additive", "reference")
LISTED += ("group", "higher_is_better", "needs")
PACKAGES_RECORDED = ("esegeta_monai", "monai", "python", "torch")


def moved(name: str) -> Any:
    """Import an object from the first of its places that has it."""
    for place in PLACES[name]:
        file = ROOT.joinpath(*place.split("."))
        if file.with_suffix(".py").is_file() or (file / "__init__.py").is_file():
            module = importlib.import_module(place)
            if hasattr(module, name):
                return getattr(module, name)
    raise ImportError(f"{name} is in none of {', '.join(PLACES[name])}")


def parameters(function: Any) -> list[str]:
    """Describe each parameter by kind, name and default: ``window=16``, ``*, name=None``, ``**kwargs``."""
    marks = {inspect.Parameter.KEYWORD_ONLY: "*, ", inspect.Parameter.VAR_POSITIONAL: "*"}
    marks |= {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.POSITIONAL_ONLY: "/, "}
    described = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
        text = "" if default is inspect.Parameter.empty else f"={default!r}"
        described.append(f"{marks.get(parameter.kind, '')}{name}{text}")
    return described


def exports() -> dict[str, Any]:
    """Describe what each public package exports."""
    result = {}
    for package in ("esegeta_monai", *(f"esegeta_monai.{name}" for name in PUBLIC)):
        module = importlib.import_module(package)
        result[package] = {name: _export(name, getattr(module, name)) for name in module.__all__ if name not in RENAMED}
    return result


def _export(name: str, exported: Any) -> dict[str, Any]:
    kind = "class" if inspect.isclass(exported) else "function" if inspect.isfunction(exported) else "object"
    entry: dict[str, Any] = {"kind": kind}
    if kind != "object":
        entry["parameters"] = parameters(exported)
    members: dict[str, Any] = {}
    for member in MEMBERS.get(name, ()):
        value = getattr(exported, member, None)
        if callable(value):
            members[member] = {"parameters": parameters(value)}
        elif hasattr(exported, member) or member in getattr(exported, "__annotations__", ()):
            members[member] = {}
    return {**entry, **({"members": members} if members else {})}


def registries(pinned: dict[str, Any]) -> dict[str, Any]:
    """Describe all that is registered, as the command line lists it; what other packages register is left out."""
    result: dict[str, Any] = {}
    public = {"method": methods.METHODS, "target": targets.TARGETS, "metric": metrics.METRICS}
    for kind, registry in public.items():
        for entry in json.loads(printed(f"{kind}s", "--json")):
            cls = registry.get(entry["name"])
            kept = {key: entry[key] for key in LISTED if key in entry} | {"defaults": entry["parameters"]}
            if kind == "method":
                with contextlib.suppress(EsegetaError):  # where parameters are needed
                    kept["units"] = registry.create(cls).units
            result.setdefault(kind, {})[cls] = kept
    for kind, registry in {"baseline": moved("BASELINES"), "feature mask": moved("FEATURES")}.items():
        public[kind], result[kind] = registry, {cls: {"parameters": parameters(cls)} for cls in registry}
    for kind, registry in public.items():
        own = {cls: entry for cls, entry in result[kind].items() if cls.__module__.startswith("esegeta_monai.")}
        for cls, entry in own.items():
            known = pinned.get(kind, {}).get(cls.__name__, {}).get("aliases", ())
            entry["aliases"] = aliases(registry, cls, [*getattr(cls, "aliases", ()), *known])
        result[kind] = {cls.__name__: entry for cls, entry in own.items()}
    return result


def aliases(registry: Any, cls: type, names: list[str]) -> list[str]:
    """Return those of the names by which the registry finds the class."""
    result = set()
    for name in names:
        with contextlib.suppress(EsegetaError):
            result |= {name} if registry.get(name) is cls else set()
    return sorted(result)


def printed(*words: object) -> str:
    """Run a command in this process and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = moved("main")([str(word) for word in words])
    assert code == 0, errors.getvalue()
    return out.getvalue()


def command_line() -> dict[str, Any]:
    """Describe every command and option; help texts are left out."""
    with contextlib.redirect_stderr(io.StringIO()):  # no terminal: a default depends on that
        parser = moved("build_parser")()
    commands = {"esegeta-monai": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands |= action.choices
    return {name: {"options": _options(command)} for name, command in commands.items()}


def _options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        words = [f"{action.dest}={action.default!r}", f"nargs={action.nargs!r}"]
        words += ["repeated"] if isinstance(action, argparse._AppendAction) else []
        words += ["limited"] if action.choices is not None else []
        words += ["required"] if action.required else []
        name = next((flag for flag in action.option_strings if flag.startswith("--")), action.dest)
        options[name] = {"flags": list(action.option_strings), "choices": list(action.choices or ()), "value": words}
    return options


def overlays(folder: Path) -> dict[str, Any]:
    """Describe the packaged overlays, and those that ``esegeta-monai overlay`` writes for a bundle."""
    packaged = {f.name: f for f in resources("esegeta_monai.bundle").iterdir() if f.name.endswith(".json")}
    result: dict[str, Any] = {
        "packaged": {name: flat(json.loads(f.read_text(encoding="utf-8"))) for name, f in packaged.items()}
    }
    synthetic.write_scan(folder)
    bundle = synthetic.write(folder / "bundle", synthetic.wired(folder))
    before = set(bundle.rglob("*"))
    printed("overlay", "--bundle", bundle, "--multi-gpu")
    printed("overlay", "--bundle", bundle, "--metrics")
    written = sorted(set(bundle.rglob("*.json")) - before)
    result["written"] = {
        f.relative_to(bundle).as_posix(): flat(json.loads(f.read_text(encoding="utf-8"))) for f in written
    }
    return result


def flat(config: Any, where: str = "") -> dict[str, Any]:
    """Return the value of each id of a config; "internal" for what names a module that may move."""
    if isinstance(config, dict):
        inner = [flat(value, f"{where}#{key}" if where else key) for key, value in config.items()]
        return {key: value for part in inner for key, value in part.items()}
    if isinstance(config, list) and any(isinstance(value, (dict, list)) for value in config):
        return flat({str(i): value for i, value in enumerate(config)}, where)
    modules = re.findall(r"esegeta_monai\.(\w+)", json.dumps(config))
    return {where: config if set(modules) <= set(PUBLIC) else "internal"}


def files(folder: Path) -> dict[str, Any]:
    """Describe the files that a run by Python and one by the command line write."""
    scan = make_scan(folder / "scans" / "p1.nii.gz")
    return {"python": _by_python(folder / "python", scan), "command": _by_command(folder, scan)}


def _by_python(output: Path, scan: Path) -> dict[str, Any]:
    chosen = methods.METHODS.create_all(
        "IntegratedGradients(n_steps=2),IntegratedGradients(n_steps=3),LayerActivation(layer='model.0'),"
        "FeatureAblation('grid(size=8)'),FeatureVisualization('model.0', n_iter=2)"
    )
    wanted = targets.TARGETS.create_all("Voxel(1, index=(3, 3, 3), name='a place')")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = UNet(**{key: value for key, value in NETWORK.items() if key != "_target_"})
    image = Compose([LoadImage(), EnsureChannelFirst()])(str(scan))
    writer = moved("ResultWriter")(output, chosen, wanted)
    with writer.run:
        writer.explain(Explainer(network, class_names={1: "grey matter"}), image, "p1", chosen, wanted)
    return written_in(output)


def _by_command(folder: Path, scan: Path) -> dict[str, Any]:
    bundle, output, label = make_bundle(folder / "tiny"), folder / "command", folder / "label.nii.gz"
    volume = nib.load(scan)
    nib.save(nib.Nifti1Image((np.asarray(volume.dataobj) > 0.5).astype(np.uint8), volume.affine), label)
    case = ("--bundle", bundle, "--input", scan, "--output", output, "--no-progress")
    printed("explain", *case, "--target", "MultiClassMask(1)", "--methods", "Saliency,GradCam")
    printed("evaluate", *case, "--maps", output, "--label", label, "--metrics", "RelevanceMass,Deletion(steps=2)")
    printed("report", output)
    return written_in(output)


def written_in(output: Path) -> dict[str, Any]:
    """Describe the files in a folder: their names, the keys of each kind of JSON, and the columns of tables."""
    names = sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file())
    result: dict[str, Any] = {"files": names}
    for kind in ("run", "attr", "metrics", "regions"):
        jsons = [json.loads(p.read_text(encoding="utf-8")) for p in output.rglob("*.json") if p.stem.endswith(kind)]
        if jsons:
            result[f"{kind}.json"] = {"keys": sorted({key for content in jsons for key in keys(content)})}
    for table in sorted(output.rglob("*.csv")):
        with open(table, newline="", encoding="utf-8") as file:
            result[table.relative_to(output).as_posix()] = {"columns": next(csv.reader(file))}
    return result


def keys(content: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of a record, and one level more: ``inferer.name``, ``results[].status``."""
    for key, value in content.items():
        yield key
        inner = [(f"{key}.", value)] if isinstance(value, dict) else []
        inner += [(f"{key}[].", v) for v in value if isinstance(v, dict)] if isinstance(value, list) else []
        for start, mapping in inner:
            yield from (f"{start}{k}" for k in mapping if key != "versions" or k in PACKAGES_RECORDED)


def collect(section: str, pinned: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Describe one section of the interface as it is now, in terms that JSON has."""
    folder.mkdir(exist_ok=True)
    given = {"registries": (pinned,), "overlays": (folder,), "files": (folder,)}.get(section, ())
    return json.loads(json.dumps(SECTIONS[section](*given)))


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "exports": exports,
    "registries": registries,
    "command line": command_line,
    "overlays": overlays,
    "files": files,
}


def differences(pinned: Any, result: Any, where: str = "") -> list[str]:
    """List what of the pinned interface is gone or has changed."""
    last = where.rpartition(" / ")[2]
    if isinstance(pinned, dict) and isinstance(result, dict):
        lines = [f"{where}: {key!r} is gone" for key in pinned if key not in result]
        if last == "options":
            needed = [key for key in result if key not in pinned and "required" in result[key]["value"]]
            lines += [f"{where}: {key!r} is required" for key in needed]
        shared = [key for key in pinned if key in result]
        return lines + [line for key in shared for line in differences(pinned[key], result[key], f"{where} / {key}")]
    if last == "parameters":
        return [f"{where}: {line}" for line in _changed(pinned, result)]
    if last in (*SUBSETS, "files"):
        new = [f"{where}: {item!r} is new" for item in result if item not in pinned and last not in SUBSETS]
        return [f"{where}: {item!r} is gone" for item in pinned if item not in result] + new
    return [] if pinned == result else [f"{where}: {pinned!r} became {result!r}"]


def _changed(pinned: list[str], result: list[str]) -> list[str]:
    lines = [f"parameter {p!r} is gone, among {result}" for p in pinned if p not in result]
    needed = [p for p in result if p not in pinned and not re.search("=|^[*][^,]", p)]
    lines += [f"parameter {p!r} has no default" for p in needed]
    before, after = ([p for p in side if not p.startswith("*")] for side in (pinned, result))
    return lines or ([] if after[: len(before)] == before else [f"the order {before} became {after}"])


def pretty(value: Any, indent: str = "\n") -> str:
    """Write JSON with sorted keys, short values in one line."""
    line, deeper = json.dumps(value, sort_keys=True, ensure_ascii=False), f"{indent}  "
    if len(line) < 100 or not isinstance(value, (dict, list)):
        return line
    if isinstance(value, list):
        return f"[{deeper}" + f",{deeper}".join(pretty(item, deeper) for item in value) + f"{indent}]"
    items = (f"{json.dumps(key)}: {pretty(value[key], deeper)}" for key in sorted(value))
    return f"{{{deeper}" + f",{deeper}".join(items) + f"{indent}}}"


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_pinned_is_there(section: str, tmp_path: Path) -> None:
    pinned = json.loads(DATA.read_text(encoding="utf-8"))[section]
    assert pinned
    lost = differences(pinned, collect(section, pinned, tmp_path), section)
    assert not lost, "\n".join([*lost, "If that is intended: python -m tests.test_public_interface --write"])


def test_command_is_installed() -> None:
    """The console script of pyproject.toml and ``python -m esegeta_monai`` exist."""
    (place,) = re.findall(
        r'^esegeta-monai = "([\w.:]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert pkgutil.resolve_name(place) is moved("main")
    assert importlib.util.find_spec("esegeta_monai.__main__") is not None


CONFIGS = sorted([*ROOT.glob("esegeta_monai/bundle/*.json"), *ROOT.glob("bundles/*/configs/*.json")])
NAMESPACES = ("data", "engines", "handlers", "inferers", "losses", "metrics", "networks.nets", "transforms")
"""Of MONAI, in which a ``_target_`` without dots is looked for."""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_targets_of_configs_resolve(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``_target_``, and every module that an expression imports, is found by importlib."""
    with monkeypatch.context() as patch:
        for name in [n for n in sys.modules if n.partition(".")[0] == "scripts"]:
            patch.delitem(sys.modules, name)  # each bundle calls its code so
        patch.syspath_prepend(str(config.parents[1]))
        content = config.read_text(encoding="utf-8")
        for name in re.findall(r'"_target_":\s*"([^"]+)"', content):
            if "." in name:
                assert callable(pkgutil.resolve_name(name)), name
            else:
                assert any(hasattr(importlib.import_module(f"monai.{n}"), name) for n in NAMESPACES), name
        for module, attribute in re.findall(r"__import__\('([\w.]+)'\)([\w.]*)", content):
            importlib.import_module(module)
            pkgutil.resolve_name(module.partition(".")[0] + attribute)
        for name in [n for n in sys.modules if n.partition(".")[0] == "scripts"]:
            del sys.modules[name]


def test_differences_are_seen() -> None:
    """Removals, renames and required additions are differences; optional additions are none."""
    plain, options = ["a", "b=1", "*, name=None"], {"--x": {"flags": ["-x", "--x"], "value": []}}
    for changed in (["a", "*, name=None"], ["b=1", "a", "*, name=None"], [*plain, "c"], ["c=0", *plain]):
        assert differences(plain, changed, " / parameters")
    for added in ([], ["*, c=2"], ["*args"], ["**more"]):
        assert not differences(plain, [*plain, *added], " / parameters")
    assert not differences({"options": options}, {"options": {**options, "--y": {"value": []}}})
    assert differences({"options": options}, {"options": {**options, "--y": {"value": ["required"]}}})
    assert differences({"options": options}, {"options": {"--z": options["--x"]}})


def write() -> None:
    """Write the data anew."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        result = {section: collect(section, data.get(section, {}), Path(folder) / section) for section in SECTIONS}
    DATA.write_text(pretty(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.test_public_interface --write")
    write()
