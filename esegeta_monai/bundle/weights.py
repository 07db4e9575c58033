"""Find the weights of a bundle's network as its config loads them, and load them without Ignite."""

from __future__ import annotations

import ast
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ReferenceResolver
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.utils.weights_only import read_weights

__all__ = ["WeightSource", "components", "find_weights", "fit_names", "load_weights", "read_state", "references"]

logger = logging.getLogger(__name__)

# Usual keys of the network in a checkpoint, if the bundle names none.
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "network", "net", "network_state_dict", "unet_state_dict")
_MAX_INLINED = 100
"""References that are followed in one expression that loads weights."""
_LOADERS = ("load_state_dict", "load_old_state_dict")
_REFERENCE = re.compile(r"@(\w+(?:(?:::|#)\w+)*)")


@dataclass(frozen=True)
class WeightSource:
    """The checkpoint that a bundle's config loads into its network.

    Attributes:
        path: the file; it may be missing.
        found_in: for messages, what names the path: an id of the config, or the bundle format.
        key: the entry of the checkpoint with the state dict, if the config names one.
        strict: True if every key must match.
        method: method of the network that loads it, `load_state_dict` or MONAI's `load_old_state_dict`.
    """

    path: Path
    found_in: str
    key: str | None = None
    strict: bool = True
    method: str = "load_state_dict"


