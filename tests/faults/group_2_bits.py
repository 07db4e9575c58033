"""Flipped bits, and files that state or hold far more than they should.

A flip must be refused, or be harmless: the header of a gzip file has bytes (a time, a name) that change no voxel.
"""

from __future__ import annotations

import gzip
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

from esegeta_monai.engine.labels import label_on_grid
from esegeta_monai.engine.score import Case
from esegeta_monai.errors import EsegetaError
from esegeta_monai.files.scans import read_scan
from esegeta_monai.utils.whole_files import LIMIT, check_whole
from tests.faults import nifti as n
from tests.faults.runner import TARGET, Done, Row, command, limit_memory, statuses
from tests.support.cli import make_bundle, make_scan

GROUP = "2 flipped bits and bombs"
CROP = {
    "_target_": "Compose",
    "transforms": [
        {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
        {"_target_": "CenterSpatialCropd", "keys": "image", "roi_size": [16, 16, 16]},
    ],
}


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def judged(path: Path, truth: np.ndarray) -> str:
    try:
        values = np.asarray(read_scan(path))[0]
    except EsegetaError:
        return "refused"
    return "harmless" if np.array_equal(values, truth) else "silent"


def flips(count: int, truth: np.ndarray, good: Path, seed: int = 1) -> str:
    content, results = good.read_bytes(), Counter[str]()
    bad = good.with_name("flipped.nii.gz")
    for bit in np.random.default_rng(seed).integers(0, 8 * len(content), count).tolist():
        bad.write_bytes(flipped(content, bit))
        results[judged(bad, truth)] += 1
    assert not results["silent"], results
    return f"{results['refused']} refused, {results['harmless']} without effect on a voxel"


def small(folder: Path) -> str:
    good = make_scan(folder / "good.nii.gz")
    return flips(200, np.asarray(nib.load(good).dataobj, dtype=np.float32), good)


def each_byte_of_the_ends(folder: Path) -> str:
    """A bit of every byte of the gzip header and of the last twelve bytes."""
    good = make_scan(folder / "good.nii.gz")
    truth, content = np.asarray(nib.load(good).dataobj, dtype=np.float32), good.read_bytes()
    results = Counter[str]()
    for byte in [*range(10), *range(len(content) - 12, len(content))]:
        good.write_bytes(flipped(content, 8 * byte + byte % 8))
        results[judged(good, truth)] += 1
    assert not results["silent"], results
    assert results["refused"] >= 12
    return f"{dict(results)}"


def large(megabytes: float, count: int) -> Row:
    def check(folder: Path) -> str:
        good = folder / "good.nii.gz"
        truth = n.big_noise(good, megabytes)
        return f"{good.stat().st_size >> 20} MB: {flips(count, truth, good)}"

    return Row(GROUP, f"{count} flipped bits in a file of {megabytes:g} MB", check, slow=megabytes > 5)


def explain(folder: Path, scan: Path, crop: bool = True, **more: object) -> Done:
    bundle = folder / "bundle"
    if not bundle.exists():
        make_bundle(bundle, **({"preprocessing": CROP} if crop else {}))
    words = ["explain", "--bundle", bundle, "--input", scan, "--output", folder / "out", "--methods", "Saliency"]
    return command(*words, "--target", TARGET, "--no-pictures", "--overwrite", **more)


def through_the_command_line(folder: Path) -> str:
    n.big_noise(folder / "big.nii.gz", 2)
    content = (folder / "big.nii.gz").read_bytes()
    (folder / "big.nii.gz").write_bytes(flipped(content, 4 * len(content)))
    done = explain(folder, folder / "big.nii.gz")
    assert done.code == 1
    assert "big.nii.gz: the file is damaged" in done.errors[0], done.errors
    return done.errors[0][:150]


def through_the_handler(folder: Path) -> str:
    """``monai.bundle run`` loads the file itself; the handler refuses to explain it."""
    from monai.engines import SupervisedEvaluator
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import UNet
    from monai.transforms import Compose, LoadImaged

    from esegeta_monai.handlers import EvaluationHandler, ExplanationHandler

    scans = {"damaged": make_scan(folder / "damaged.nii.gz"), "good": make_scan(folder / "good.nii.gz")}
    n.raw(lambda b: b[:-8] + bytes(4) + b[-4:])(scans["damaged"])
    load = Compose([LoadImaged("image", ensure_channel_first=True)])
    torch.manual_seed(0)
    network = UNet(3, 1, 3, [4, 8], [2])
    handlers = [
        ExplanationHandler("Saliency", TARGET, folder / "out", pictures=False),
        EvaluationHandler("Saliency", TARGET, "Sparseness", folder / "out"),
    ]
    batches = [{"image": load({"image": str(path)})["image"][None]} for path in scans.values()]
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), batches, network, inferer=SlidingWindowInferer((16, 16, 16)), val_handlers=handlers
    )
    evaluator.run()
    results = {case: status for (case, _, _), status in statuses(folder / "out").items()}
    assert results == {"damaged": "failed", "good": "ok"}
    writer = handlers[1].writer
    assert writer is not None
    assert len(writer.problems) == 1
    assert "damaged" in writer.problems[0]
    assert "checksum is wrong" in writer.problems[0]
    return writer.problems[0].replace(f"{folder}/", "")[:150]


