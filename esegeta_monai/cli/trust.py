"""Ask once before the code of a bundle runs, and list what would run."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from esegeta_monai.bundle.contents import BundleContents, NnunetContents, Runnable, printable
from esegeta_monai.bundle.nnunet.files import check_single
from esegeta_monai.bundle.nnunet.totalsegmentator_task import TotalSegmentatorTask
from esegeta_monai.bundle.trust import TRUST_VARIABLE, TrustStore, is_shipped
from esegeta_monai.errors import TrustError, UsageError

__all__ = ["listing", "require_trust", "summary", "trust_changes"]

SHOWN = 40
"""Entries of the bundle's own code in the question; ``info`` lists all."""

logger = logging.getLogger("esegeta_monai")


def require_trust(args: Namespace) -> None:
    """Return if the bundle of the arguments may run; ask at a terminal, once for each content.

    Call this before anything of a bundle is imported, evaluated or built.

    Args:
        args: ``bundle`` or ``nnunet``, ``config`` and ``trust``; the answer is kept in ``args.allowed``.

    Raises:
        TrustError: it may not run.
        UsageError: its configs cannot be read.
    """
    nnunet, task = getattr(args, "nnunet", None), getattr(args, "totalsegmentator", None)
    if getattr(args, "allowed", False) or (args.bundle is None and nnunet is None and task is None):
        return
    if os.environ.get(TRUST_VARIABLE) != "1":
        folders: list[BundleContents] = []
        if args.bundle is not None:
            folders.append(BundleContents(args.bundle, getattr(args, "config", None)))
        if nnunet is not None:
            check_single(Path(nnunet))
            folders.append(NnunetContents(nnunet, getattr(args, "previous_stage", None)))
        if task is not None:
            read = TotalSegmentatorTask.read(task, "fast" if args.fast else "default")
            folders += [NnunetContents(folder) for folder in dict.fromkeys(read.folders)]
        for contents in folders:
            _require(contents, args.trust)
    args.allowed = True


def trust_changes(args: Namespace) -> None:
    """Trust the bundle of the arguments again after this package has written a file into it.

    Args:
        args: arguments for which `require_trust` has returned.
    """
    if os.environ.get(TRUST_VARIABLE) == "1" or args.bundle is None:
        return
    contents = BundleContents(args.bundle, getattr(args, "config", None))
    if not is_shipped(contents):
        _remember(contents, TrustStore())


def _require(contents: BundleContents, given: bool) -> None:
    if not contents.runnables or is_shipped(contents):
        return
    store = TrustStore()
    digest = contents.digest(store.sha256)
    if store.trusts(digest):
        _saved(store)
        return
    if not given:
        if "RANK" in os.environ or not (sys.stdin.isatty() and sys.stderr.isatty()):  # processes share a terminal
            _saved(store)  # the hashes, for the next call
            raise TrustError(refusal(contents))
        if not _asked(contents):
            raise TrustError(f"{contents.root.name} was not trusted: nothing of it has run")
    _remember(contents, store)


def _remember(contents: BundleContents, store: TrustStore) -> None:
    try:
        store.add(contents.digest(store.sha256), printable(contents.root.name))
    except UsageError as error:
        logger.warning("the answer is not remembered: %s", error)


def _saved(store: TrustStore) -> None:
    try:
        store.save()
    except UsageError as error:
        logger.debug("hashes are not remembered: %s", error)


def refusal(contents: BundleContents) -> str:
    """Return the error for a bundle that is not trusted, in one line with the first entry that would run."""
    option = "--nnunet" if isinstance(contents, NnunetContents) else "--bundle"
    first = printable(contents.runnables[0], 200)
    return (
        f"the {contents.what} {printable(contents.root.name)} is not trusted, and this command would run its code: "
        f"{summary(contents.runnables)}, first {first}; list it with 'esegeta-monai info {option} DIR', then "
        f"allow these contents by --trust, or all bundles by {TRUST_VARIABLE}=1"
    )


def summary(runnables: Sequence[Runnable]) -> str:
    """Return the number of entries of each kind.

    >>> summary([Runnable("a.json", "net", "component", "UNet", True), Runnable("a.json", "x", "expression", "$1")])
    '1 expression, 1 component of MONAI, torch or Ignite'
    """
    kinds = Counter(
        (f"{entry.kind} of MONAI, torch or Ignite" if entry.own else entry.kind)
        for entry in sorted(runnables, key=lambda entry: entry.own)
    )
    return ", ".join(f"{count} {_plural(kind, count)}" for kind, count in kinds.items())


def _plural(kind: str, count: int) -> str:
    word, space, rest = kind.partition(" ")
    return kind if count == 1 else f"{word}{'es' if word.endswith('s') else 's'}{space}{rest}"


def listing(contents: BundleContents) -> list[str]:
    """Return what a command prints: everything that would run, one entry in a line, and refused files."""
    lines = [f"refused: {printable(file)} hides the module {name}" for name, file in contents.hiding.items()]
    if not contents.runnables:
        return [*lines, "nothing of this folder runs: it names only known classes, and its weights are read as numbers"]
    lines.append(f"may run when the network is built: {summary(contents.runnables)}")
    width = max(len(f"{entry.file} {entry.id}") for entry in contents.runnables)
    for entry in contents.runnables:
        where = f"{entry.file} {entry.id}".rstrip()
        lines.append(f"  {where:<{min(width, 60)}}  {entry.kind:<10}  {entry.text}")
    return lines


def _asked(contents: BundleContents) -> bool:
    """Show what would run, and return the user's answer."""
    own = sum(entry.own for entry in contents.runnables)
    lines = listing(contents)
    cut = len(lines) - own
    shown = lines[: min(cut, SHOWN + 1)]
    print(f"The {contents.what} {printable(contents.root)} contains code, as every bundle does.", file=sys.stderr)
    print("\n".join(shown), file=sys.stderr)
    if len(lines) > len(shown):
        print(f"  ... and {len(lines) - len(shown)} more, which 'esegeta-monai info' lists", file=sys.stderr)
    print("Trust these contents? They are remembered until a file changes. [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except OSError as error:  # a process in a session of its own cannot read from the terminal
        raise TrustError(refusal(contents)) from error
