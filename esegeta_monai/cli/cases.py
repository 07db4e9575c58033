"""Cases from the arguments of the command line: their files, their names and the image that the network reads."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer
from monai.transforms import LoadImaged

import esegeta_monai.files as storage
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.log import reason
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.dicom import DICOM_SUFFIXES
from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.files.journal import JOURNALS
from esegeta_monai.utils.files import refuse_remote
from esegeta_monai.utils.names import SCAN_SUFFIXES, one_line

__all__ = ["PreparedCase", "Preprocessor", "ScanCase", "file_of_case", "find_cases", "fitting_files"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanCase:
    """One subject's scan: a file, a DICOM folder, or several files that are the channels of one image, in order.

    Attributes:
        problem: why it cannot be read, for a folder that could not be searched; such a case fails, the others go on.
    """

    name: str
    files: tuple[Path, ...]
    problem: str | None = None


def find_cases(
    inputs: Sequence[str], channel_names: Sequence[str] = (), leave_out: Path | None = None
) -> list[ScanCase]:
    """Return the cases of ``--input``, in order, with unique names.

    An input is a file; several files separated by commas (the channels of one case); a folder, which stands for all
    scans in it and in its subfolders, sorted; or any of these after ``NAME=``. A folder of DICOM files is one scan. If
    the network reads several channels, a folder with one file per channel, named after it (``sub1_T1c.nii.gz``), is
    one case. Links to folders are followed. A subfolder that cannot be read, or a link that leads back to a folder
    above it, becomes a case with a `ScanCase.problem`, so that its loss is reported. Output folders of other runs are
    left out, with a warning.

    Args:
        inputs: the values of ``--input``.
        channel_names: the names of the network's input channels, which give the order of the files of a case.
        leave_out: a folder to skip (the output folder).

    Raises:
        UsageError: a folder contains no scan, cannot be read, or is the one to leave out; an input is remote, a name
            contains slashes or control characters, or two cases have the same name.
    """
    cases: list[ScanCase] = []
    for text in inputs:
        for part in re.split("[,=]", text):
            refuse_remote(part.strip(), "--input ")
        name, path = None, text
        given = re.match(r"([^=]+)=(.+)", text)
        if given and not os.path.exists(text):
            if not re.search(r"[/\\]", given[1]):
                name, path = given[1], given[2]
            elif os.path.exists(given[2]):  # the case would take the file's name, which may be that of a person
                raise UsageError(
                    f"--input {given[1]}=...: a case name becomes a folder name and must not contain slashes"
                )
        named = list(_cases(path, channel_names, leave_out))
        if name is not None and len(named) > 1:
            raise UsageError(
                f"--input {text}: one name for the {len(named)} cases of a folder; give each its own NAME="
            )
        if name is not None and name != one_line(name):
            raise UsageError(f"--input {one_line(name)}=...: a case name must not contain control characters")
        cases += [replace(case, name=name or case.name) for case in named]
    try:
        storage.check_clashes([case.name for case in cases], [], [])
    except UsageError as error:
        raise UsageError(f"{error}, or on the command line: --input NAME=FILE") from error
    return cases


def _cases(text: str, channel_names: Sequence[str], leave_out: Path | None) -> Iterator[ScanCase]:
    path = Path(text)
    if "," in text and not os.path.exists(path):
        files = tuple(Path(part.strip()) for part in text.split(",") if part.strip())
        yield ScanCase(_common_name(files), files)
    elif not os.path.isdir(path) or (os.access(path, os.R_OK | os.X_OK) and _is_series(path)):
        yield ScanCase(storage.case_name(path), (path,))
    else:
        cases = list(_in_folder(path, channel_names, leave_out))
        if not cases:
            kinds = ", ".join(s for s in SCAN_SUFFIXES if s in (".nii.gz", ".nii", ".mha", ".nrrd", ".dcm", ".png"))
            raise UsageError(f"{path}: no scan in this folder or its subfolders (searched for {kinds} and others)")
        yield from cases


def _in_folder(root: Path, channel_names: Sequence[str], leave_out: Path | None) -> Iterator[ScanCase]:
    skipped = None if leave_out is None else Path(os.path.realpath(leave_out))
    if skipped == Path(os.path.realpath(root)):
        raise UsageError(
            f"--output {root} is the folder of the scans; choose another one, such as {root / 'explained'}"
        )
    yield from _search(root, root, (), channel_names, skipped)


def _search(
    folder: Path, root: Path, above: tuple[Path, ...], channel_names: Sequence[str], skipped: Path | None
) -> Iterator[ScanCase]:
    """Give the cases of a folder and its subfolders; ``above`` are the real paths of the folders that led to it."""
    real = Path(os.path.realpath(folder))
    if real == skipped:
        return
    if folder != root and any(folder.glob(JOURNALS)):
        logger.warning("%s is the output folder of another run: its maps are not read as scans", folder)
        return
    try:
        if real in above:
            raise OSError(errno.ELOOP, "a link that leads back to a folder above it")
        with os.scandir(folder) as listed:
            entries = sorted((e.name, _is_folder(e)) for e in listed if not e.name.startswith("."))
        if folder != root and _is_series(folder):
            yield ScanCase(storage.case_name(folder, root), (folder,))
            return
    except OSError as error:
        why = error.strerror or str(error)
        if folder == root:
            raise UsageError(f"--input {folder}: the folder cannot be read: {why}") from error
        problem = f"{folder.name}: the folder cannot be read ({why}), and no scan in it is explained"
        yield ScanCase(storage.case_name(folder, root), (folder,), problem)
        return
    files = [folder / name for name, is_folder in entries if not is_folder and name.lower().endswith(SCAN_SUFFIXES)]
    files = [f for f in files if not (f.suffix == ".hdr" and f.with_suffix(".img") in files)]  # one Analyze pair
    channels = by_channel(files, channel_names)
    if channels is not None:
        yield ScanCase(storage.case_name(folder, None if folder == root else root), channels)
    else:
        yield from (ScanCase(storage.case_name(file, root), (file,)) for file in files)
    for name, is_folder in entries:
        if is_folder:
            yield from _search(folder / name, root, (*above, real), channel_names, skipped)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder, a link to one, or a link that leads nowhere because it goes round in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return not entry.name.lower().endswith(SCAN_SUFFIXES)


def _is_series(folder: Path) -> bool:
    return folder.is_dir() and any(f.name.lower().endswith(DICOM_SUFFIXES) for f in folder.iterdir() if f.is_file())


def by_channel(files: Sequence[Path], channel_names: Sequence[str]) -> tuple[Path, ...] | None:
    """Return the file of each channel, in the network's order, matched by words of the file names; else None.

    >>> files = [Path("a_flair.nii.gz"), Path("a_t1.nii.gz"), Path("a_t1c.nii.gz")]
    >>> [str(f) for f in by_channel(files, ["T1c", "T1", "FLAIR"])]
    ['a_t1c.nii.gz', 'a_t1.nii.gz', 'a_flair.nii.gz']
    """
    words = {file: _words(file) for file in files}
    matching = [[f for f in files if "".join(_split(name)) in words[f]] for name in channel_names]
    if len(matching) < 2 or any(len(matches) != 1 for matches in matching):
        return None
    chosen = tuple(matches[0] for matches in matching)
    return chosen if len(set(chosen)) == len(chosen) else None


def _split(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", text.lower()) if word]


def _words(file: Path) -> list[str]:
    return _split(storage.case_name(file))


def _common_name(files: Sequence[Path]) -> str:
    """Return the common beginning of the names of a case's files; if there is none, the name of their folder."""
    parts = [re.split(r"([_\-. ])", storage.case_name(file)) for file in files]
    same = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*parts))
    name = "".join(words[0] for words in same).rstrip("_-. ")
    return name or Path(os.path.abspath(files[0])).parent.name or "case"


