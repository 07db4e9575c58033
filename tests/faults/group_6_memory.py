"""Networks and machines without memory: injected errors of torch, its allocator and Python, and real limits."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

from tests.faults.group_6_networks import GROUP, NETWORK, bundle, equal, expected, harmless, refused, run
from tests.faults.runner import Row, command, statuses, unfinished
from tests.support.cli import make_scan


def _address_space() -> int:
    """Bytes of address space of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmSize")).split()[1]) << 10


def limited(megabytes: int) -> Callable[[], None]:
    """For ``before``: as ``ulimit -v``, so much beyond what the process has."""

    def limit() -> None:
        size = _address_space() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return limit


def short(megabytes: int) -> Callable[[Path], str]:
    """``ulimit -v``: done with the same maps, or one line for each failure that names the memory."""

    def check(folder: Path) -> str:
        expected()
        done, output = run(folder, "nothing", before=limited(megabytes))
        if done.code == 0:
            equal(output)
            return "done"
        assert done.code in (1, 2), (done.code, done.err)
        assert done.errors
        assert "memory" in done.err.lower(), done.err
        return done.errors[0][-150:]

    return check


def large_windows(folder: Path) -> str:
    """Batches of 8 windows of 96³, for which there is no room: halved until they fit, or named."""
    made = bundle(folder / "bundle", NETWORK, how="nothing", n=0)
    config = made / "configs" / "inference.json"
    text = config.read_text(encoding="utf-8").replace('"sw_batch_size": 4', '"sw_batch_size": 8')
    config.write_text(text.replace('"roi_size": [16, 16, 16]', '"roi_size": [96, 96, 96]'), encoding="utf-8")
    assert text.count('"roi_size": [16, 16, 16]') == 1
    words = ["--bundle", made, "--input", make_scan(folder / "big.nii.gz", (112, 112, 112)), "--methods", "Saliency"]
    words += ["--output", folder / "out", "--target", "MultiClassMask(1)", "--no-pictures"]
    done = command("explain", *words, before=limited(900), timeout=500)
    assert not done.traceback
    assert not unfinished(folder / "out")
    assert done.code in (0, 1), (done.code, done.err)
    if done.code:
        assert "memory" in done.err.lower()
    else:
        assert set(statuses(folder / "out").values()) == {"ok"}
    return f"exit code {done.code}; {(done.warnings or done.errors or [''])[0][:120]}"


ROWS = [
    *(
        Row(GROUP, f"no memory for more than {n} window(s), {kind}", harmless(kind, n, tell), slow=n == 2)
        for n, tell in ((1, ""), (2, "out of memory with 4 windows"))
        for kind in ("cuda", "allocator", "python")
    ),
    *(
        Row(GROUP, f"no memory for more than {n} window(s), {where}", harmless(kind, n), slow=True)
        for kind, where, sizes in (
            ("gradient", "in gradient passes", (1, 2)),
            ("gradient_allocator", "in gradient passes, allocator", (1,)),
            ("later", "after some passes", (1, 2)),
            ("backward", "in the backward pass", (2,)),
        )
        for n in sizes
    ),
    *(
        Row(GROUP, f"no memory for more than {n} window(s), with the remedy that is named",
            harmless("cuda", n, "", "--window-batch", n), slow=True)
        for n in (1, 2)
    ),
    *(
        Row(GROUP, f"no memory at all, {kind}", refused(kind, 0, "out of memory with one window"),
            slow=kind != "python")
        for kind in ("cuda", "allocator", "python")
    ),
    *(Row(GROUP, f"ulimit -v: {size} MB more than at the start", short(size), slow=size != 150)
      for size in (50, 150, 500, 2000)),
    Row(GROUP, "ulimit -v: no room for batches of 8 windows of 96³", large_windows, slow=True),
]  # fmt: skip
