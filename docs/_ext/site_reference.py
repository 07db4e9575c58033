"""Write the reference of the site: the command line from its own help, methods and interfaces from the package."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

from esegeta_monai.cli.main import COMMANDS, main
from esegeta_monai.methods.base import METHODS
from esegeta_monai.metrics.base import METRICS
from esegeta_monai.targets.base import TARGETS

PACKAGES = {
    "esegeta_monai": "Explain one image: `Explainer`, `Attribution`",
    "esegeta_monai.targets": "What is explained",
    "esegeta_monai.metrics": "How far a map can be trusted",
    "esegeta_monai.transforms": "Dictionary transforms for `Compose`",
    "esegeta_monai.handlers": "Handlers for Ignite engines",
    "esegeta_monai.bundle": "Read MONAI bundles",
}
FAMILIES = "esegeta_monai.methods"
PAGES = [
    "command_line.md",
    "method_list.md",
    "api_methods.rst",
    *(f"api_{name.rpartition('.')[2]}.rst" for name in PACKAGES),
]
SUMMARY = """| generated from the package | content |
|---|---|
| [Command line](command_line.md) | every command and option, as `--help` prints it |
| [Methods, targets and metrics](method_list.md) | one line each, with the paper |
| [API of methods](api_methods.rst) | every method with its formula and parameters |
""" + "".join(f"| [API of {name}](api_{name.rpartition('.')[2]}.rst) | {text} |\n" for name, text in PACKAGES.items())


def write(folder: Path) -> None:
    """Write all pages into a folder."""
    (folder / "command_line.md").write_text(command_line(), encoding="utf-8")
    (folder / "method_list.md").write_text(lists(), encoding="utf-8")
    (folder / "api_methods.rst").write_text(methods(), encoding="utf-8")
    for name, text in PACKAGES.items():
        (folder / f"api_{name.rpartition('.')[2]}.rst").write_text(interface(name, text), encoding="utf-8")


def command_line() -> str:
    """Markdown: the help of every command."""
    os.environ["COLUMNS"] = "88"  # what fits beside the lists of pages
    parts = [
        "# Command line\n",
        "Generated from `--help`. [cli.md](../cli.md) explains inputs, options and exit codes.\n",
    ]
    for name in (None, *(command.name for command in COMMANDS)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main([*([name] if name else []), "--help"])
        parts.append(f"## esegeta-monai{' ' + name if name else ''}\n\n```text\n{printed.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


def first_line(cls: type) -> str:
    """The first sentence of a docstring, as Markdown in a cell."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return text.replace("``", "`").replace("|", "\\|")


def lists() -> str:
    """Write Markdown: all methods, targets and metrics in one line each."""
    parts = [
        "# Methods, targets and metrics\n",
        "Generated from the package. Which method for which question: [choose a method](../choose.md).\n",
        "## Methods\n",
        "| method | what it computes | result |",
        "|---|---|---|",
    ]
    for cls in METHODS:
        paper = str(getattr(cls, "reference", "") or "").replace("|", "\\|")
        parts.append(f"| `{cls.__name__}` | {first_line(cls)} *{paper}* | {getattr(cls, 'produces', '')} |")
    parts += ["\n## Targets\n", "| target | what is explained |", "|---|---|"]
    parts += [f"| `{cls.__name__}` | {first_line(cls)} |" for cls in TARGETS]
    parts += ["\n## Metrics\n", "| metric | group | what it measures |", "|---|---|---|"]
    parts += [f"| `{cls.__name__}` | {getattr(cls, 'group', '')} | {first_line(cls)} |" for cls in METRICS]
    return "\n".join(parts) + "\n"


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def methods() -> str:
    """RST: every public method, by mechanism."""
    module = importlib.import_module(FAMILIES)
    families: dict[str, list[str]] = defaultdict(list)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) and thing in set(METHODS):
            families[thing.__module__.split(".")[2]].append(name)
    parts = [heading("esegeta_monai.methods", "=")]
    for family in sorted(families):
        parts.append(heading(re.sub("_", " ", family).capitalize(), "-"))
        parts += [f".. autoclass:: {FAMILIES}.{name}\n" for name in sorted(families[family])]
    rest = [name for name in module.__all__ if name not in {n for names in families.values() for n in names}]
    parts.append(heading("For methods of your own", "-"))
    parts += [_entry(module, name) for name in sorted(rest)]
    return "\n".join(parts)


def interface(name: str, text: str) -> str:
    """RST: everything that a package exports."""
    module = importlib.import_module(name)
    parts = [heading(name, "="), text.replace("`", "``") + ".\n"]
    parts += [_entry(module, entry) for entry in sorted(module.__all__) if not entry.startswith("__")]
    return "\n".join(parts)


def _entry(module: ModuleType, name: str) -> str:
    thing = getattr(module, name)
    if inspect.isclass(thing):
        own = "" if module.__name__.endswith((".targets", ".metrics")) else "   :members:\n"
        return f".. autoclass:: {module.__name__}.{name}\n{own}"
    if callable(thing):
        return f".. autofunction:: {module.__name__}.{name}\n"
    return f".. autodata:: {module.__name__}.{name}\n   :no-value:\n"
