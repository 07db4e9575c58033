"""Options and results of `esegeta_monai.output.cohort.analysis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from esegeta_monai.errors import UsageError
from esegeta_monai.output.cohort.cells import Cells
from esegeta_monai.output.cohort.clusters import Association, Clusters
from esegeta_monai.output.cohort.groups import RegionTest, VoxelMethod, VoxelTest
from esegeta_monai.output.cohort.maps import Family, LeftOut, is_problem
from esegeta_monai.output.cohort.regions import RegionRow, RegionSummary
from esegeta_monai.output.cohort.space import CommonSpace, Moments
from esegeta_monai.utils.multiple_tests import Correction

__all__ = ["Cohort", "CohortOptions", "FamilyResult", "GroupResult"]


@dataclass(frozen=True)
class CohortOptions:
    """Options of `esegeta_monai.output.cohort.analyse`.

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
