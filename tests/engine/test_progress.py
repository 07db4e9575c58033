"""Progress counts passes, keeps limits and collects warnings."""

from __future__ import annotations

import logging

import pytest

from esegeta_monai.engine.progress import Progress
from esegeta_monai.errors import MethodTimeout


def test_passes_are_counted_and_reported_until_the_next_start():
    reported = []
    progress = Progress(reported.append)
    progress.passed(3)
    progress.passed(2)
    assert (progress.passes, reported) == (5, [3, 2])
    progress.warn("slow")
    progress.start()
    assert (progress.passes, progress.warnings) == (0, [])


def test_the_pass_limit_stops_before_the_next_batch():
    progress = Progress()
    progress.start(pass_limit=4)
    progress.passed(3)
    progress.check()
    progress.passed(1)
    with pytest.raises(MethodTimeout, match="limit of 4 window passes"):
        progress.check()
    progress.start()
    progress.passed(100)
    progress.check()


def test_the_time_limit_stops_and_names_what_was_done(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr("esegeta_monai.engine.progress.time.monotonic", lambda: clock[0])
    progress = Progress()
    progress.start(time_limit=2.5)
    progress.passed(7)
    clock[0] = 12.5
    progress.check()
    clock[0] = 12.6
    with pytest.raises(MethodTimeout, match=r"time limit of 2\.5 s after 7 window passes"):
        progress.check()


@pytest.mark.parametrize("silent", [False, True])
def test_each_warning_is_collected_and_logged_once(silent, caplog):
    progress = Progress(silent=silent)
    with caplog.at_level(logging.WARNING):
        for label in (None, "tumour", "tumour", "edema"):
            progress.warn("too small", label)
    assert progress.warnings == ["too small", "tumour: too small", "edema: too small"]
    assert caplog.messages == ([] if silent else progress.warnings)
    assert progress.warnings_without(["tumour"]) == ["too small", "edema: too small"]
