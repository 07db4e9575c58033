"""Requests of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from esegeta_monai.engine.sweep import Request


def test_a_request_may_be_a_dataclass_and_is_collected_for_itself():
    @dataclass
    class Peak(Request):
        scale: float = 1.0

    first, second = Peak(2.0), Peak(2.0)
    assert len({first.key, second.key}) == 2
    assert first.key == first.key