def file_of_case(what: str, text: str, case: ScanCase, data: Mapping[str, Any]) -> str:
    """Return the given file or data key, or the file of a folder whose name begins with the case's name.

    Args:
        what: the option, without dashes.
        text: its value.
        case: the case.
        data: its data dictionary.

    Raises:
        UsageError: no such file or folder, or not exactly one fitting file in the folder.
    """
    path = Path(text)
    if not path.is_dir():
        if not path.exists() and text not in data:
            raise UsageError(f"--{what} {text}: no such file or folder")
        return text
    fitting = fitting_files(path, case.name)
    if len(fitting) != 1:
        listed = ", ".join(f.name for f in fitting[:5]) or "none"
        raise UsageError(
            f"--{what} {path.name}: expected one file named {case.name}.nii.gz or {case.name}_….nii.gz, found: {listed}"
        )
    return str(fitting[0])


def fitting_files(folder: Path, case: str) -> list[Path]:
    """Return the files of a folder that are named like a case, else those whose name begins with it."""
    names = {file: storage.case_name(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    exact = [file for file, name in names.items() if name == case]
    return exact or [f for f, n in names.items() if n.startswith(case) and not n[len(case) :][:1].isalnum()]


@dataclass
class PreparedCase:
    """A case that is ready to be explained.

    Attributes:
        scan: its file, or several files as one MetaTensor (C, *spatial).
        image: the image (C, *spatial) that the network reads, with its trace.
        given: arguments of `esegeta_monai.Explainer` for it, such as the data dictionary that holds it.
        pipeline: the preprocessing, which can run again.
        training_folds: see `esegeta_monai.bundle.BundleReader.training_folds`.
    """

    scan: Path | MetaTensor
    image: MetaTensor
    given: dict[str, Any]
    pipeline: Pipeline
    training_folds: dict[str, str]


class Preprocessor:
    """The bundle's own preprocessing, with checks of the scan before and after that give one-line errors.

    Args:
        reader: the reader of the bundle.
    """

    def __init__(self, reader: BundleReader) -> None:
        self.reader = reader
        self.transforms = reader.preprocessing
        self.keys = self._image_keys()
        self.spatial_dims, self.channels = self._expected()

    def _image_keys(self) -> tuple[str, ...]:
        loaders = [t for t in self.transforms.flatten().transforms if isinstance(t, LoadImaged)]
        loaded = [str(key) for t in loaders for key in t.keys]
        return (self.reader.image_key,) if self.reader.image_key in loaded or not loaded else tuple(loaded)

    def _expected(self) -> tuple[int | None, int | None]:
        """Return the number of spatial axes and channels of the preprocessed image; None if metadata.json has none."""
        inputs = self.reader.metadata.inputs
        declared: Any = inputs.get(self.reader.image_key) or inputs.get("image") or next(iter(inputs.values()), {})
        declared = declared if isinstance(declared, Mapping) else {}
        shape, channels = declared.get("spatial_shape"), declared.get("num_channels")
        dims = len(shape) if isinstance(shape, (list, tuple)) and len(shape) in (2, 3) else None
        if dims == 2 and isinstance(self.reader.inferer, SliceInferer):
            dims = 3
        return dims, channels if isinstance(channels, int) else None

    def read(self, case: ScanCase) -> MetaTensor:
        """Read the scan (C, *spatial), unprocessed, with several files as its channels.

        Raises:
            InputError: a file is missing, empty, truncated, altered or no image, or has NaN or a singular affine; the
                files of one case do not share a grid; the case has a problem.
        """
        if case.problem is not None:
            raise InputError(case.problem)
        scans = [storage.read_scan(file) for file in case.files]
        first = scans[0]
        for file, scan in zip(case.files, scans):
            near = np.allclose(np.asarray(scan.affine), np.asarray(first.affine), rtol=1e-3, atol=1e-3)
            if scan.shape[1:] != first.shape[1:] or not near:
                raise InputError(
                    f"'{file}' is not on the grid of '{case.files[0].name}': register and resample the channels of a "
                    "case to one grid first"
                )
        return first if len(scans) == 1 else MetaTensor(torch.cat([s.as_tensor() for s in scans]), meta=first.meta)

    def __call__(self, case: ScanCase) -> tuple[Path | MetaTensor, MetaTensor, dict[str, Any]]:
        """Preprocess a case.

        Returns:
            The scan (its file, or several files as one MetaTensor), the image (C, *spatial) that the network reads,
            with its trace, and the data dictionary that holds it.

        Raises:
            InputError: the scan is not usable, or a transform failed; the message names the cause.
        """
        scan = self.read(case)
        where = case.files[0].name
        storage.check_contents(scan, where)
        try:
            with self.reader.importable():
                data: Any = self.transforms(self._entry(case))
            image = data[self.reader.image_key]
        except Exception as error:  # a bundle's transforms may raise anything
            if len(self.keys) == 1 and len(case.files) == 1:  # the likely reason first
                storage.check_image(scan, where, spatial_dims=self.spatial_dims)
            hint = ""
            if isinstance(error.__cause__ or error, KeyError):
                hint = (
                    f" (available keys: {', '.join(self.keys)}; another config, given by --config, may need only these)"
                )
            raise InputError(f"{where}: the bundle's preprocessing failed: {reason(error)}{hint}") from error
        if not isinstance(image, torch.Tensor):
            raise InputError(f"{where}: the bundle's preprocessing gives a {type(image).__name__}, not a tensor")
        image = image if isinstance(image, MetaTensor) else MetaTensor(image)
        storage.check_image(image, where, spatial_dims=self.spatial_dims, channels=self.channels)
        storage.check_contents(image, f"{where} after the bundle's preprocessing")
        return case.files[0] if len(case.files) == 1 else scan, image, data

    def pipeline(self, case: ScanCase) -> Pipeline:
        """Return the preprocessing of a case, which can run again."""
        return Pipeline(self.transforms, self._entry(case), self.reader.image_key, self.reader.importable)

    def _entry(self, case: ScanCase) -> dict[str, Any]:
        files = [str(file) for file in case.files]
        if len(self.keys) == 1:
            return {self.keys[0]: files[0] if len(files) == 1 else files}
        if len(files) != len(self.keys):
            raise InputError(
                f"{len(files)} file(s), but the bundle loads {len(self.keys)} ({', '.join(self.keys)}): give them in "
                "this order, separated by commas: --input FILE,FILE"
            )
        return dict(zip(self.keys, files))
