"""Remove folders and names of scans from texts and tracebacks that leave the machine."""

from __future__ import annotations

import re
import traceback
from pathlib import PurePath
from typing import Any

from esegeta_monai.utils.names import SCAN_SUFFIXES

__all__ = ["private", "traceback_text", "without_paths"]

_SUFFIX = "|".join(re.escape(suffix) for suffix in SCAN_SUFFIXES)
# Rather hide too much than too little: names can contain spaces and commas, so a scan's name extends from a quote, from
# the slash of an absolute path, or else from the beginning of the statement, to its suffix, a folder's name to the last
# slash. Messages of this package therefore quote the names of files.
_QUOTED = re.compile(r"(['\"])([^'\"\n]*[\\/][^'\"\n]*)\1")
_SCAN = re.compile(rf"(?:^|(?<=[:;('\"=\[] )|(?<=[('\"=\[]))[^\n'\":;=\[\]\1]*?(?:{_SUFFIX})(?![\w.])", re.I | re.M)
_ABSOLUTE = re.compile(rf"(?<=\s)(?:[A-Za-z]:|~)?[\\/][^\n'\":;=\[\]]*?(?:{_SUFFIX})(?![\w.])", re.I)
_ANOTHER = re.compile(rf"[^\s'\":;=\[\]()\1]+(?:{_SUFFIX})(?![\w.])", re.I)
_FOLDERS = re.compile(
    r"(?<![\w:/\\.])(?:[A-Za-z]:(?=[\\/])|~(?=[\\/])|\.{1,2}(?=[\\/]))?[\\/](?=[^\s\\/])"
    r"(?:[^\\/\n'\"<>|;:]+[\\/])*[^\\/\s'\"<>|,;:()]*"
)
_RELATIVE = re.compile(r"(?<![\w:/\\.])(?:[^\\/\s'\"<>|,;:()=\[\]]+[\\/])+(?=[^\\/\s'\"<>|,;:()=\[\]]+\.\w{1,6}\b)")
_BASELINE = re.compile(rf"\bbaseline file ([^\s'\"]+?(?:{_SUFFIX}))(?![\w.])", re.I)
_PACKAGES = ("site-packages", "dist-packages")


def without_paths(text: str, relative: bool = True) -> str:
    """Replace names of scan files in ``text`` by "(scan)", and other paths by their last part.

    The file of a baseline keeps its name, as in the parameters of a method: it is no scan of the case.

    Args:
        relative: also replace relative paths; False for `traceback_text`, which names files relative to their package.

    >>> without_paths("/data/Doe Jane/t1.nii.gz: the file is empty")
    '(scan): the file is empty'
    >>> without_paths("cannot open /home/doe/weights.pt: see patients/doe/notes.txt; logit/voxel stays")
    'cannot open weights.pt: see notes.txt; logit/voxel stays'
    >>> without_paths("cannot open /data/Doe Jane/t1.nii.gz")
    'cannot open (scan)'
    >>> without_paths("Saliency: baseline file /data/doe/mean.nii.gz does not exist")
    'Saliency: baseline file mean.nii.gz does not exist'
    """
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(_last(match[1]))
        return f"baseline file \0{len(kept) - 1}\0"

    text = _BASELINE.sub(keep, text)
    text = _QUOTED.sub(lambda match: f"{match[1]}{_last(match[2])}{match[1]}", text)
    for names in (_ABSOLUTE, _SCAN, _ANOTHER):
        text = names.sub("\1", text)
    text = text.replace("\1", "(scan)")
    text = _FOLDERS.sub(lambda match: _last(match[0]), text)
    text = _RELATIVE.sub("", text) if relative else text
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def private(value: Any) -> Any:
    """Apply `without_paths` to every text of a JSON-like value, including keys.

    >>> private({"mask": "/data/doe/label.nii.gz", "window": [8, 8]})
    {'mask': '(scan)', 'window': [8, 8]}
    """
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {without_paths(str(k)): private(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [private(v) for v in value]
    return value


def traceback_text(error: BaseException, longest: int = 40) -> str:
    """Return the traceback of an error and its causes, with file names relative to their package.

    Args:
        longest: number of (innermost) frames per error.

    >>> def fails():
    ...     raise ValueError("no such axis in /home/doe/case.txt")
    >>> try:
    ...     fails()
    ... except ValueError as error:
    ...     print(traceback_text(error).splitlines()[-1])
    ValueError: no such axis in case.txt
    """
    lines: list[str] = []
    chain: list[traceback.TracebackException] = []
    link: traceback.TracebackException | None = traceback.TracebackException.from_exception(error)
    while link is not None and len(chain) < 10:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    for number, cause in enumerate(reversed(chain)):
        if number:
            lines += ["", "which led to:", ""]
        for frame in cause.stack[-longest:]:
            lines.append(f"  {_module(frame.filename)}, line {frame.lineno}, in {frame.name}")
            if frame.line:
                lines.append(f"    {without_paths(frame.line)}")
        lines += [without_paths(line) for line in "".join(cause.format_exception_only()).splitlines()]
    return "\n".join(lines)


def _module(filename: str) -> str:
    """Return the path of a source file relative to the folder of its package, which names no user.

    >>> _module("/home/doe/venv/lib/python3.11/site-packages/torch/nn/module.py"), _module("/home/doe/net.py")
    ('torch/nn/module.py', 'net.py')
    """
    parts = PurePath(filename.replace("\\", "/")).parts
    for name in _PACKAGES:
        if name in parts:
            return "/".join(parts[parts.index(name) + 1 :])
    if "esegeta_monai" in parts[:-1]:
        last = len(parts) - 2 - parts[:-1][::-1].index("esegeta_monai")
        return "/".join(parts[last:])
    return parts[-1] if parts else filename
