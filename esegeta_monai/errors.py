"""The errors that a user of the package can meet. Each message says what, where, and what to do."""

from __future__ import annotations

__all__ = [
    "EsegetaError",
    "InputError",
    "MethodError",
    "MethodTimeout",
    "MetricError",
    "NetworkError",
    "RankLost",
    "RuleError",
    "TargetError",
    "UsageError",
    "named_reason",
]


class EsegetaError(Exception):
    """Base of all named errors of the package; its text is one line that a user can act on."""


class UsageError(EsegetaError, ValueError):
    """A wrong option, name or parameter: nothing has been computed yet."""


class InputError(EsegetaError, ValueError):
    """A scan that cannot be explained: unreadable, of the wrong shape, with non-finite voxels or a singular affine."""


class NetworkError(EsegetaError, RuntimeError):
    """A network or inferer that cannot be explained as it is: unknown output, half precision, TorchScript."""


class TargetError(EsegetaError, ValueError):
    """A target that the prediction does not have: unknown class, mask on another grid."""


class MethodError(EsegetaError, RuntimeError):
    """A method that cannot run on this network or target; the message names the alternative."""


class RankLost(EsegetaError, RuntimeError):  # noqa: N818 - reads as what happened
    """Another process of a distributed run has ended: nothing can be computed together any more."""


class MetricError(EsegetaError, ValueError):
    """A metric that cannot judge this map: it needs a label, an objective or the method, or the map says nothing."""


class RuleError(MethodError):
    """An operation on the path for which a modified backward pass has no rule."""


class MethodTimeout(EsegetaError, TimeoutError):  # noqa: N818 - reads as what happened
    """The time limit of one method has passed; what was finished before is kept."""


def named_reason(error: Exception) -> str:
    """What records say of an error: our own text as it is, any other with its kind before it.

    >>> named_reason(UsageError("no such layer")), named_reason(ValueError("odd"))
    ('no such layer', 'ValueError: odd')
    """
    return str(error) if isinstance(error, EsegetaError) else f"{type(error).__name__}: {error}"
