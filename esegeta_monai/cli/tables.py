"""``esegeta-monai methods``, ``targets`` and ``metrics``: list the registered classes.

The descriptions of this package's own classes are in ``tables.json``, which ``python -m esegeta_monai.cli.tables``
writes; it is used as long as it was made from the present sources, since importing the classes takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from esegeta_monai.utils.names import plain_key

__all__ = ["run_methods", "run_metrics", "run_targets", "write_tables"]

WIDTH = 100
KINDS = ("method", "target", "metric")
TABLES = Path(__file__).with_name("tables.json")


def run_methods(args: Namespace, *_: object) -> int:
    """Print the table of methods, or one method in full."""
    return _run("method", args, "Use them with --methods NAME,NAME or --methods 'NAME(parameter=value)'.")


def run_targets(args: Namespace, *_: object) -> int:
    """Print the table of targets, or one target in full."""
    return _run("target", args, "Use them with --target 'NAME(parameter=value)'; classes by number or by name.")


def run_metrics(args: Namespace, *_: object) -> int:
    """Print the table of metrics, or one metric in full."""
    return _run("metric", args, "Use them with evaluate --metrics NAME,NAME or --metrics 'NAME(parameter=value)'.")


def write_tables() -> None:
    """Write ``tables.json``: the descriptions of all classes, and the hash of the sources that they come from."""
    from esegeta_monai.cli.describe import entries_of

    tables = {"sources": _sources(), **{kind: entries_of(kind) for kind in KINDS}}
    TABLES.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sources() -> str:
    """Return the SHA-256 of the sources of methods, targets and metrics."""
    root, sha = Path(__file__).parents[1], hashlib.sha256()
    for kind in KINDS:
        for file in sorted((root / f"{kind}s").rglob("*.py")):
            sha.update(f"{file.relative_to(root).as_posix()}\0".encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()


def _stored(kind: str, name: str | None) -> list[dict[str, Any]]:
    """Return entries of ``tables.json``; none if the name is not in it, it is old, or other packages add classes."""
    if any(True for _ in entry_points(group=f"esegeta_monai.{kind}s")):
        return []
    try:
        tables = json.loads(TABLES.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if tables["sources"] != _sources():
        return []
    entries: list[dict[str, Any]] = tables[kind]
    return [e for e in entries if name is None or plain_key(name) in map(plain_key, (e["name"], *e.get("aliases", ())))]


def _run(kind: str, args: Namespace, usage: str) -> int:
    entries = [] if args.bundle else _stored(kind, args.name)
    if not entries:
        from esegeta_monai.cli.describe import entries_of

        entries = entries_of(kind, args.name, args.bundle)
    docs = [entry.pop("doc") for entry in entries]
    if args.json:
        print(json.dumps(entries if not args.name else entries[0], indent=2, ensure_ascii=False))
        return 0
    if args.name:
        print(_heading(entries[0]), "", docs[0], sep="\n")
        print(*(f"\nReference: {entries[0]['reference']}",) if entries[0].get("reference") else ())
    else:
        for entry in entries:
            print(_block(entry), end="\n\n")
        print(usage, f"'esegeta-monai {kind}s NAME' prints the full description of one.", sep="\n")
    if args.bundle:
        from esegeta_monai.cli.describe import bundle_listing

        print("", *bundle_listing(args.bundle), sep="\n")
    return 0


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


if __name__ == "__main__":
    write_tables()
