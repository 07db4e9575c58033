"""Measure clusters and tests between groups on networks with a known cause, with controls and cost.

    python benchmarks/cohort.py [--cases 60] [--splits 200]

Every case has a lesion; half of the cases also have the mark in the corner. The shortcut network uses the mark where it
is present; the lesion network never does, on the same images. The maps are those of an `explain` run on each network,
kept in ``build/cohort``, and are read back by the command ``cohort``. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy.stats import ttest_ind
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).parent / "known_cause"))

from causes import CAUSES, ROOT, Cause

from esegeta_monai import Explainer
from esegeta_monai.methods import METHODS
from esegeta_monai.output.cohort import CohortOptions, analyse
from esegeta_monai.output.cohort.clusters import cluster_maps
from esegeta_monai.output.cohort.groups import Design, cluster_mass, max_t, two_groups
from esegeta_monai.output.cohort.maps import open_map
from esegeta_monai.output.cohort.results import FamilyResult
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import ClassScore

FIRST_SEED = 8_000_000
"""Seeds that neither training nor the other benchmarks use."""
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
NAMES = ("LRP", "InputXGradient")
LEVEL, DRAWS = 0.05, 199


def case_name(index: int) -> str:
    return f"case_{index:03d}"


def explained(folder: Path, cause: Cause, n: int) -> Path:
    """Explain n cases with a lesion; every other one has the mark; return the output folder."""
    out = folder / cause.name
    methods, target = METHODS.create_all(",".join(NAMES)), ClassScore(1)
    writer = ResultWriter(out, methods, [target], pictures=False)
    explainer = Explainer(cause.network, on_error="record", checks=False)
    cases = CAUSES[1].cases(range(FIRST_SEED, FIRST_SEED + n))
    with writer.run:
        for i in range(n):
            image = cases.with_planted(i, lesion=True, shortcut=bool(i % 2))["image"].as_tensor()
            placed = MetaTensor(image, affine=torch.from_numpy(AFFINE))
            writer.explain(explainer, placed, case_name(i), methods, [target])
    return out


def regions_file(folder: Path) -> Path:
    """Write a label map of the mark (1) and of the eighths of the rest (2 to 9)."""
    case = CAUSES[1].cases(range(FIRST_SEED, FIRST_SEED + 1)).with_planted(0, lesion=True, shortcut=True)
    mark = case["shortcut"].numpy()[0] > 0
    index = np.indices(mark.shape)
    eighth = sum((index[a] >= mark.shape[a] // 2) * 2**a for a in range(3)) + 2
    labels = np.where(mark, 1, eighth).astype(np.uint8)
    path = folder / "regions.nii.gz"
    nib.save(nib.Nifti1Image(labels, AFFINE), path)
    return path


def clusters_row(result: FamilyResult, marked: np.ndarray) -> str:
    clusters = result.clusters
    labels = np.zeros(len(marked)) if clusters.labels is None else clusters.labels
    truth = [int(case.split("_")[1]) % 2 for case in result.cases]
    index = adjusted_rand_score(truth, labels)
    least = min(clusters.p) if clusters.p else float("nan")
    stability = "–" if clusters.stability is None else f"{clusters.stability:.2f}"
    return f"{clusters.number or 'none'} | {index:.2f} | {stability} | {least:.3f}"


def rate(hits: int, n: int) -> str:
    return f"{hits} of {n} ({hits / n:.3f})"


def halved(maps: np.ndarray) -> np.ndarray:
    """Sum maps (n, x, y, z) over 2 x 2 x 2 voxels, for tests that are repeated many times."""
    n, x, y, z = maps.shape
    return maps.reshape(n, x // 2, 2, y // 2, 2, z // 2, 2).sum((2, 4, 6))


def random_halves(maps: np.ndarray, regions: np.ndarray, splits: int) -> dict[str, int]:
    """Count findings between random halves of the same cases."""
    random = np.random.default_rng(0)
    n, count = len(maps), dict.fromkeys(("max", "BH", "max-t", "cluster-mass"), 0)
    tested = np.ptp(maps, axis=0) > 0
    for split in range(splits):
        second = np.zeros(n, dtype=bool)
        second[random.permutation(n)[: n // 2]] = True
        design = Design.of(regions, second.tolist(), None, DRAWS, seed=split)
        for correction in ("max", "BH"):
            test = two_groups(regions, design, correction)  # type: ignore[arg-type]
            count[correction] += bool((test.p_adjusted <= LEVEL).any())
        count["max-t"] += bool((max_t(maps, tested, design, LEVEL).p <= LEVEL).any())
        count["cluster-mass"] += bool((cluster_mass(maps, tested, design).p <= LEVEL).any())
    return count


def power(
    regions: np.ndarray, maps: np.ndarray, mark: np.ndarray, marked: np.ndarray, size: int, share: float, runs: int
) -> tuple[int, int, int]:
    """Count runs in which the mark's region is significant, a voxel of the mark is, and another region is."""
    random = np.random.default_rng(1)
    yes, no = np.flatnonzero(marked), np.flatnonzero(~marked)
    tested = np.ptp(maps, axis=0) > 0
    place = voxel = other = 0
    for run in range(runs):
        with_mark = round(share * size)
        rest = random.permutation(no)
        chosen = np.concatenate([rest[:size], random.permutation(yes)[:with_mark], rest[size : 2 * size - with_mark]])
        second = [False] * size + [True] * size
        design = Design.of(regions[chosen], second, None, DRAWS, seed=run)
        significant = two_groups(regions[chosen], design).p_adjusted <= LEVEL
        place += bool(significant[0])
        other += bool(significant[1:].any())
        voxel += bool((max_t(maps[chosen], tested, design, LEVEL).p[mark] <= LEVEL).any())
    return place, voxel, other


def seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def naive_max_t(maps: np.ndarray, second: np.ndarray, draws: int) -> np.ndarray:
    """Compute the largest |t| per permutation with one test of SciPy per permutation."""
    random, largest = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = random.permutation(second)
        largest.append(np.nanmax(np.abs(ttest_ind(maps[drawn], maps[~drawn]).statistic)))
    return np.array(largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cohort")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    n, marked = args.cases, np.arange(args.cases) % 2 == 1
    for cause in CAUSES:
        cause.folder = args.folder / "known_cause"
    atlas = regions_file(args.folder)
    reference = args.folder / "reference.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((40, 48, 40), np.float32), AFFINE), reference)
    table = args.folder / "groups.csv"
    rows = "".join(f"{case_name(i)},{'mark' if marked[i] else 'no mark'}\n" for i in range(n))
    table.write_text(f"case,group\n{rows}", encoding="utf-8")
    lesion, shortcut = CAUSES[:2]
    results: dict[tuple[str, str], FamilyResult] = {}
    stacks: dict[tuple[str, str], np.ndarray] = {}
    print(
        "| network | method | space | clusters | adjusted Rand index | stability | least p of a gap |\n"
        "|---|---|---|---|---|---|---|"
    )
    for cause in (shortcut, lesion):
        out = explained(args.folder, cause, n)
        common = CohortOptions(space=str(reference), transforms=("identity",), regions=str(atlas), groups=str(table))
        for space, options in (("none", CohortOptions()), ("common", common)):
            for result in analyse(out, options).families:
                method = result.family.method
                print(f"| {cause.name} | {method} | {space} | {clusters_row(result, marked)} |", flush=True)
                results[cause.name, method] = result
        for method in NAMES:
            family = results[cause.name, method].family
            stacks[cause.name, method] = np.stack([open_map(m.result.map).shares for m in family.maps])  # type: ignore[arg-type]

    print("\n| network | method | significant regions (of 9) | voxels | peak in the mark |\n|---|---|---|---|---|")
    labels = np.asarray(nib.load(atlas).dataobj)
    for (name, method), result in results.items():
        assert result.groups is not None
        assert result.groups.tests is not None
        assert result.groups.voxels is not None
        tests, voxels = result.groups.tests, result.groups.voxels
        significant = [r for r, p in zip(result.groups.regions, tests.p_adjusted) if p <= LEVEL]
        peak = np.unravel_index(np.abs(voxels.t).argmax(), voxels.t.shape)
        place = "yes" if labels[peak] == 1 else "no"
        count = int((voxels.p <= LEVEL).sum())
        print(f"| {name} | {method} | {', '.join(significant) or 'none'} | {count} | {place if count else '–'} |")

    honest = stacks["lesion", "LRP"]
    by_region = {
        key: np.stack([np.bincount(labels.ravel(), np.abs(m).ravel())[1:] for m in maps])
        for key, maps in stacks.items()
    }
    print(f"\nRandom halves of {n} cases, {args.splits} splits, any finding at {LEVEL}:\n")
    small = {key: halved(maps) for key, maps in stacks.items()}
    for key in (("lesion", "LRP"), ("shortcut", "LRP")):
        counts = random_halves(small[key], by_region[key], args.splits)
        print(
            f"* {key[0]}, {key[1]}: " + ", ".join(f"{k} {rate(v, args.splits)}" for k, v in counts.items()), flush=True
        )

    print("\nPower, shortcut network, LRP: 100 draws per row\n")
    print(
        "| patients per group | with the mark in the second | mark's region | a voxel of the mark | another region |\n"
        "|---|---|---|---|---|"
    )
    for size, share in ((6, 1.0), (10, 0.5), (10, 1.0), (14, 0.3)):
        key = ("shortcut", "LRP")
        hits = power(by_region[key], small[key], halved((labels == 1)[None])[0] > 0, marked, size, share, 100)
        print(f"| {size} | {share:.0%} | " + " | ".join(str(h) for h in hits) + " |", flush=True)

    print("\nSubsets of 40 cases of the lesion network: clusters in ", end="")
    random, times = np.random.default_rng(2), 0
    for _ in range(20):
        features = results["lesion", "LRP"].features[random.permutation(n)[:40]]
        times += cluster_maps(features, copies=100, resamples=1).labels is not None
    print(rate(times, 20))

    print("\n| step | seconds | naive | seconds |\n|---|---|---|---|")
    tested = np.ptp(honest, axis=0) > 0
    design = Design.of(by_region["lesion", "LRP"], marked.tolist(), None, 200)
    ours = seconds(lambda: max_t(honest, tested, design, LEVEL))
    naive = seconds(lambda: naive_max_t(honest[:, tested], marked, 200))
    print(
        f"| 200 permutations of {int(tested.sum())} voxels | {ours:.1f} "
        f"| a test of SciPy per permutation | {naive:.1f} |"
    )
    whole = seconds(lambda: cluster_maps(results["lesion", "LRP"].features))
    print(f"| clusters of {n} maps, with 200 copies and 50 bootstrap samples | {whole:.1f} | – | – |")


if __name__ == "__main__":
    main()
