"""Analyse the maps of an output folder over its cases."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.output.cohort.cells import Cells, cells_for, pooled
from esegeta_monai.output.cohort.clusters import (
    Association,
    Clusters,
    associations,
    cluster_maps,
    embedding,
    outlier_scores,
    similarity,
)
from esegeta_monai.output.cohort.groups import (
    Design,
    RegionTest,
    VoxelMethod,
    VoxelTest,
    cluster_mass,
    max_t,
    two_groups,
)
from esegeta_monai.output.cohort.maps import (
    CohortMap,
    Family,
    LeftOut,
    Volume,
    centroid,
    field_of_view,
    is_problem,
    open_map,
    read_families,
)
from esegeta_monai.output.cohort.regions import (
    RegionRow,
    RegionSummary,
    columns,
    evaluated_rows,
    label_map,
    label_rows,
    labelled,
    labels_of_cases,
    shared_regions,
    summary,
)
from esegeta_monai.output.cohort.space import CommonSpace, Moments, warped
from esegeta_monai.output.cohort.table import CaseTable
from esegeta_monai.utils.multiple_tests import Correction

__all__ = ["Cohort", "CohortOptions", "FamilyResult", "GroupResult", "analyse"]

logger = logging.getLogger("esegeta_monai")

WITHOUT_SPACE = (
    "No mean map: patients are not in one space, and the average of unregistered maps shows no place. Give --space "
    "REFERENCE and --transforms for mean and variance maps and tests of voxels."
)
LARGEST_STACK = 2_000_000_000
"""Bytes of all maps in the common space that are held for tests of voxels."""
LEAST_KEPT = 0.9
"""Share of a map below which a note states how much is beyond the reference or the cells."""


@dataclass(frozen=True)
class CohortOptions:
    """Options of `analyse`.

    Attributes:
        space: reference image of the common space; None: there is none.
        transforms: ``identity``, folders, ``CASE=FILE[,FILE]``, see `esegeta_monai.output.cohort.space`.
        regions: folder of label maps in the spaces of the scans, or one label map in the common space.
        region_names: names of its labels.
        groups: CSV with case, group, and where known patient, site and other variables.
        correction: of tests of regions: ``"max"``, ``"BH"`` or ``"BY"``.
        voxels: test of voxels: ``"max-t"`` or ``"cluster-mass"``.
        level: significance level, 0 to 1.
        permutations: number of permutations.
        extent: edge in mm of the cube around the target in which maps are compared; None: the field of view.
        targets, methods: names to keep; empty: all.
        seed: of all random numbers.
    """

    space: str | None = None
    transforms: Sequence[str] = ()
    regions: str | None = None
    region_names: Mapping[int, str] = field(default_factory=dict)
    groups: str | None = None
    correction: Literal["max"] | Correction = "max"
    voxels: VoxelMethod = "max-t"
    level: float = 0.05
    permutations: int = 1999
    extent: float | None = None
    targets: Sequence[str] = ()
    methods: Sequence[str] = ()
    seed: int = 0

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: two options do not fit together.
        """
        if (self.space is None) != (not self.transforms):
            missing = "--transforms" if self.transforms == () else "--space"
            raise UsageError(
                f"{missing} is missing: a common space needs a reference (--space) and how each scan gets there "
                "(--transforms; 'identity' if the scans are registered already)"
            )
        if self.regions is not None and not Path(self.regions).exists():
            raise UsageError(f"--regions {self.regions}: no such file or folder")
        if self.regions is not None and not Path(self.regions).is_dir() and self.space is None:
            raise UsageError(
                f"--regions {self.regions}: one label map fits all cases only in a common space: also give --space and "
                "--transforms, or a folder with a label map for each case"
            )
        if self.region_names and self.regions is None:
            raise UsageError("--region-names names the values of a label map: also give --regions")
        if self.extent is not None and not self.extent > 0:
            raise UsageError(f"--extent {self.extent}: give a length in mm above 0")
        if not 0 < self.level < 1:
            raise UsageError(f"--level {self.level}: give a number between 0 and 1")


