"""The errors of the package. Each message names the problem, its place, and the remedy."""

from __future__ import annotations

__all__ = [
    "EsegetaError",
    "InputError",
    "MethodError",
    "MethodTimeout",
    "MetricError",
    "NetworkError",
    "OutputLost",
    "RankLost",
    "RuleError",
    "TargetError",
    "TrustError",
    "UsageError",
    "named_reason",
]


class EsegetaError(Exception):
    """Base of all errors of the package; its text is one line with the problem and the remedy."""


class UsageError(EsegetaError, ValueError):
    """A wrong option, name or parameter, detected before any computation."""


class TrustError(EsegetaError, PermissionError):
    """A bundle whose code would run, and which the user has not allowed to run; nothing of it has run."""


class InputError(EsegetaError, ValueError):
    """A scan that cannot be explained: unreadable, of the wrong shape, with non-finite voxels or a singular affine."""


class NetworkError(EsegetaError, RuntimeError):
    """A network or inferer that cannot be explained: unknown output, half precision, TorchScript."""


class TargetError(EsegetaError, ValueError):
    """A target that the prediction does not have: unknown class, mask on another grid."""


class MethodError(EsegetaError, RuntimeError):
    """A method that cannot run on this network or target; the message names the alternative."""


class RankLost(EsegetaError, RuntimeError):  # noqa: N818 - names the event
    """The end of another process of a distributed run, after which no joint computation is possible."""


class OutputLost(EsegetaError, RuntimeError):  # noqa: N818 - names the event
    """The loss of the output folder during a run: it was removed, or its journal cannot be written (a full disk)."""


class MetricError(EsegetaError, ValueError):
    """A metric that cannot evaluate this map, for lack of a label, an objective, the method or values in the map."""


class RuleError(MethodError):
    """An operation for which a modified backward pass has no rule."""


class MethodTimeout(EsegetaError, TimeoutError):  # noqa: N818 - names the event
    """The end of the time limit of one method; maps finished before are kept."""


def named_reason(error: Exception) -> str:
    """Return the text of an error for records: the message alone for errors of the package, else with the class name.

    >>> named_reason(UsageError("no such layer")), named_reason(ValueError("odd"))
    ('no such layer', 'ValueError: odd')
    """
    return str(error) if isinstance(error, EsegetaError) else f"{type(error).__name__}: {error}"
