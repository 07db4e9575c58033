"""Compare the results of two checkouts of the package: maps, records, warnings, window passes and network calls.

    python benchmarks/regression.py OLD NEW [--only TEXT] [--jobs N] [--cache FOLDER] [--tolerance 1e-12]

OLD and NEW are folders with a checkout. The same scenarios (`regression_table.py` of this folder) run for each in
separate processes, both checkouts at the same time, in float64 on one thread. Results of a checkout without
uncommitted changes are cached in a folder named after its commit, so that OLD runs only once.

The script prints one line per differing scenario, with the difference, and a summary. The exit status is 1 if
something differs by more than the tolerance: a map relative to its largest value, a number of a record relative to
itself or to 1, whichever is larger. Texts, passes, network calls and rows must be equal. Seconds, memory, versions and
time stamps are not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "regression_table.py"
PARTS = (PROGRAM, HERE / "regression_scenarios.py")
PASSES = frozenset({"window_passes", "passes", "windows_used", "windows_total", "calls", "rows"})

Results = dict[str, dict[str, Any]]


# ---- running ---


def commit(checkout: Path) -> str | None:
    """Return the commit of a checkout, or None if the package has uncommitted changes."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "esegeta_monai")
        return None if changed else git("rev-parse", "HEAD")
    except (subprocess.CalledProcessError, OSError):
        return None