@dataclass(frozen=True)
class GroupResult:
    """Tests between two groups.

    Attributes:
        names: first and second group.
        patients: number of patients in each.
        least_p: least possible p.
        regions: names of the tested regions; ``untested``: of those that some patients lack.
        tests: of the regions; None if there are no regions.
        voxels: test of voxels; None without a common space.
        means: mean share of |a| per region and group (2, R).
    """

    names: tuple[str, str]
    patients: tuple[int, int]
    least_p: float
    regions: list[str]
    untested: list[str]
    tests: RegionTest | None
    means: np.ndarray
    voxels: VoxelTest | None


@dataclass
class FamilyResult:
    """Results of one target and method.

    Attributes:
        family: maps, and cases that were left out.
        cases: names of the cases that were used.
        features: maps divided by ``Σ |a|``, summed over cells (n, x, y, z).
        cells: the grid of cells; ``around`` states their centre in words.
        kept: share of each map's ``Σ |a|`` that is in the cells or in the reference (n,).
        similarity: cosine of each pair of maps (n, n).
        points: embedding (n, 2); ``variance`` shares of its axes.
        clusters: of the maps.
        associations: clusters against other variables.
        outliers: modified z-scores (n,).
        regions: rows of all cases; ``table`` their summary.
        moments: mean and variance in the common space; None without it.
        groups: tests between groups; None if there are no groups.
        notes: sentences for the reader.
    """

    family: Family
    cases: list[str]
    features: np.ndarray
    cells: Cells
    around: str
    kept: np.ndarray
    similarity: np.ndarray
    points: np.ndarray
    variance: tuple[float, float]
    clusters: Clusters
    associations: list[Association]
    outliers: np.ndarray
    regions: list[RegionRow]
    table: list[RegionSummary]
    moments: Moments | None
    groups: GroupResult | None
    notes: list[str]


@dataclass
class Cohort:
    """Results of a folder.

    Attributes:
        folder: the output folder.
        options: how it was analysed.
        families: one result for each target and method.
        left_out: cases without a map, of all targets and methods.
        notes: sentences on the whole folder.
        space: the common space; None if there is none.
    """

    folder: Path
    options: CohortOptions
    families: list[FamilyResult]
    left_out: list[LeftOut]
    notes: list[str]
    space: CommonSpace | None

    @property
    def problems(self) -> list[LeftOut]:
        """Cases that were left out for another reason than an empty target."""
        return [entry for entry in self.left_out if is_problem(entry)]


def analyse(folder: str | Path, options: CohortOptions | None = None) -> Cohort:
    """Analyse the finished maps of an output folder over its cases.

    Args:
        folder: output folder of ``explain``.
        options: see `CohortOptions`; None: the defaults.

    Raises:
        UsageError: an option is wrong, or the folder has no maps.
        InputError: the reference or a transform cannot be read.

    Example:
        >>> from tests.support.cohort import small_run  # doctest: +SKIP
        >>> cohort = analyse(small_run("out"))  # doctest: +SKIP
        >>> [r.family.method for r in cohort.families]  # doctest: +SKIP
        ['Saliency']
    """
    options = options or CohortOptions()
    options.check()
    folder = Path(folder)
    families, notes = read_families(folder, options.targets, options.methods)
    cases = list(dict.fromkeys(m.case for f in families for m in f.maps))
    names = list(dict.fromkeys([*cases, *(e.case for f in families for e in f.left_out)]))
    space = None if options.space is None else CommonSpace.read(options.space, options.transforms, names)
    if space is None:
        notes.append(WITHOUT_SPACE)
    table = None if options.groups is None else CaseTable.read(Path(options.groups))
    left_out: list[LeftOut] = []
    if table is not None:
        for case in table.rows:
            if case not in names:
                left_out.append(LeftOut(case, None, None, "missing", "it is in the table of groups, not in the folder"))
        if not set(table.rows) & set(cases):
            raise UsageError(f"--groups {options.groups}: no case of the table has a map; the folder has {cases[:3]}")
    results = []
    for family in families:
        result = _Analysis(options, space, table, cases).run(family)
        left_out += family.left_out
        if result is not None:
            results.append(result)
    if not results:
        reasons = "; ".join(f"{e.case}: {e.reason}" for e in left_out[:3])
        raise UsageError(f"{folder} has no map that can be used ({reasons})")
    return Cohort(folder, options, results, left_out, notes, space)


