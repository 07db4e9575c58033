"""Read the config files of a bundle as data: nothing is evaluated, and the size of what they expand to is limited.

JSON and YAML can be nested without end, YAML aliases and MONAI's macros (``%id``, ``%file.json::id``) multiply what
they name. The limits keep a file of a few bytes from taking all memory; a bundle of the Model Zoo has a few hundred
entries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv
from monai.utils.misc import CheckKeyDuplicatesYamlLoader, check_key_duplicates

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.mistakes import near_names

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_ENTRIES",
    "bundle_folder",
    "check_macros",
    "config_entries",
    "find_config_files",
    "merged_config",
    "parse_config",
]

MAX_BYTES = 1 << 20
"""Bytes of one config file."""
MAX_ENTRIES = 50_000
"""Entries of a config after aliases and macros have been replaced by what they name."""
MAX_DEPTH = 64
"""Levels of a config after aliases and macros have been replaced."""
_MAX_KEY = 256
_MAX_MACROS = 1000
_TOO_MANY = f"it expands to more than {MAX_ENTRIES} entries"
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels, or contains itself"
_REMEDY = "a config contains settings; put long lists of data into a file that the config's expressions read"


def auto3dseg_algorithms(folder: Path) -> list[str]:
    """Return the names of Auto3DSeg's algorithms in a folder: itself, or its subfolders."""
    files = (file for pattern in ("", "*/") for file in folder.glob(f"{pattern}algo_object.*"))
    return sorted({file.parent.name for file in files if file.suffix in (".pkl", ".json")})


def bundle_folder(given: str | Path) -> Path:
    """Return the absolute path of a bundle.

    Raises:
        UsageError: it is no folder; the message names the one that may have been meant.
    """
    folder = Path(given).resolve()
    if folder.is_dir():
        return folder
    if folder.exists():
        roots = [above for above in list(Path(given).parents)[:2] if (above / "configs").is_dir()]
        meant = f": give {roots[0]}" if roots else ", not the folder that has configs/"
        raise UsageError(f"no bundle at {given}: it is a file{meant}")
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    raise UsageError(f"no bundle at {given}: there is no such folder{near_names(folder.name, beside)}")


def find_config_files(bundle_dir: Path, given: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    """Return the config files to use, in the order in which they are merged.

    Args:
        bundle_dir: the bundle root.
        given: files relative to the bundle or to the working directory; None: ``configs/inference`` with a suffix of
            `ConfigParser`.

    Raises:
        UsageError: there is no such file.
    """
    if given is None:
        candidates = [bundle_dir / "configs" / f"inference.{suffix}" for suffix in ConfigParser.suffixes]
        config = next((file for file in candidates if file.is_file()), None)
        if config is None and (bundle_dir / "plans.json").is_file():
            raise UsageError(f"{bundle_dir.name} is an nnU-Net model folder: give it by --nnunet, not --bundle")
        if config is None and (algorithms := auto3dseg_algorithms(bundle_dir)):
            raise UsageError(
                f"{bundle_dir.name} is a folder of Auto3DSeg ({', '.join(algorithms)}): its AlgoEnsemble joins the "
                "finished predictions of algorithms with preprocessing and windows of their own, so there is no image "
                "that all of them see and no map of their mean; explain the network of each with its own inferer "
                "(esegeta_monai.Explainer), and folds of one algorithm together by EnsembleInferer(inferer, "
                "members=[...], average='softmax')"
            )
        if config is None and not (bundle_dir / "configs").is_dir():
            above = next((path for path in list(bundle_dir.parents)[:2] if (path / "configs").is_dir()), None)
            meant = "give the folder that has configs/" if above is None else f"give its bundle, {above}"
            raise UsageError(f"no bundle at {bundle_dir}: it has no folder configs; {meant}")
        if config is None:
            raise UsageError(
                f"{bundle_dir} has no configs/inference.json, .yaml or .yml; name the config to use with "
                f"config_files (--config FILE), there are: {_configs_in(bundle_dir)}"
            )
        return (config,)
    files = []
    for file in map(Path, [given] if isinstance(given, (str, Path)) else given):
        inside = bundle_dir / file
        chosen = inside if inside.is_file() else file.resolve()
        if not chosen.is_file():
            raise UsageError(
                f"no config file {file}, neither in {bundle_dir} nor from here; the bundle has: "
                f"{_configs_in(bundle_dir)}"
            )
        files.append(chosen)
    return tuple(files)


def _configs_in(bundle_dir: Path) -> str:
    names = sorted(f"configs/{file.name}" for file in (bundle_dir / "configs").glob("*.*") if file.stem != "metadata")
    return ", ".join(name for name in names if name.rpartition(".")[2] in ConfigParser.suffixes) or "none"


def parse_config(file: str | Path) -> dict[str, Any]:
    """Read one JSON or YAML file.

    Args:
        file: path with the suffix json, yaml or yml.

    Raises:
        UsageError: it is no regular file, larger than `MAX_BYTES`, not valid, or expands beyond the limits.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.yaml").write_text("a: {_target_: UNet}")
    ...     parse_config(Path(folder) / "a.yaml")
    {'a': {'_target_': 'UNet'}}
    """
    file = Path(file)
    try:
        if not file.is_file():  # a pipe or a device would be read for ever
            raise ValueError("it is no regular file" if file.exists() else "there is no such file")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB; {_REMEDY}")
        text = raw.decode("utf-8")
        content = _yaml(text) if file.suffix.lower() in (".yaml", ".yml") else _json(text)
        _measure(content)
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}, not a mapping of ids")
    except RecursionError as error:
        raise UsageError(f"{_shown(file)} cannot be read: {_TOO_DEEP}; {_REMEDY}") from error
    except Exception as error:  # any error of the JSON or YAML reader means a faulty file
        reason = " ".join(str(error).split())[:300]
        named = reason if type(error) is ValueError else f"{type(error).__name__}: {reason}"
        raise UsageError(f"{_shown(file)} cannot be read: {named}") from error
    return content