def through_the_transform(folder: Path) -> str:
    from esegeta_monai.transforms import Explain

    path = make_scan(folder / "a.nii.gz")
    n.raw(lambda b: b[:-8] + bytes(4) + b[-4:])(path)
    image = LoadImage(ensure_channel_first=True, image_only=True)(path)
    explain = Explain(torch.nn.Conv3d(1, 2, 3, padding=1), methods="Saliency", targets="MultiClassMask(1)")
    with pytest.raises(EsegetaError, match="checksum is wrong") as caught:
        explain(image)
    return str(caught.value).replace(f"{folder}/", "")


def through_a_label(folder: Path) -> str:
    """Labels, masks of targets and feature maps are read by another function."""
    path = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image((n.ball() > 0.5).astype(np.uint8), n.AFFINE), path)
    case = Case(torch.as_tensor(n.AFFINE), {}, {})
    assert bool(label_on_grid(path, torch.zeros(1, *n.SHAPE), case).any())
    n.raw(lambda b: b[:-8] + bytes(4) + b[-4:])(path)
    path.write_bytes(path.read_bytes())
    with pytest.raises(EsegetaError, match="checksum is wrong") as caught:
        label_on_grid(path, torch.zeros(1, *n.SHAPE), case)
    return str(caught.value)


def bombs(name: str, limit_mb: int, seconds: float, says: str, *content: object) -> Row:
    def check(folder: Path) -> str:
        bad = folder / "bomb.nii.gz"
        n.bomb(bad, *content)  # type: ignore[arg-type]
        usual = explain(folder, make_scan(folder / "good.nii.gz"))
        assert usual.code == 0, usual.err
        done = explain(folder, bad, before=limit_memory(6), timeout=60)
        assert done.code == 1, f"{done.code} {done.err[-300:]}"
        assert says in done.errors[0], done.errors
        more = (done.memory - usual.memory) >> 20
        assert more < limit_mb, f"{more} MiB"
        assert done.cpu_seconds - usual.cpu_seconds < seconds, f"{done.cpu_seconds - usual.cpu_seconds:.1f} s"
        return (
            f"{bad.stat().st_size >> 10} KiB: {done.cpu_seconds:.2f} s of processor time, {done.memory >> 20} MiB (a "
            f"good scan {usual.cpu_seconds:.2f} s, {usual.memory >> 20} MiB)"
        )

    return Row(GROUP, name, check, slow=bool(content[-1]) and int(str(content[-1])) > 500)


def many_extensions(name: str, says: str, count: int, size: int) -> Row:
    def check(folder: Path) -> str:
        bad = folder / "bad.nii.gz"
        n.extensions(count, size)(bad)
        usual = explain(folder, make_scan(folder / "good.nii.gz"))
        done = explain(folder, bad, before=limit_memory(6), timeout=60)
        assert done.code == 1, f"{done.code} {done.err[-300:]}"
        assert says in done.errors[0], done.errors
        assert done.cpu_seconds - usual.cpu_seconds < 1
        assert done.memory - usual.memory < 200 << 20
        return f"{bad.stat().st_size >> 10} KiB: {done.cpu_seconds:.2f} s of processor time"

    return Row(GROUP, name, check, slow=size > 1 << 20)


def raised_limit(folder: Path) -> str:
    """The user may raise the limit, or lower it; the message names the variable."""
    bomb = folder / "bomb.nii.gz"
    n.bomb(bomb, (16, 16, 16), 2, 8, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIMIT, "1")
        check_whole(bomb)
        patch.setenv(LIMIT, "1e-6")
        with pytest.raises(EsegetaError, match=f"set {LIMIT}=1"):
            check_whole(bomb)
    done = explain(folder, make_scan(folder / "good.nii.gz"), env={LIMIT: "much"})
    assert done.code == 1
    assert "give a number of GiB above 0" in done.errors[0]
    return done.errors[0][:120]


