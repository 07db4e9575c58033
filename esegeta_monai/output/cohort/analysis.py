"""Analyse the maps of an output folder over its cases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.output.cohort.cells import Cells, cells_for, pooled
from esegeta_monai.output.cohort.clusters import (
    associations,
    cluster_maps,
    embedding,
    outlier_scores,
    similarity,
)
from esegeta_monai.output.cohort.groups import (
    Design,
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
    open_map,
    read_families,
)
from esegeta_monai.output.cohort.regions import (
    RegionRow,
    columns,
    evaluated_rows,
    label_map,
    label_rows,
    labelled,
    labels_of_cases,
    shared_regions,
    summary,
)
from esegeta_monai.output.cohort.results import Cohort, CohortOptions, FamilyResult, GroupResult
from esegeta_monai.output.cohort.space import CommonSpace, Moments, warped
from esegeta_monai.output.cohort.table import CaseTable

__all__ = ["analyse"]

logger = logging.getLogger("esegeta_monai")

WITHOUT_SPACE = (
    "No mean map: patients are not in one space, and the average of unregistered maps shows no place. Give --space "
    "REFERENCE and --transforms for mean and variance maps and tests of voxels."
)
LARGEST_STACK = 2_000_000_000
"""Bytes of all maps in the common space that are held for tests of voxels."""
LEAST_KEPT = 0.9
"""Share of a map below which a note states how much is beyond the reference or the cells."""


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
