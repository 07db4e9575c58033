"""Registries of objects that a user names in text, such as methods and targets, with their parameters.

A method or target is an ordinary class. Its parameters are those of its ``__init__``, so that JSON, command line,
sidecar and documentation always agree.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import Field, dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import dataclass_transform

from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.utils.mistakes import separated_by_commas, write_instead
from esegeta_monai.utils.names import plain_key
from esegeta_monai.utils.types import fit_parameters

__all__ = ["Configurable", "Registry", "json_ready", "registered_names_only"]

_MAY_IMPORT: ContextVar[bool] = ContextVar("may_import", default=True)


@contextmanager
def registered_names_only() -> Iterator[None]:
    """Context in which no registry imports a dotted name: for names read from records, which any program may write.

    >>> registry = Registry("thing", Configurable, "no.such.group", command=False)
    >>> with registered_names_only():
    ...     registry.get("os.system")
    Traceback (most recent call last):
    esegeta_monai.errors.UsageError: there is no thing 'os.system': a name in a record is looked up among registered ...
    """
    token = _MAY_IMPORT.set(False)
    try:
        yield
    finally:
        _MAY_IMPORT.reset(token)


def json_ready(value: Any) -> Any:
    """Convert a value to JSON types: objects to their parameters, tensors to their shape, files to their name.

    >>> json_ready((1, torch.zeros(2, 3)))
    [1, 'tensor(2, 3)']
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Configurable):
        return {"name": type(value).__name__, **value.parameters}
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else f"tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(v) for v in value]
    if hasattr(value, "name") and hasattr(value, "parent"):  # a path: its folder may name a patient
        return value.name
    if hasattr(value, "__name__"):
        return value.__name__
    return str(value)


FOLDERS = re.compile(r"""(?<![^'"(\[,=\s])(~|[A-Za-z]:)?[\\/]([^'"()\[\],=]*[\\/])?(?=[^\\/'"()\[\],=]+\.\w)""")
"""The folders of a file's path, alone or in text such as ``LabelMap('/scans/Doe/atlas.nii.gz')``."""


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return FOLDERS.sub("", value)
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    return {k: _without_folders(v) for k, v in value.items()} if isinstance(value, dict) else value


def _make_dataclass(cls: type[Configurable]) -> None:
    """Make a dataclass whose ``name`` is keyword-only, and which may be decorated with ``@dataclass`` once more."""
    own = vars(cls).get("name")
    if "name" in vars(cls).get("__annotations__", {}) and not isinstance(own, Field):
        cls.name = field(default=own, kw_only=True)
    fields = {n: v for n, v in vars(cls).items() if isinstance(v, Field)}
    dataclass(eq=False, repr=False)(cls)
    for n, v in fields.items():
        if n not in vars(cls):  # a field without a plain default is gone from the class, where @dataclass looks for it
            setattr(cls, n, v)