def cost(folder: Path) -> str:
    """Processor time of the check against that of a run on the same scan of 30 MB: at most 5 %."""
    scan = folder / "scan.nii.gz"
    n.big_noise(scan, 30)
    began = time.process_time()
    check_whole(scan)
    seconds = time.process_time() - began
    done = explain(folder, scan, crop=False, timeout=550)
    assert done.code == 0, done.err[-500:]
    share = seconds / done.cpu_seconds
    assert share <= 0.05, f"{seconds:.2f} s of {done.cpu_seconds:.2f} s"
    return f"{seconds:.2f} s of {done.cpu_seconds:.1f} s of processor time, {100 * share:.1f} %"


def memory(folder: Path) -> str:
    """The check needs no memory that grows with the file."""
    scan = folder / "scan.nii.gz"
    n.big_noise(scan, 30)
    done = command(code=lambda: check_whole(scan))
    assert done.code == 0, done.err
    assert done.memory < 16 << 20, f"{done.memory >> 20} MiB"
    return f"{done.memory >> 20} MiB for a file of {scan.stat().st_size >> 20} MB"


def once(folder: Path) -> str:
    """A file is checked once in a process, and again after it has changed."""
    scan = folder / "scan.nii.gz"
    n.big_noise(scan, 8)
    times = []
    for _ in range(2):
        began = time.process_time()
        check_whole(scan)
        times.append(time.process_time() - began)
    assert times[1] < 0.1 * times[0] + 0.002, times
    content = scan.read_bytes()
    scan.write_bytes(flipped(content, 4 * len(content)))
    try:
        check_whole(scan)
    except EsegetaError:
        return f"{times[0]:.3f} s, then {times[1]:.5f} s"
    raise AssertionError("the changed file was not checked again")


def isal(folder: Path) -> str:
    """The same answers with ``isal`` in place of zlib."""
    pytest.importorskip("isal")
    good = make_scan(folder / "good.nii.gz")
    return flips(50, np.asarray(nib.load(good).dataobj, dtype=np.float32), good, seed=2)


def plain_file(folder: Path) -> str:
    """No checksum, so no flip of a voxel can be found; the size is checked."""
    path = make_scan(folder / "a.nii")
    content = path.read_bytes()
    path.write_bytes(flipped(content, 8 * (352 + 400) + 22))
    assert isinstance(read_scan(path), MetaTensor)
    path.write_bytes(content[:-1])
    try:
        read_scan(path)
    except EsegetaError as error:
        return str(error).replace(f"{folder}/", "")
    raise AssertionError("read")


def flipped_in_members(folder: Path) -> str:
    """A flip in the second member of a gzip file, as bgzip and pigz -i write them."""
    good = folder / "good.nii.gz"
    content = n.plain()
    good.write_bytes(b"".join(gzip.compress(content[i : i + 4000]) for i in range(0, len(content), 4000)))
    return flips(40, n.ball(), good, seed=3)


ROWS = [
    Row(GROUP, "200 flipped bits in a small file", small),
    Row(
        GROUP,
        "flipped bits of the header and the trailer",
        each_byte_of_the_ends,
        why="time, flags and system in the header of gzip change no voxel",
    ),
    Row(GROUP, "flipped bits in a file of several members", flipped_in_members),
    large(3, 4),
    large(30, 12),
    Row(GROUP, "a flipped bit, on the command line", through_the_command_line),
    Row(GROUP, "a wrong checksum, in the handlers", through_the_handler),
    Row(GROUP, "a wrong checksum, in the transform", through_the_transform),
    Row(GROUP, "a wrong checksum, in a label map", through_a_label),
    Row(
        GROUP,
        "a flipped bit in an uncompressed file",
        plain_file,
        why="the format has no checksum, so nothing can find it; a missing byte is found",
    ),
    bombs("1500³ stated, 3.4 GB in 3.3 MB", 200, 1, "more than the limit", (1500, 1500, 1500), 2, 8, 3219),
    bombs("1290³ stated (2 GB) in 1 KB", 200, 1, "more than the limit", (1290, 1290, 1290), 2, 8, 0),
    bombs("400³ stated (64 MB) in 2 KB", 200, 1, "the file is truncated", (400, 400, 400), 2, 8, 1),
    bombs("2 GB after the voxels of 16³", 200, 1, "go on far beyond", (16, 16, 16), 16, 32, 2000),
    many_extensions("2,000,000 extensions of 16 bytes", "more than 1000 extensions", 2_000_000, 16),
    many_extensions("an extension of 1 GiB", "more than 64 MiB before the voxels", 1, 1 << 30),
    Row(GROUP, "the limit can be changed", raised_limit),
    Row(GROUP, "the check's share of a run on 30 MB", cost, slow=True),
    Row(GROUP, "the check's memory on 30 MB", memory, slow=True),
    Row(GROUP, "a file is read once, and again when it has changed", once),
    Row(GROUP, "flipped bits, with isal", isal),
]