def merged_config(files: Sequence[Path]) -> dict[str, Any]:
    """Merge files from left to right as ``monai.bundle run --config_file`` does; macros stay as they are.

    Raises:
        UsageError: a file cannot be read, or cannot be merged with those before it.
    """
    parser = ConfigParser(config={})
    for file in files:
        for key, value in parse_config(file).items():
            try:
                merge_kv(parser, key, value)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise UsageError(f"'{key}' of {_shown(file)} cannot be merged: {error}") from error
    content: Any = parser.config
    return content


def check_macros(config: Mapping[str, Any], config_files: Sequence[Path] = ()) -> list[Path]:
    """Check that the macros of a config (``%id``, ``%file.json::id``) can be replaced within the limits.

    Args:
        config: the merged config; it is not changed.
        config_files: the files that were merged, for messages.

    Returns:
        The files that macros read, each once. A relative path is relative to the working directory, as in MONAI.

    Raises:
        UsageError: a file cannot be read, a macro names nothing, or the whole expands beyond the limits. The message
            begins with the file of the macro.

    >>> check_macros({"a": "%b", "b": [1, 2]})
    []
    >>> check_macros({"a": ["%a"]})
    Traceback (most recent call last):
    esegeta_monai.errors.UsageError: the macros of the config cannot be replaced: it is nested deeper than 64 levels...
    """
    files: dict[Path, Any] = {}
    left = {"entries": MAX_ENTRIES, "macros": _MAX_MACROS}

    def visit(value: Any, where: str, depth: int) -> None:
        left["entries"] -= 1
        if left["entries"] < 0:
            raise UsageError(f"the macros of the config cannot be replaced: {_TOO_MANY}")
        if depth > MAX_DEPTH:
            raise UsageError(f"the macros of the config cannot be replaced: {_TOO_DEEP} (at '{where[:100]}')")
        if isinstance(value, (Mapping, list)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, inner in items:
                visit(inner, f"{where}::{key}" if where else str(key), depth + 1)
        elif isinstance(value, str) and value.startswith("%"):
            left["macros"] -= 1
            if left["macros"] < 0:
                raise UsageError(f"the config has more than {_MAX_MACROS} macros: write their content in its place")
            visit(named(value, where), where, depth + 1)

    def named(macro: str, where: str) -> Any:
        try:
            path, key = ConfigParser.split_path_id(ConfigParser.resolve_relative_ids(where, macro)[1:])
            source: Any = config
            if path:
                file = Path(path)
                if file not in files:
                    files[file] = parse_config(file)
                source = files[file]
        except (ValueError, UsageError) as error:
            raise UsageError(f"{shown(macro, where)} cannot be replaced: {error}") from error
        for part in key.split("::") if key else ():
            try:
                source = source[int(part)] if isinstance(source, list) else source[part]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                expression = " (a macro names an entry; an expression begins with $)" if macro[1:2] in "$@" else ""
                raise UsageError(f"{shown(macro, where)} names no entry{expression}") from error
        return source

    def shown(macro: str, where: str) -> str:
        return f"{_files_of(where, config_files)}the macro {macro[:100]} of '{where[:100]}'"

    visit(config, "", 0)
    return list(files)


def _files_of(where: str, config_files: Sequence[Path]) -> str:
    """Return the files that have an id, for the begin of a message: "configs/inference.json: "."""
    own = where.partition("::")[0]
    if own == ConfigParser.meta_key:
        return "configs/metadata.json: "
    ids = {
        file: {key.lstrip("+~").replace("#", "::").partition("::")[0] for key in parse_config(file)}
        for file in config_files
    }
    having = [file for file in config_files if own in ids[file]]
    return "".join(f"{_shown(file)}: " for file in having[-1:])


def config_entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (id, value) of a config and everything in it, outermost first.

    >>> [key for key, _ in config_entries({"a": {"b": [1]}})]
    ['', 'a', 'a::b', 'a::b::0']
    """
    yield prefix, config
    if isinstance(config, (Mapping, list)):
        for key, value in config.items() if isinstance(config, Mapping) else enumerate(config):
            yield from config_entries(value, f"{prefix}::{key}" if prefix else str(key))


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=check_key_duplicates)


def _yaml(text: str) -> Any:
    """Parse YAML into nodes, measure them with aliases counted as often as they are used, and only then build them."""
    if not text.strip():
        return {}
    loader = CheckKeyDuplicatesYamlLoader(text)
    try:
        node = loader.get_single_node()
        _measure_nodes(node)
        return loader.construct_document(node) if node is not None else {}
    finally:
        loader.dispose()


def _measure_nodes(root: yaml.Node | None) -> None:
    """Raise a ValueError if a graph of YAML nodes expands beyond the limits."""
    measured: dict[int, tuple[int, int]] = {}  # by node: entries and levels
    active: set[int] = set()

    def measure(node: yaml.Node | None) -> tuple[int, int]:
        if node is None or isinstance(node, yaml.ScalarNode):
            return 1, 1
        if id(node) in measured:
            return measured[id(node)]
        if id(node) in active or len(active) > MAX_DEPTH:
            raise ValueError(f"{_TOO_DEEP}; {_REMEDY}")
        active.add(id(node))
        values: list[Any] = node.value
        inner = [n for pair in values for n in pair] if isinstance(node, yaml.MappingNode) else values
        sizes = [measure(n) for n in inner]
        active.discard(id(node))
        entries, levels = 1 + sum(n for n, _ in sizes), 1 + max((d for _, d in sizes), default=0)
        if entries > 2 * MAX_ENTRIES:  # the keys of mappings are nodes too
            raise ValueError(f"{_TOO_MANY}; {_REMEDY}")
        if levels > MAX_DEPTH:
            raise ValueError(f"{_TOO_DEEP}; {_REMEDY}")
        measured[id(node)] = entries, levels
        return entries, levels

    measure(root)


def _measure(config: Any) -> None:
    """Raise a ValueError if a config without aliases has too many entries, levels, or too long keys."""
    waiting = [(config, 1)]
    entries = 0
    while waiting:
        value, level = waiting.pop()
        entries += 1
        if entries > MAX_ENTRIES:
            raise ValueError(f"{_TOO_MANY}; {_REMEDY}")
        if level > MAX_DEPTH:
            raise ValueError(f"{_TOO_DEEP}; {_REMEDY}")
        if isinstance(value, dict):
            if any(len(str(key)) > _MAX_KEY for key in value):
                raise ValueError(f"a key has more than {_MAX_KEY} characters")
            waiting.extend((inner, level + 1) for inner in value.values())
        elif isinstance(value, list):
            waiting.extend((inner, level + 1) for inner in value)


def _shown(file: Path) -> str:
    """Return a file with its folder, which is short and does not depend on the machine."""
    return f"{file.parent.name}/{file.name}" if file.parent.name else file.name
