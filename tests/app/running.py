"""An app with a tiny bundle, without a socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esegeta_monai.bundle.contents import BundleContents
from esegeta_monai.bundle.trust import TrustStore
from esegeta_monai.cli.app import start
from esegeta_monai.cli.main import build_parser
from tests.support.cli import make_bundle, make_scan

HOSTILE = "<img src=x onerror=alert(1)>"


@contextmanager
def started(folder: Path, *, trusted: bool = True, **changes: Any) -> Iterator[Any]:
    """The app of a bundle that the user has trusted, with two cases; one has a hostile name."""
    bundle = make_bundle(folder / "bundle", **changes)
    make_scan(folder / "scans" / "a.nii.gz")
    make_scan(folder / "scans" / f"{HOSTILE}.nii.gz", seed=1)
    contents, store = BundleContents(bundle), TrustStore()
    if trusted:
        store.add(contents.digest(store.sha256), "tiny")
    output = folder / "out"
    words = ["app", "--bundle", bundle, "--input", folder / "scans", "--output", output, "--device", "cpu"]
    output.mkdir()
    app = start(build_parser().parse_args([str(word) for word in words]), output)
    try:
        assert app.worker.problem is None, app.worker.problem
        yield app
    finally:
        app.close()


def finished(app: Any, request: dict[str, Any], seconds: float = 120) -> Any:
    """A job after its end."""
    job = app.worker.submit(request)
    assert job.finished.wait(seconds), f"{request} did not end"
    return job


def wait_for(condition: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)