class Run:
    """The scenarios of one checkout, read from the cache or run in ``jobs`` processes.

    Args:
        checkout: folder of the checkout.
        only: text in the names of the chosen scenarios; empty: all scenarios.
        jobs: number of processes.
        cache: folder of cached results.
    """

    def __init__(self, checkout: Path, only: str, jobs: int, cache: Path) -> None:
        self.checkout, self.only, self.jobs = checkout.resolve(), only, jobs
        if not (self.checkout / "esegeta_monai" / "__init__.py").is_file():
            raise SystemExit(f"{checkout} has no folder esegeta_monai: give the folder of a checkout")
        program = b"".join(path.read_bytes() for path in PARTS) + torch.__version__.encode()
        known = commit(self.checkout)
        self.folder = None if known is None else cache / f"{known}-{hashlib.sha256(program).hexdigest()[:12]}"
        self.temporary = tempfile.TemporaryDirectory()
        self.processes: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.began = time.perf_counter()

    def kept(self) -> Results | None:
        """Return the chosen results of an earlier complete run, or None if there is none."""
        path = None if self.folder is None else self.folder / "all.pt"
        if path is None or not path.is_file():
            return None
        return {name: one for name, one in torch.load(path, weights_only=True).items() if self.asked(name)}

    def asked(self, name: str) -> bool:
        """Return True if a scenario is chosen."""
        return self.only.lower() in name.lower()

    def start(self) -> None:
        """Start the processes, unless the results are cached."""
        if self.kept() is not None:
            return
        env = {**os.environ, "PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        for job in range(self.jobs):
            result = Path(self.temporary.name) / f"{job}.pt"
            words = [sys.executable, str(PROGRAM), str(result), "--only", self.only, "--part", f"{job}/{self.jobs}"]
            self.processes.append((subprocess.Popen(words, env=env, cwd=self.temporary.name), result))

    def stop(self) -> None:
        """Stop running processes, for instance after an error of the other checkout."""
        for process, _ in self.processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
        self.temporary.cleanup()

    def results(self) -> Results:
        """Wait for the processes; cache the results if all scenarios of a clean checkout ran."""
        if not self.processes:
            print(f"{self.checkout.name}: the results of {self.folder} are used")
            return self.kept() or {}
        scenarios: Results = {}
        for process, path in self.processes:
            if process.wait():
                raise SystemExit(f"the scenarios of {self.checkout} ended with exit status {process.returncode}")
            part = torch.load(path, weights_only=True)
            if not Path(part["package"]).is_relative_to(self.checkout):
                raise SystemExit(f"the package came from {part['package']}, not from {self.checkout}")
            scenarios |= part["scenarios"]
        took = sum(one["seconds"] for one in scenarios.values())
        print(f"{self.checkout.name}: {len(scenarios)} scenarios took {took:.0f} s", end="")
        print(f", {time.perf_counter() - self.began:.0f} s on the clock")
        if self.folder is not None and not self.only:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(scenarios, self.folder / "all.tmp")
            os.replace(self.folder / "all.tmp", self.folder / "all.pt")
        return scenarios


# ---- comparing ---


@dataclass
class Comparison:
    """Counts and differences of a comparison.

    Attributes:
        counts: numbers of scenarios, maps, records and so on, by kind and verdict.
        lines: one per scenario that is not bit-equal.
        failed: True if something differs by more than the tolerance.
    """

    tolerance: float
    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    failed: bool = False

    def scenario(self, name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> None:
        """Compare one scenario."""
        self.counts["scenarios"] += 1
        if old is None or new is None:
            self._say(name, [f"only in {'NEW' if old is None else 'OLD'}"])
            return
        texts = [*self._errors(old, new), *self._items(old["items"], new["items"])]
        texts += self._one("warnings", [("warnings", old["said"], new["said"])])
        counted = [(key, old[key], new[key]) for key in ("calls", "rows")]
        texts += self._one("network calls", counted)
        self._say(name, texts)

    def _say(self, name: str, texts: Sequence[str]) -> None:
        if texts:
            self.failed |= any(not line.startswith("(") for line in texts)
            more = f"; and {len(texts) - 6} more" if len(texts) > 6 else ""
            self.lines.append(f"{name}: {'; '.join(texts[:6])}{more}")

    def _errors(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
        before, after = ((one["error"] or {}).get("error") for one in (old, new))
        if before != after:
            yield f"ended with {shown(after)}, was {shown(before)}"
            if after is not None:
                yield new["error"]["where"].strip().splitlines()[-2].strip()

    def _items(self, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        if [one["name"] for one in old] != [one["name"] for one in new]:
            yield f"gives {shown([one['name'] for one in new])}, was {shown([one['name'] for one in old])}"
        known = {one["name"]: one for one in new}
        for one in old:
            other = known.get(one["name"])
            if other is not None:
                yield from self._map(one["name"], one.get("map"), other.get("map"))
                parts = [{k: v for k, v in item.items() if k in ("record", "about")} for item in (one, other)]
                all_differences = list(differences("", *parts, self.tolerance))
                passes = [line for line in all_differences if line[0].rsplit(".", 1)[-1] in PASSES]
                yield from self._verdict(
                    "records", one["name"], [line for line in all_differences if line not in passes]
                )
                if has_passes(parts[0]):
                    yield from self._verdict("passes", one["name"], passes)

    def _map(self, name: str, old: Tensor | None, new: Tensor | None) -> Iterator[str]:
        if old is None and new is None:
            return
        self.counts["maps"] += 1
        if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
            self.counts["maps different"] += 1
            forms = [None if m is None else (tuple(m.shape), str(m.dtype)) for m in (new, old)]
            yield f"map of {name}: {forms[0]}, was {forms[1]}"
        elif torch.equal(old, new) or torch.equal(old.nan_to_num(7.25), new.nan_to_num(7.25)):
            self.counts["maps bit-equal"] += 1
        else:
            gap = float((old - new).abs().max() / old.abs().max().clamp_min(1e-300))
            close = gap <= self.tolerance
            self.counts["maps within" if close else "maps different"] += 1
            text = f"map of {name} differs by {gap:.2g} of its largest value"
            yield f"({text})" if close else text

    def _one(self, kind: str, values: Sequence[tuple[str, Any, Any]]) -> Iterator[str]:
        all_differences = [d for key, old, new in values for d in differences(key, old, new, 0.0)]
        yield from self._verdict(kind, "", all_differences)

    def _verdict(self, kind: str, name: str, found_differences: Sequence[tuple[str, str, bool]]) -> Iterator[str]:
        self.counts[kind] += 1
        self.counts[f"{kind} equal"] += all(close for _, _, close in found_differences)
        for key, text, close in found_differences:
            line = f"{name} {key.removeprefix('.')}: {text}".strip()
            yield f"({line})" if close else line

    def summary(self) -> str:
        c = self.counts
        parts = [f"{c['scenarios']} scenarios, {c['maps']} maps, bit-equal {c['maps bit-equal']}"]
        parts[0] += f", within {self.tolerance:g} {c['maps within']}, different {c['maps different']}"
        for kind in ("records", "passes", "network calls", "warnings"):
            parts.append(f"{kind} equal {c[f'{kind} equal']} of {c[kind]}")
        return "; ".join(parts)


def differences(key: str, old: Any, new: Any, tolerance: float) -> Iterator[tuple[str, str, bool]]:
    """Yield the differences of two JSON-ready values: place, description, and True if within the tolerance."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(n for n in new if n not in old)]:
            if name not in old or name not in new:
                value = old.get(name, new.get(name))
                yield f"{key}.{name}", f"{'new' if name in new else 'gone'} ({shown(value)})", False
            else:
                yield from differences(f"{key}.{name}", old[name], new[name], tolerance)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(f"{key}[{i}]", a, b, tolerance)
    elif isinstance(old, float) and isinstance(new, float):
        if old != new and not (math.isnan(old) and math.isnan(new)):
            gap = abs(new - old) / max(abs(old), abs(new), 1e-300)
            close = abs(new - old) <= tolerance * max(abs(old), abs(new), 1.0)
            yield key, f"{new!r}, was {old!r} (relative difference {gap:.2g})", close
    elif type(old) is not type(new) or old != new:
        yield key, f"{shown(new)}, was {shown(old)}", False


def has_passes(value: Any) -> bool:
    """Return True if a record counts passes or calls anywhere."""
    if isinstance(value, Mapping):
        return any(k in PASSES or has_passes(v) for k, v in value.items())
    return False


def shown(value: Any) -> str:
    """Format a value in one line of at most 160 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="", help="scenarios whose name contains this, such as metric/ or LRP")
    parser.add_argument("--jobs", type=int, default=1, help="processes a checkout")
    cache = Path(tempfile.gettempdir()) / "esegeta_monai_regression"
    parser.add_argument("--cache", type=Path, default=cache, help="folder of cached results by commit")
    parser.add_argument("--tolerance", type=float, default=1e-12, help="0: bit-equal")
    args = parser.parse_args()
    runs = [Run(checkout, args.only, args.jobs, args.cache) for checkout in (args.old, args.new)]
    try:
        for run in runs:
            run.start()
        old, new = (run.results() for run in runs)
    finally:
        for run in runs:
            run.stop()
    comparison = Comparison(args.tolerance)
    for name in [*old, *(n for n in new if n not in old)]:
        comparison.scenario(name, old.get(name), new.get(name))
    print("\n".join([*comparison.lines, comparison.summary()]))
    if not comparison.counts["scenarios"]:
        raise SystemExit(f"no scenario has {args.only!r} in its name")
    sys.exit(int(comparison.failed))


if __name__ == "__main__":
    main()
