"""Is the score higher with this scan's content of a region than with that of other patients? Permutation p-values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.feature_masks import Channels, Grid, LabelMap, features_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Added
from esegeta_monai.engine.perturbation.game import Game
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.engine.perturbation.scoring import known_passes, known_score_changes
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.perturbation.ablation import cases_of, exchange_drops, one_off
from esegeta_monai.methods.perturbation.base import PerturbationMethod, finite_scores
from esegeta_monai.utils.multiple_tests import (
    Correction,
    adjusted,
    fewest_significant,
    needed_draws,
    permutation_p,
    significant,
)

__all__ = ["RegionTest"]

NOISE_DRAWS = 8
"""Images that differ from x by rounding, from which the noise of F is measured."""

NOISES = 10
"""τ in units of the noise of F."""

CLAIM = "the network's score for this scan is higher with this content than with that of a share of these donors"
NOT_UNUSED = "a large p does not mean that a region is unused"
ASSUMES = {
    "BH": "Benjamini-Hochberg over the regions of one target, assumes positive dependence",
    "BY": "Benjamini-Yekutieli over the regions of one target, any dependence",
}
DONORS = "p-values assume donors that are exchangeable with this scan: same grid, scanner and protocol, one a patient, "
DONORS += "not in training"


class RegionTest(PerturbationMethod):
    """Regions with p-values: ``p_j = (1 + #{i: F(x with region j from donor i) ≥ F(x) − τ})/(K + 1)``, K donors.

    Interpretability as a randomisation test (Burns et al. 2020), with the false discovery rate over the regions bounded
    by q. The map is the mean of ``F(x) − F(x with region j from donor i)`` over the donors, at the voxels of
    significant regions, and 0 elsewhere. The claim: the network's score for this scan is higher with this content than
    with that of a share of these donors. A large p does not mean that the region is unused.

    τ = 10 times the noise of F, the root mean square of its change over 8 images that differ from x by rounding, at
    least the rounding of F itself.

    p-values need regions fixed without looking at the scan: a grid, channels, or a label map of an atlas
    (``registered=True``). Regions drawn from the scan itself, such as supervoxels or predicted organs, get their rank
    among the donors, no p-values; their map has all regions.

    Seam control: the same paste the other way round, region j of x into donor i. A border between two images may lower
    F by itself. ``seam`` in the table is the share of donors whose score falls below that with their own content; above
    one half, a warning names the significant region.

    Args:
        cases: at least two donors: NIfTI files on the network's grid or tensors (C, *spatial), preprocessed like the
            image; of the same scanner and protocol, one a patient, not in training.
        feature_mask: the regions, see `esegeta_monai.engine.feature_masks`.
        registered: True: a label map is that of a registered atlas, not drawn from this scan.
        q: bound of the false discovery rate, between 0 and 1.
        correction: ``"BH"`` (Benjamini-Hochberg, assumes positive dependence of the regions) or ``"BY"``
            (Benjamini-Yekutieli, any dependence).
        seam_control: False: without the seam control, in half the passes.

    The record has ``p_values`` (whether they are given, and why not), ``claim``, ``statement`` (least p, and how many
    regions can be significant, as the dry run states it), ``correction``, ``tau`` and ``score_noise`` (units of the
    target), and the table under ``features``: mean change, p, adjusted p, significance (1 or 0), seam.

    Raises:
        UsageError: fewer than two donors, q outside 0 to 1, or ``registered`` for other regions than a label map.

    Example:
        >>> RegionTest([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)], "grid(size=4)").parameters["correction"]
        'BH'
    """

    reference = "Burns et al., FODS 2020, arXiv:1904.00045; Benjamini & Hochberg, JRSS B 57(1), 1995"
    full_precision = True
    cases: Sequence[Any] = ()
    feature_mask: Any = "grid"
    registered: bool = False
    q: float = 0.05
    correction: Correction = "BH"
    seam_control: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cases) < 2:
            raise UsageError(
                f"RegionTest compares with other cases, but cases has {len(self.cases)} entries: give at least two "
                "files or tensors; FeatureAblation needs none"
            )
        if not 0 < self.q < 1:
            raise UsageError(f"q={self.q}: the false discovery rate is between 0 and 1, such as 0.05")
        if self.registered and not isinstance(features_for(self.feature_mask), LabelMap):
            raise UsageError(
                f"registered=True concerns the label map of an atlas, and feature_mask={self.feature_mask!r} is none: "
                "leave it out"
            )

    @property
    def units(self) -> str:
        shown = "is significant and comes from a donor" if self.unfixed is None else "comes from a donor"
        return f"mean change of the target when the voxel's region {shown}"

    @property
    def unfixed(self) -> str | None:
        """Why the regions have no p-values; None: they are fixed without looking at the scan."""
        spec = features_for(self.feature_mask)
        if isinstance(spec, (Grid, Channels)) or (isinstance(spec, LabelMap) and self.registered):
            return None
        remedy = " (for the label map of an atlas, give registered=True)" if isinstance(spec, LabelMap) else ""
        return (
            f"the regions ({type(spec).__name__}) may be drawn from the scan itself, for which p-values are not valid: "
            f"ranks among donors are given{remedy}"
        )

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) where regions are channels."""
        game = Game.of(objective, self.feature_mask, 0.0)
        donors = self._donors(objective)
        n, progress = len(game.features), objective.context.progress
        statement = self._statement(n)
        if self.unfixed is None and fewest_significant(n, len(donors), self.q, self.correction) > 1:
            progress.warn(statement)
        noise = self._noise(objective)
        tau = NOISES * noise
        drops = torch.stack([finite_scores(self, d) for d in exchange_drops(game, donors)])
        at_least = (drops <= tau[:, None]).sum(0)
        columns = {"standard_deviation": drops.std(0), "donors_at_least": at_least.double()}
        if self.seam_control:
            columns["seam"] = self._seams(game, donors, tau)
        mean = drops.mean(0)
        notes: dict[str, Any] = {"n_features": n, "n_donors": len(donors), "score_noise": noise, "tau": tau}
        notes["statement"] = statement
        if self.unfixed is not None:
            notes["p_values"] = f"none: {self.unfixed}"
            columns["rank_among_donors"] = 1.0 + at_least
            chosen = torch.ones_like(mean)
        else:
            p = permutation_p(at_least.numpy(), len(donors))
            chosen = torch.from_numpy(significant(p, self.q, self.correction)).double()
            columns["p"] = torch.from_numpy(p)
            columns["p_adjusted"] = torch.from_numpy(adjusted(p, self.correction))
            columns["significant"] = chosen
            notes |= {"p_values": DONORS, "correction": ASSUMES[self.correction], "q": self.q}
            notes["claim"] = [self._claim(game.features.names, row) for row in chosen]
            self._warn_of_seams(objective, game.features.names, chosen, columns.get("seam"))
        maps = game.features.paint(mean * chosen).to(objective.image.dtype)
        return Explained(maps, {**notes, "features": game.features.table(mean, **columns)})

    def foreseen(self, objective: Objective) -> str:
        return self._statement(len(Game.of(objective, self.feature_mask, 0.0).features))

    def perturbations(self, objective: Objective) -> Segments:
        """Return one round, with the first of the donors."""
        game = Game.of(objective, self.feature_mask, 0.0)
        return game.segments(one_off(game), cases_of(objective, self.cases[:1])[0])

    def predictions(self, objective: Objective) -> int:
        rounds = len(self.cases) * (2 if self.seam_control else 1)
        return NOISE_DRAWS + rounds * super().predictions(objective)

    def passes(self, objective: Objective) -> int:
        """Count the images of the noise, one round of all regions per donor, and the same in each donor."""
        game = Game.of(objective, self.feature_mask, 0.0)
        donors = self._donors(objective)
        coalitions = one_off(game)
        rounds = [game.segments(coalitions, donor) for donor in donors]
        total = known_passes(objective, *self._rounded(objective), *rounds)
        for other in (self._into(game, donor) for donor in donors if self.seam_control):
            total += known_passes(other.objective, other.segments(coalitions))
        return total

    def _statement(self, n: int) -> str:
        """Return what the test can find for n regions, known before it runs."""
        if self.unfixed is not None:
            return self.unfixed
        draws, fewest = len(self.cases), fewest_significant(n, len(self.cases), self.q, self.correction)
        alone, together = (needed_draws(n, self.q, self.correction, alone=a) for a in (True, False))
        start = f"{draws} donors: the least p is 1/{draws + 1} = {1 / (draws + 1):.3g}; of {n} regions, "
        if fewest > n:
            return start + (
                f"none can be significant at q = {self.q:g}: give at least {together} donors, or {alone} so that a "
                "single region can be"
            )
        if fewest > 1:
            return start + (
                f"{fewest} to {n} can be significant at q = {self.q:g}, never fewer than {fewest}: give at least "
                f"{alone} donors so that a single region can be, or larger regions"
            )
        return start + f"1 to {n} can be significant at q = {self.q:g}"

    def _donors(self, objective: Objective) -> list[Tensor]:
        """Load the donors (C, *spatial).

        Raises:
            InputError: two of them are equal, or one is the image.
        """
        donors = cases_of(objective, self.cases)
        for (i, a), (j, b) in itertools.combinations([*enumerate(donors), (None, objective.image)], 2):
            if torch.equal(a, b):
                other = "the image itself" if j is None else f"cases[{j}]"
                raise InputError(f"cases[{i}] is equal to {other}: each donor must be another patient, leave one out")
        return donors

    def _rounded(self, objective: Objective) -> list[Added]:
        """Return the images that differ from x by plus or minus one unit in the last place of each value."""
        x, generator = objective.image, objective.generator()
        unit = torch.finfo(x.dtype).eps * x.abs()
        signs = (torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for _ in range(NOISE_DRAWS))
        return [Added((unit * sign)[None]) for sign in signs]

    def _noise(self, objective: Objective) -> Tensor:
        """Return the noise of F (k,), float64: its change by rounding of x, at least the rounding of F itself."""
        changes = [known_score_changes(objective, added)[:, 0] for added in self._rounded(objective)]
        least = torch.finfo(objective.image.dtype).eps * objective.image_values().abs().cpu()
        return torch.stack(changes).square().mean(0).sqrt().maximum(least)

    def _into(self, game: Game, donor: Tensor) -> Game:
        """Return the game whose features are taken from x and pasted into a donor, under the frozen masks of x."""
        return Game(game.objective.derive(image=donor), game.features, game.objective.image, None)

    def _seams(self, game: Game, donors: Sequence[Tensor], tau: Tensor) -> Tensor:
        """Return the share of donors (k, n) whose score falls when a region of x replaces their own content."""
        falls = torch.zeros(game.objective.n_targets, len(game.features), dtype=torch.float64)
        for other in (self._into(game, donor) for donor in donors):
            falls += finite_scores(self, other.values(one_off(other))) < -tau[:, None]
        return falls / len(donors)

    def _claim(self, names: Sequence[str], chosen: Tensor) -> str:
        shown = [name for name, yes in zip(names, chosen.tolist()) if yes]
        if not shown:
            return f"no region is significant at q = {self.q:g}; {NOT_UNUSED}"
        return f"{CLAIM}: {', '.join(shown)} (q = {self.q:g}); {NOT_UNUSED}"

    def _warn_of_seams(self, objective: Objective, names: Sequence[str], chosen: Tensor, seams: Tensor | None) -> None:
        if seams is None:
            return
        for score, rows, shares in zip(objective.scores, chosen, seams):
            doubtful = [n for n, yes, share in zip(names, rows.tolist(), shares.tolist()) if yes and share > 0.5]
            if doubtful:
                objective.context.progress.warn(
                    f"{', '.join(doubtful)}: the score also falls in most donors when this scan's content is pasted "
                    "into them, so the border of the region may be the cause, not its content",
                    score.label,
                )
