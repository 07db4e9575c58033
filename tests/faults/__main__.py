"""Run the rows of all groups, or of the groups whose numbers are given, and write docs/faults.md.

python -m tests.faults [GROUP ...]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import traceback
from itertools import groupby
from pathlib import Path

import pytest

from esegeta_monai.cli.log import print_every_character
from tests.faults.runner import Row, all_rows

DOC = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """# Faults

Faults of inputs, disks and processes, and whether the package does what it must then: name the fault in one line,
lose nothing else, leave no partial file. `make faults` runs all rows (`python -m tests.faults GROUP ...` some groups)
and writes this table; the tests of `tests/faults` run the short ones.

| group | rows | held | processor time, s | commit |
|---|---|---|---|---|
"""


def main(groups: list[str]) -> int:
    """Run the rows, print each, and replace the groups' lines in the table."""
    print_every_character()  # names of rows have others than ASCII
    rows = [row for row in all_rows() if not groups or row.group.split()[0] in groups]
    failed = 0
    for group, members in groupby(rows, key=lambda row: row.group):
        began, held, total = _cpu_seconds(), 0, 0
        for row in members:
            total += 1
            held += _run(row)
        failed += total - held
        line = f"| {group} | {total} | {held} | {_cpu_seconds() - began:.0f} | {_commit()} |"
        print(line, flush=True)
        _write(group.split()[0], line)
    return int(bool(failed))


def _write(number: str, line: str) -> None:
    """Replace the line of a group in the table; several commands may run different groups."""
    old = DOC.read_text(encoding="utf-8") if DOC.exists() else ""
    lines_before = re.findall(r"^(\| (\d+) .*)$", old.split("\n## ")[0], re.M)
    known = {of: text for text, of in lines_before} | {number: line}
    lines = [known[number] for number in sorted(known, key=int)]
    DOC.write_text(HEAD + "\n".join(lines) + "\n" + _explanations(), encoding="utf-8")


def _run(row: Row) -> bool:
    os.environ["FAULTS_FULL"] = "1"  # kills and writers in full number
    began = _cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        try:
            note = row.check(Path(folder))
        except pytest.skip.Exception as skipped:  # a package that the row needs is missing
            note = f"not run: {skipped}"
        except Exception as error:
            what = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"HOLE  {row.group}: {row.name} ({_cpu_seconds() - began:.1f} s): {what}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            return False
    print(f"held  {row.group}: {row.name} ({_cpu_seconds() - began:.1f} s){f': {note}' if note else ''}", flush=True)
    return True


def _cpu_seconds() -> float:
    """Processor time of this process and of all commands that have ended: a busy machine changes it little."""
    return sum(os.times()[:4])


ELSEWHERE = """
## Faults with another answer, or tested elsewhere

* A pass of a network that hangs cannot be ended by `--time-limit`, which is looked at between passes. On the command
  line `--hard-time-limit` ends it: "hangs, hangs in a gradient, ..." in group 6. In Python and in handlers there is no
  such limit.
* Bundles that run code: `python -m tests.cli.hostile` counts executions by bundle and command;
  `tests/cli/test_trust.py`.
* Signals to jobs of `torchrun`: "torchrun --share ..., killed" in group 4, and `tests/test_torchrun.py`.
* `esegeta_monai.cli.watch`, the process of `--hard-time-limit`: `tests/cli/test_watch.py`.
* Sizes and times that differ from the suite in which these rows began: a flipped bit on the command line is one in
  a file of 2 MB (30 MB: in the reader); `ulimit -v` is given beyond what the process has; the 2,000 scans are explained
  to the end, with limits of processor time in place of a rate per second; the volume of 240 x 240 x 155 is explained
  once, by two methods and with pictures. `torch._C._set_grad_enabled` is the same as "changes the grad mode".
* Full disks: `tests/utils/test_files.py`, `tests/files/test_runs.py`; `ulimit -f` in group 10.
* Sidecars and `run.json` that name code or other files: group 8, `tests/files/test_integrity.py`.
"""


def _explanations() -> str:
    """The rows that have a reason, by group."""
    lines = ["", "## Rows with more than one right answer", ""]
    for group, members in groupby(all_rows(), key=lambda row: row.group):
        explained = [row for row in members if row.why]
        if explained:
            lines += [f"* Group {group}", *(f"  * {row.name}: {row.why}" for row in explained)]
    return "\n".join(lines) + "\n" + ELSEWHERE


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