def _checked(init: Callable[..., None], *, handwritten: bool) -> Callable[..., None]:
    """Return ``init`` followed by the check of parameters that no ``__post_init__`` has made."""

    @functools.wraps(init)
    def __init__(self: Configurable, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        if type(self).__init__ is not __init__:  # a base's __init__ runs before all parameters are set
            return
        if "given_name" not in vars(self):
            Configurable.__post_init__(self)
        if handwritten:
            fit_parameters(self, self.parameter_names())

    return __init__


@dataclass_transform(eq_default=False, field_specifiers=(field,))
@dataclass(eq=False, repr=False)
class Configurable:
    """A named object whose parameters are those of its ``__init__``, checked against their annotations.

    Every subclass becomes a dataclass, its annotated attributes the parameters, unless it has or inherits a handwritten
    ``__init__``. Decorating it with ``@dataclass`` changes nothing.

    Attributes:
        name: the name in files and pictures; the class name unless the user gives one.
        given_name: the name that the user gave, or None.
    """

    name: str | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        handwritten = "__dataclass_fields__" not in vars(next(c for c in cls.__mro__ if "__init__" in vars(c)))
        if not handwritten:
            _make_dataclass(cls)
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls.__init__, handwritten=handwritten)  # type: ignore[method-assign]

    @classmethod
    def parameter_names(cls) -> list[str]:
        """Return the names of the ``__init__`` parameters in order, without ``name``."""
        signature = inspect.signature(cls.__init__)
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [p.name for p in signature.parameters.values() if p.kind in kinds and p.name not in ("self", "name")]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters with their values, JSON-ready; paths without folders, which may name a patient."""
        return {p: _without_folders(json_ready(getattr(self, p, None))) for p in self.parameter_names()}

    def __post_init__(self) -> None:
        self.given_name: str | None = getattr(self, "name", None)
        self.name = self.given_name or type(self).__name__
        # a handwritten __init__ may set its own parameters after its base's, see _checked
        fit_parameters(self, [p for p in self.parameter_names() if hasattr(self, p)])

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items())
        return f"{type(self).__name__}({inner})"


T = TypeVar("T", bound=Configurable)


class Registry(Generic[T]):
    """Classes of one kind by name: those of this package, of entry points, and of modules that a caller imports.

    Args:
        kind: noun for error messages, such as ``"method"``.
        base: the base class of all entries.
        group: entry-point group in which other packages register theirs.
        command: True: errors refer to the command that lists the classes, named after the kind; False: they list them.
        advice: text that follows in the error for an unknown name, from that name, unless it is a clear misspelling;
            None: nothing.
    """

    def __init__(
        self, kind: str, base: Any, group: str, *, command: bool = True, advice: Callable[[str], str] | None = None
    ) -> None:
        self.kind, self.group, self.command, self.advice = kind, group, command, advice
        self.base: type[T] = base
        self._classes: dict[str, type[T]] = {}
        self._entry_points_loaded = False
        _REGISTRIES.append(self)

    def register(self, cls: type[T], *aliases: str) -> type[T]:
        """Add ``cls`` under its own name and ``aliases``; it replaces an earlier definition of the same class.

        Raises:
            UsageError: a name is taken by another class.
        """
        for name in (cls.__name__, *aliases):
            known = self._classes.get(plain_key(name), cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise UsageError(f"the {self.kind} name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        for name in (cls.__name__, *aliases):
            self._classes[plain_key(name)] = cls
        return cls

    def _load_entry_points(self) -> None:
        if not self._entry_points_loaded:
            self._entry_points_loaded = True
            for entry in entry_points(group=self.group):
                self.register(entry.load(), entry.name)

    def __iter__(self) -> Iterator[type[T]]:
        self._load_entry_points()
        return iter(sorted(set(self._classes.values()), key=lambda c: c.__name__))

    def get(self, name: str) -> type[T]:
        """Return the class called ``name``, ignoring case, ``-`` and ``_``; dotted names are imported.

        In the context of `registered_names_only` nothing is imported.

        Raises:
            UsageError: no such class; the message lists near matches.
        """
        self._load_entry_points()
        cls = self._classes.get(plain_key(name.rsplit(".", 1)[-1] if name.startswith("esegeta_monai.") else name))
        if cls is not None:
            return cls
        if "." in name:
            known = [c for c in self._classes.values() if f"{c.__module__}.{c.__qualname__}" == name]
            return known[0] if known else self._import(name)
        raise UsageError(f"there is no {self.kind} {name!r}: {self._hint(name)}")

    def _hint(self, name: str) -> str:
        """Return what may have been meant by a name that this registry does not have."""
        commas = separated_by_commas(name)
        if commas is not None and all(plain_key(part) in self._classes for part in commas.split(",")):
            return f"separate several by commas: {commas}"
        for other in _REGISTRIES:
            if other is not self and plain_key(name) in other._classes:
                return f"{other._classes[plain_key(name)].__name__} is a {other.kind}; {self._listing_hint()}"
        near = difflib.get_close_matches(plain_key(name), self._classes, n=4, cutoff=0.5)
        names = list(dict.fromkeys(self._classes[k].__name__ for k in near))  # the best match first
        spelled = difflib.get_close_matches(plain_key(name), near, n=1, cutoff=0.8)  # no doubt what was meant
        advice = "" if self.advice is None or spelled else self.advice(name)
        if not names:
            return f"{self._listing_hint()}. {advice}" if advice else self._listing_hint()
        return f"did you mean {', '.join(names)}?{f' {advice}' if advice else ''}"

    def _listing_hint(self) -> str:
        if self.command:
            return f"'esegeta-monai {self.kind}s' lists all {self.kind}s"
        return f"there are {', '.join(cls.__name__ for cls in self)}"

    def _import(self, dotted: str) -> type[T]:
        if not _MAY_IMPORT.get():
            raise UsageError(
                f"there is no {self.kind} {dotted!r}: a name in a record is looked up among registered names only; "
                f"register the class by a bundle's scripts/ or by an entry point of {self.group}"
            )
        module, _, attribute = dotted.rpartition(".")
        try:
            cls = getattr(__import__(module, fromlist=[attribute]), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"cannot import the {self.kind} {dotted!r}: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise UsageError(f"{dotted!r} is no {self.kind}: it must derive from {self.base.__qualname__}")
        return cls

    def create(self, what: T | type[T] | str | Mapping[str, Any]) -> T:
        """Make an instance from a class, ``{"_target_": name}`` or text such as ``"Occlusion(window=16)"``.

        An instance is returned unchanged.

        Text is parsed, not evaluated: it may contain literals and nested calls of registered names only.

        Raises:
            UsageError: the description is invalid, or the class rejects the parameters.
        """
        if isinstance(what, self.base):
            return what
        if isinstance(what, type) and issubclass(what, self.base):
            return self._build(what, (), {})
        if isinstance(what, Mapping):
            arguments = {k: v for k, v in what.items() if k != "_target_"}
            if "_target_" not in what:
                raise UsageError(f"a {self.kind} in a config needs '_target_': got {dict(what)!r}")
            nested = {
                k: self._registry_of(str(v["_target_"])).create(v) if isinstance(v, Mapping) and "_target_" in v else v
                for k, v in arguments.items()
            }
            return self._build(self.get(str(what["_target_"])), (), nested)
        if isinstance(what, str):
            return self._parse(what)
        advice = f". {self.advice(str(what))}" if self.advice is not None and isinstance(what, int) else ""
        raise UsageError(
            f"cannot make a {self.kind} of {what!r}: give an instance, a class, a name, or a config{advice}"
        )

    def create_all(self, what: Any) -> list[T]:
        """Make a list of instances from one description, a list of them, or comma-separated text.

        Raises:
            UsageError: the text contains no name, or a description is invalid.
        """
        if isinstance(what, str):
            if not what.strip(", "):
                raise UsageError(f"no {self.kind} is named: {self._listing_hint()}")
            return [self.create(part) for part in split_calls(what)]
        if isinstance(what, (list, tuple)):
            return [self.create(part) for part in what]
        return [self.create(what)]

    def _build(self, cls: type[T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        try:
            return cls(*args, **kwargs)
        except EsegetaError:
            raise
        except (TypeError, ValueError) as error:
            names = ", ".join([*cls.parameter_names(), "name"])
            text = str(error).replace(f"{cls.__name__}.__init__() ", "")
            raise UsageError(f"{cls.__name__}: {text}; its parameters are: {names}") from error

    def _parse(self, text: str) -> T:
        if re.fullmatch(r"[^\W\d][\w -]*", text.strip()):  # words, as names of classes are: 'grey matter', 'grad-cam'
            return self._build(self.get(text.strip()), (), {})
        try:
            node = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            cls = self._classes.get(plain_key(text.partition("(")[0]))
            remedy = write_instead(text, () if cls is None else cls.parameter_names())
            raise UsageError(f"cannot read the {self.kind} {text!r}: {remedy}") from error
        value = self._node(node, text)
        if not isinstance(value, self.base):
            advice = self.advice(text.strip()) if self.advice is not None and isinstance(value, (int, str)) else ""
            general = "write Name or Name(parameter=value)"
            raise UsageError(f"cannot read the {self.kind} {text!r}: {f'{general}. {advice}' if advice else general}")
        return value

    def _node(self, node: ast.AST, text: str, *, top: bool = True) -> Any:
        name = _name(node)
        if top and name is not None:
            return self._build(self.get(name), (), {})
        called = _call_of(node)
        if called is not None:
            name, call = called
            registry = self if top else self._registry_of(name)
            args = tuple(self._node(a, text, top=False) for a in call.args)
            kwargs = {k.arg: self._node(k.value, text, top=False) for k in call.keywords if k.arg}
            return registry._build(registry.get(name), args, kwargs)
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self._node(n, text, top=False) for n in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if name is not None:  # an unquoted word or layer, as shells tend to leave it
            return name
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            commas = separated_by_commas(text) if top else None
            remedy = "" if commas is None else f": separate several by commas: {commas}"
            raise UsageError(
                f"{ast.unparse(node)!r} in {text!r} is neither a value nor a {self.kind}{remedy}"
            ) from error

    def _registry_of(self, name: str) -> Registry[Any]:
        """Return the registry with the name of a parameter's value, such as a baseline inside a method.

        This registry comes first. If none has the name, it is returned as well, so that its error lists its names.
        """
        for registry in (self, *(r for r in _REGISTRIES if r is not self)):
            try:
                registry.get(name)
            except UsageError:
                continue
            return registry
        return self


_REGISTRIES: list[Registry[Any]] = []
"""All registries in order of creation."""


def _name(node: ast.AST) -> str | None:
    """Return a word, a dotted name or a hyphenated name such as guided-backprop; None for any other node."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        return ast.unparse(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        left, right = _name(node.left), _name(node.right)
        return None if left is None or right is None else f"{left}-{right}"
    return None


def _call_of(node: ast.AST) -> tuple[str, ast.Call] | None:
    """Return the called name, which may be hyphenated, and the call; None for any other node."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func), node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        left, right = _name(node.left), _call_of(node.right)
        return None if left is None or right is None else (f"{left}-{right[0]}", right[1])
    return None


def split_calls(text: str) -> list[str]:
    """Split text at the commas outside brackets and quotes.

    >>> split_calls("Saliency, Occlusion(window=(8, 8, 8)),GradCam")
    ['Saliency', 'Occlusion(window=(8, 8, 8))', 'GradCam']
    """
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]