def components(config: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (id, content) of every dictionary in a config with a `_target_`, outermost first.

    >>> [key for key, _ in components({"a": {"_target_": "x"}, "b": [{"_target_": "y"}]})]
    ['a', 'b::0']
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield prefix, config
        items: Any = config.items()
    elif isinstance(config, (list, tuple)):
        items = enumerate(config)
    else:
        return
    for key, value in items:
        yield from components(value, f"{prefix}::{key}" if prefix else str(key))


def references(parser: ConfigParser, key: str) -> set[str]:
    """Return `key` and all ids that it mentions, directly or through others; nothing is evaluated.

    >>> sorted(references(ConfigParser({"a": "$@b.to(@c)", "b": {"_target_": "x"}, "c": 1}), "a"))
    ['a', 'b', 'c']
    """
    ids: set[str] = set()
    waiting = [key]
    while waiting:
        current = waiting.pop()
        if current in ids or current not in parser:
            continue
        ids.add(current)
        waiting.extend(_mentioned(parser[current]))
    return ids


def find_weights(
    parser: ConfigParser, network_id: str, bundle_dir: Path, resolve: Callable[[str], Any]
) -> WeightSource:
    """Find the checkpoint of the network: a `CheckpointLoader`'s, a loading expression's, or `models/model.pt`.

    Only the expression of the path is evaluated, never the handler or the expression that loads.

    Args:
        parser: the bundle's config.
        network_id: the id of the network in the config.
        bundle_dir: base of relative paths and of `models/model.pt`.
        resolve: function that evaluates an id of the config.
    """
    names = references(parser, network_id)
    source = _from_handler(parser, names, resolve) or _from_expression(parser, names, resolve)
    if source is None:
        return WeightSource(bundle_dir / "models" / "model.pt", "the bundle format")
    return WeightSource(bundle_dir / source.path, source.found_in, source.key, source.strict, source.method)


def read_state(source: WeightSource, device: torch.device) -> dict[str, torch.Tensor]:
    """Read the state dict of a checkpoint, tensors of any shape, always with `weights_only=True`.

    Raises:
        UsageError: the checkpoint is missing, contains more than tensors, or has no state dict.
        NetworkError: it is TorchScript.
    """
    if not source.path.is_file():
        raise UsageError(
            f"no weights at {source.path} (the path of {source.found_in}); put the bundle's checkpoint there, or set "
            "its path in the config"
        )
    try:
        checkpoint = read_weights(source.path, device)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{source.path} contains more than tensors, and unpickling it could run code; save only its state dict "
            f"with torch.save(network.state_dict(), path) ({_first_line(error)})"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:  # torch raises these for damaged files
        if "TorchScript" not in str(error):
            raise UsageError(f"{source.path} is not a readable checkpoint: {_first_line(error)}") from error
        raise NetworkError(
            f"{source.path} is a TorchScript archive, whose operations are not accessible; give the state dict "
            "(model.pt)"
        ) from error
    return _state_dict(checkpoint, source)


def fit_names(state: dict[str, torch.Tensor], network: nn.Module) -> None:
    """Remove the prefix of (Distributed)DataParallel from names, in place, unless the network has it itself.

    Args:
        state: a state dict, tensors of any shape.
        network: the network.
    """
    if not any(key.startswith("module.") for key in network.state_dict()):
        consume_prefix_in_state_dict_if_present(state, "module.")


def load_weights(network: nn.Module, source: WeightSource, device: torch.device) -> None:
    """Load `source` into `network`, always with `weights_only=True`.

    Raises:
        UsageError: the checkpoint is missing, contains more than tensors, or has no state dict.
        NetworkError: it is TorchScript, or does not fit the network.
    """
    state = read_state(source, device)
    fit_names(state, network)
    load = getattr(network, source.method)
    try:
        result = load(state) if source.method != "load_state_dict" else load(state, strict=source.strict)
    except RuntimeError as error:
        raise NetworkError(
            f"{source.path} does not fit {type(network).__name__}: {' '.join(str(error).split())[:400]}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys"):
        if keys := getattr(result, kind, None):
            logger.warning("%s: %d %s, first %s", source.path.name, len(keys), kind.replace("_", " "), keys[0])


def _from_handler(parser: ConfigParser, names: set[str], resolve: Callable[[str], Any]) -> WeightSource | None:
    for key, handler in components(parser.config):
        if str(handler["_target_"]).rpartition(".")[2] != "CheckpointLoader":
            continue
        targets = handler.get("load_dict")
        if not isinstance(targets, Mapping) or "load_path" not in handler:
            continue
        for entry, value in targets.items():
            if names & _mentioned(value):
                strict = resolve(f"{key}::strict") if "strict" in handler else True
                path = Path(resolve(f"{key}::load_path"))
                return WeightSource(path, f"CheckpointLoader in '{key}'", entry, str(strict) != "False")
    return None


def _from_expression(parser: ConfigParser, names: set[str], resolve: Callable[[str], Any]) -> WeightSource | None:
    """Find `$@network.load_state_dict(torch.load(PATH)[KEY])`, in one expression or through other ids."""
    for key, text in _expressions(parser.config):
        for call in _calls(_inline(parser, text)):
            function = call.func
            if not (isinstance(function, ast.Attribute) and function.attr in _LOADERS):
                continue
            if not (isinstance(function.value, ast.Name) and _id_of(function.value.id) in names and call.args):
                continue
            for inner in _calls(call.args[0]):
                if ast.unparse(inner.func) == "torch.load" and inner.args:
                    path = Path(_evaluate(parser, inner.args[0], resolve))
                    return WeightSource(path, f"expression in '{key}'", _subscript(call.args[0]), True, function.attr)
    return None


def _expressions(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    for key, value in items:
        name = f"{prefix}::{key}" if prefix else str(key)
        if isinstance(value, (Mapping, list, tuple)):
            yield from _expressions(value, name)
        elif isinstance(value, str) and value.startswith("$") and "load" in value:
            yield name, value[1:]


def _inline(parser: ConfigParser, text: str) -> ast.expr | None:
    """Parse an expression, with ids as names; an id that is a `torch.load` expression is replaced by it."""

    replaced: list[str] = []

    def put(match: re.Match[str]) -> str:
        content = parser.get(match[1])
        if isinstance(content, str) and content.startswith("$") and "torch.load" in content:
            replaced.append(match[1])
            if len(replaced) > _MAX_INLINED:
                raise UsageError(f"the expressions that load weights refer to each other without end, at '{match[1]}'")
            return _REFERENCE.sub(put, content[1:])
        return "__id_" + match[1].replace("::", "__of__").replace("#", "__of__")

    try:
        return ast.parse(_REFERENCE.sub(put, text), mode="eval").body
    except (SyntaxError, ValueError):  # an import statement or a multi-line lambda; it loads nothing
        return None
    except (RecursionError, MemoryError) as error:
        raise UsageError(f"an expression of the config is nested too deeply: ${text[:100]}") from error


def _id_of(name: str) -> str:
    return name.removeprefix("__id_").replace("__of__", "::")


def _evaluate(parser: ConfigParser, node: ast.expr, resolve: Callable[[str], Any]) -> Any:
    text = re.sub(r"__id_(\w+)", lambda match: "@" + _id_of(match[0]), ast.unparse(node))
    parser["_weights_path_"] = "$" + text
    return resolve("_weights_path_")


def _calls(tree: ast.expr | None) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call)) if tree is not None else iter(())


def _subscript(node: ast.expr) -> str | None:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return None


def _mentioned(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(ReferenceResolver.match_refs_pattern(value))
    if isinstance(value, Mapping):
        return set().union(*map(_mentioned, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_mentioned, value))
    return set()


def _state_dict(checkpoint: Any, source: WeightSource) -> dict[str, torch.Tensor]:
    if isinstance(checkpoint, Mapping):
        for key in (source.key, *_STATE_KEYS):
            if key in checkpoint and isinstance(checkpoint[key], Mapping):
                return dict(checkpoint[key])
        if checkpoint and any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
            return dict(checkpoint)
        holds = f"a dictionary with the keys {', '.join(map(str, list(checkpoint)[:8]))}"
    else:
        holds = f"a {type(checkpoint).__name__}"
    raise UsageError(
        f"{source.path} contains {holds}, no state dict; write one with torch.save(network.state_dict(), …)"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