class _Analysis:
    """The analysis of one family."""

    def __init__(
        self, options: CohortOptions, space: CommonSpace | None, table: CaseTable | None, cases: Sequence[str]
    ) -> None:
        self.options, self.space, self.table = options, space, table
        self.labels: dict[str, Path] = {}
        self.atlas: np.ndarray | None = None
        if options.regions is not None and Path(options.regions).is_dir():
            self.labels = labels_of_cases(Path(options.regions), cases)
        elif options.regions is not None and space is not None:
            self.atlas = label_map(Path(options.regions), space.shape, space.grid.affine)

    def run(self, family: Family) -> FamilyResult | None:
        """Return the results; None if no map can be used."""
        volumes: list[Volume] = []
        maps: list[CohortMap] = []
        centres: list[np.ndarray] = []
        moved: list[tuple[np.ndarray, np.ndarray]] = []
        rows: list[RegionRow] = []
        notes = list(family.notes)
        for one in family.maps:
            try:
                assert one.result.map is not None
                volume = open_map(one.result.map)
                centre = centroid(one, volume) if self.space is None else np.zeros(3)
                if not volume.values.any():
                    raise UsageError("the map is zero everywhere, so it has no shares")
                if self.space is not None and one.case not in self.space.transforms:
                    raise UsageError("it has no transform to the common space: give --transforms for it")
                brought = None if self.space is None else warped(volume, self.space, self.space.transforms[one.case])
                own = self._regions(one, volume, None if brought is None else brought[0])
            except EsegetaError as error:
                status = "zero" if one.result.status == "zero" else "failed"
                family.left_out.append(LeftOut(one.case, family.target, family.method, status, str(error)))
                logger.warning("%s: left out: %s", one.case, error)
                continue
            volumes.append(volume)
            maps.append(one)
            centres.append(centre)
            moved += [] if brought is None else [brought]
            rows += own
            self._check_stack(len(maps))
        if not maps:
            return None
        cases = [m.case for m in maps]
        features, cells, around = self._features(maps, volumes, centres, moved)
        if moved:
            kept = np.array([np.abs(values).sum() for values, _ in moved])
        else:
            absolute = [pooled(np.abs(v.shares), v.affine, c, cells).sum() for v, c in zip(volumes, centres)]
            kept = np.array(absolute)
        for case, share in zip(cases, kept):
            if share < LEAST_KEPT:
                place = "the reference" if moved else "the cells"
                notes.append(f"{case}: only {100 * share:.0f} % of Σ |a| lies inside {place}.")
        points, variance = embedding(features)
        clusters = cluster_maps(features, seed=self.options.seed)
        moments = None
        if self.space is not None:
            order = sorted(range(len(moved)), key=lambda i: features[i].tobytes())  # sums in an order without names
            moments = Moments.of((moved[i] for i in order), self.space.shape)
        variables = self._variables(maps, volumes)
        beside = [] if clusters.labels is None else associations(clusters.labels, variables)
        groups = self._groups(cases, features, rows, moved, notes)
        return FamilyResult(
            *(family, cases, features, cells, around, kept, similarity(features), points, variance, clusters, beside),
            *(outlier_scores(features), rows, summary(rows), moments, groups, notes),
        )

    def _check_stack(self, n: int) -> None:
        if self.space is not None and n * 8 * int(np.prod(self.space.shape)) > LARGEST_STACK:
            raise UsageError(
                f"--space: {n} maps of {'x'.join(map(str, self.space.shape))} voxels need more than "
                f"{LARGEST_STACK // 10**9} GB: give a coarser reference"
            )

    def _regions(self, one: CohortMap, volume: Volume, brought: np.ndarray | None) -> list[RegionRow]:
        names = self.options.region_names
        if self.atlas is not None and brought is not None:
            return label_rows(one.case, brought, self.atlas, names)
        if self.labels:
            if one.case not in self.labels:
                raise UsageError("it has no label map in --regions")
            return label_rows(one.case, volume.shares, labelled(volume, self.labels[one.case]), names)
        return evaluated_rows(one)

    def _features(
        self,
        maps: Sequence[CohortMap],
        volumes: Sequence[Volume],
        centres: Sequence[np.ndarray],
        moved: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, Cells, str]:
        if self.space is not None:
            affine = np.asarray(self.space.grid.affine, dtype=np.float64)
            grid = Volume(np.broadcast_to(np.zeros(1), self.space.shape), affine)
            cells = cells_for([grid])
            middle = affine[:3, :3] @ ((np.asarray(self.space.shape) - 1) / 2) + affine[:3, 3]
            return np.stack([pooled(v, affine, middle, cells) for v, _ in moved]), cells, "the reference"
        cells = cells_for(volumes, self.options.extent)
        around = "the centroid of the target" if maps[0].result.mask is not None else "the centre of the scan"
        features = np.stack([pooled(v.shares, v.affine, c, cells) for v, c in zip(volumes, centres)])
        return features, cells, around

    def _variables(self, maps: Sequence[CohortMap], volumes: Sequence[Volume]) -> dict[str, Sequence[Any]]:
        """Return variables that clusters are compared with."""
        voxels = [np.linalg.norm(v.affine[:3, :3], axis=0) for v in volumes]
        sizes = [m.result.record.target_voxels for m in maps]
        probabilities = [m.result.record.predicted_probability for m in maps]
        classes = [m.result.record.predicted_class_name or m.result.record.predicted_class for m in maps]
        variables: dict[str, Sequence[Any]] = {
            "spacing, mm³": [round(float(v.prod()), 6) for v in voxels],
            "field of view, ml": [round(float(np.prod(field_of_view(v))) / 1000, 6) for v in volumes],
            "target, voxels": sizes,
            "score F(x)": [m.result.record.value for m in maps],
            "predicted class": [None if c is None else str(c) for c in classes],
            "predicted probability": probabilities,
        }
        cases = [m.case for m in maps]
        if self.table is not None:
            for column in ("group", "site", *self.table.variables):
                variables[column] = self.table.variable(cases, column)
        return {name: values for name, values in variables.items() if any(v is not None for v in values)}

    # -- groups --------------------------------------------------------------------------------------------------------

    def _groups(
        self,
        cases: Sequence[str],
        features: np.ndarray,
        rows: Sequence[RegionRow],
        moved: Sequence[tuple[np.ndarray, np.ndarray]],
        notes: list[str],
    ) -> GroupResult | None:
        table = self.table
        if table is None or len(table.groups) < 2:
            return None
        patients: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            if table.value(case, "group") is not None:
                patients.setdefault(table.value(case, "patient") or f"case {case}", []).append(i)
        if not patients:
            notes.append("No case of the groups has a map of this target.")
            return None
        members = list(patients.values())
        names = (table.groups[0], table.groups[1])
        for what in ("group", "site"):
            for patient, some in patients.items():
                if len({table.value(cases[i], what) for i in some}) > 1:
                    raise UsageError(
                        f"--groups: {patient} has several values of {what}; a patient is the unit of a test"
                    )
        second = [table.value(cases[some[0]], "group") == names[1] for some in members]
        sites = [table.value(cases[some[0]], "site") or "" for some in members]

        def by_patient(values: np.ndarray) -> np.ndarray:
            if all(len(some) == 1 for some in members):
                return values[[some[0] for some in members]]
            return np.stack([np.sort(values[some], axis=0).mean(0) for some in members])

        try:
            design = Design.of(by_patient(features), second, sites, self.options.permutations, self.options.seed)
        except UsageError as error:
            notes.append(f"No test between {names[0]} and {names[1]}: {error}.")
            return None
        used = [cases[i] for some in members for i in some]
        shared = shared_regions(rows, used)
        known = {r.region for r in rows}
        tests, means = None, np.zeros((2, 0))
        if shared:
            tested = by_patient(columns(rows, cases, shared))
            tests = two_groups(tested, design, self.options.correction)
            means = np.stack([tested[~design.second].mean(0), tested[design.second].mean(0)])
        voxels = None
        if moved:
            stack = by_patient(np.stack([values for values, _ in moved]))
            covered = np.stack([moved[i][1] for some in members for i in some]).all(0)
            covered &= np.ptp(stack, axis=0) > 0
            if covered.any():
                if self.options.voxels == "max-t":
                    voxels = max_t(stack, covered, design, self.options.level)
                else:
                    voxels = cluster_mass(stack, covered, design)
        count = (int((~design.second).sum()), int(design.second.sum()))
        return GroupResult(names, count, design.least_p, shared, sorted(known - set(shared)), tests, means, voxels)
