"""The assumptions of layer methods: a layer runs once in a pass, and it is known where its output lies."""

from __future__ import annotations

from collections.abc import Sequence

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.layer_frames import network_roi, traced_layers
from esegeta_monai.engine.objective import Objective

__all__ = ["layer_findings"]

_REFUSED = "layer methods refuse them"


def layer_findings(objective: Objective) -> list[CheckResult]:
    """Check how often layers run in a pass, and which outputs are no map of the window.

    ``handled`` means that layer methods put each call into the frame of the window, or refuse the layer by name. It
    reads the trace that layer methods use, which runs once for a network and shape of a window.
    """
    layers = [s for s in traced_layers(objective).values() if s.name]
    dims = len(network_roi(objective.plan))
    repeated = [s for s in layers if s.calls > 1]
    steps = [s.name for s in repeated if s.sequential]
    views = [s.name for s in repeated if not s.sequential and None not in s.frames]
    open_ = [s.name for s in repeated if not s.sequential and None in s.frames]
    texts = []
    if views:
        each = f"{_names(views)} run several times in a pass, on views of the window"
        texts.append(f"{each}: the maps of the calls are added in the frame of the window; other methods refuse them")
    if steps:
        texts.append(f"{_names(steps)} run several times in a pass, one call on the result of another: {_REFUSED}")
    if open_:
        texts.append(f"{_names(open_)} run several times in a pass, and where each call lies is not known: {_REFUSED}")
    runs = CheckResult("layers", "handled" if texts else "passed", "; ".join(texts) or "each layer runs once")
    unread = [
        s.name for s in layers if s.calls == 1 and s.frames[0] is None and s.shape is not None and len(s.shape) > dims
    ]
    if not unread:
        text = "it is known where the output of each layer lies in the window"
        return [runs, CheckResult("layout", "passed", text)]
    text = f"{_names(unread)} give no map, or not known to be one: {_REFUSED}"
    return [runs, CheckResult("layout", "handled", text)]


def _names(names: Sequence[str], most: int = 4) -> str:
    """Return the outermost of some layers, in words."""
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    more = f" and {len(outer) - most} more" if len(outer) > most else ""
    return f"layers {', '.join(map(repr, outer[:most]))}{more}"
