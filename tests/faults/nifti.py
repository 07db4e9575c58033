"""NIfTI files with a damage at a known place."""

from __future__ import annotations

import functools
import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (16, 20, 16)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
Make = Callable[[Path], object]


def ball(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A bright ball with noise, float32."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:3]], indexing="ij")
    values = np.exp(-4 * sum(a**2 for a in axes))
    noise = np.random.default_rng(0).normal(0, 0.1, shape)
    return (values.reshape(values.shape + (1,) * (len(shape) - values.ndim)) + noise).astype(np.float32)


@functools.cache
def plain(shape: tuple[int, ...] = SHAPE) -> bytes:
    """The bytes of a good, uncompressed file: a header of 348 bytes, 4 bytes of extension flags, float32 voxels."""
    return nib.Nifti1Image(ball(shape), AFFINE).to_bytes()


def put(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)


def raw(change: Callable[[bytes], bytes]) -> Make:
    """Change the bytes of the file as it lies on the disk, compressed if its name ends in ``.gz``."""

    def make(path: Path) -> None:
        put(path, plain())
        path.write_bytes(change(path.read_bytes()))

    return make


def field(*places: tuple[str, int, tuple[Any, ...]]) -> Make:
    """Overwrite header fields: format of `struct`, offset, values."""

    def make(path: Path) -> None:
        content = bytearray(plain())
        for form, offset, values in places:
            struct.pack_into(form, content, offset, *values)
        put(path, bytes(content))

    return make


def codes(qform: int, sform: int) -> tuple[str, int, tuple[int, int]]:
    return "<2h", 252, (qform, sform)


def dims(*sizes: int) -> tuple[str, int, tuple[int, ...]]:
    return "<8h", 40, (len(sizes), *sizes, *(1,) * (7 - len(sizes)))


def sform(matrix: Any, sform_code: int = 1, qform_code: int = 0) -> Make:
    rows = [("<4f", 280 + 16 * i, tuple(float(v) for v in matrix[i])) for i in range(3)]
    return field(codes(qform_code, sform_code), *rows)


def changed(cells: dict[tuple[int, int], float]) -> np.ndarray:
    matrix = AFFINE.copy()
    for cell, value in cells.items():
        matrix[cell] = value
    return matrix


def voxels(change: Callable[[np.ndarray], Any], dtype: Any = np.float32) -> Make:
    """Change the voxels: in place, or by the array that is returned."""

    def make(path: Path) -> None:
        values = ball().astype(dtype)
        given = change(values)
        nib.save(nib.Nifti1Image(values if given is None else given, AFFINE, dtype=dtype), path)

    return make


def one_voxel(value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[3, 4, 5] = value

    return change


def shaped(*shape: int) -> Make:
    return lambda path: nib.save(nib.Nifti1Image(ball(shape), AFFINE), path)


def big_endian(path: Path) -> None:
    nib.save(nib.Nifti1Image(ball(), AFFINE, nib.Nifti1Header(endianness=">")), path)


def two_forms(path: Path) -> None:
    """sform and qform that contradict: one exchanges x and y."""
    image = nib.Nifti1Image(ball(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.array([[0, 2.0, 0, 5], [2, 0, 0, 5], [0, 0, 2, 5], [0, 0, 0, 1]]), 1)
    nib.save(image, path)


def bomb(path: Path, sizes: tuple[int, int, int], dtype: int, bits: int, payload: int) -> None:
    """A header for ``sizes`` and ``payload`` MiB of zeros after it."""
    header = bytearray(plain()[:352])
    for form, offset, values in (dims(*sizes), ("<2h", 70, (dtype, bits))):
        struct.pack_into(form, header, offset, *values)
    with gzip.open(path, "wb", 9) as file:
        file.write(bytes(header))
        for _ in range(payload):
            file.write(b"\0" * (1 << 20))


def big_noise(path: Path, megabytes: float) -> np.ndarray:
    """A file of float32 noise, which hardly compresses."""
    n = int(np.cbrt(megabytes * 2**20 / 3.7))
    values = np.random.default_rng(0).normal(size=(n, n, n)).astype(np.float32)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(nib.Nifti1Image(values, np.eye(4)).to_bytes())
    path.write_bytes(buffer.getvalue())
    return values


def extensions(count: int, size: int) -> Make:
    """Extensions before the voxels: their number, and the bytes of each."""

    def make(path: Path) -> None:
        content = plain()
        header = bytearray(content[:348])
        struct.pack_into("<f", header, 108, 352.0 + count * size)
        with gzip.open(path, "wb", 1) as file:
            file.write(bytes(header) + b"\1\0\0\0")
            for _ in range(count) if size > 1 << 20 else ():
                file.write(struct.pack("<2i", size, 6) + bytes(12))
                for _ in range((size - 20) >> 20):
                    file.write(bytes(1 << 20))
                file.write(bytes((size - 20) % (1 << 20)))
            if size <= 1 << 20:
                file.write(struct.pack("<2i", size, 6).ljust(size, b"\0") * count)
            file.write(content[352:])

    return make
