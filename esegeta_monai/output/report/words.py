"""Texts of a report: summary, findings, and a paragraph for a paper."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from esegeta_monai.errors import UsageError
from esegeta_monai.explain.record import Record
from esegeta_monai.methods.base import METHODS
from esegeta_monai.methods.completeness import KEPT_BY_BIASES
from esegeta_monai.metrics.regions import OUTSIDE_ALARM
from esegeta_monai.output.report.collect import CaseResults, Result
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.registry import registered_names_only

__all__ = [
    *("PROBLEMS", "SCORE", "Finding", "Target", "count", "findings", "lead", "levels", "listed", "map_cautions"),
    *("map_tags", "methods_text", "plain", "plain_names", "references", "targets"),
]

Level = Literal["good", "note", "warn", "bad"]

GAP, DEVIATION, PADDING, SATURATED = 0.05, 1e-3, 0.01, 0.02
"""Thresholds of findings: completeness gap, deviation of the blended windows, share of the sum in padding, share of the
target's voxels beyond the end of the colours."""

OURS = (
    "esegeta_monai, after TorchEsegeta: Chatterjee et al., Applied Sciences 12(4), 1834, 2022, doi:10.3390/app12041834"
)
MONAI = "Cardoso et al., MONAI: an open-source framework for deep learning in healthcare, 2022, arXiv:2211.02701"

SCORE = (
    "The score F(x) is the number that is explained: the network's output for the target, added up over the target's "
    "voxels unless the target is defined otherwise. Scores of different targets are not comparable."
)

_KINDS = {
    "MultiClassMask": "all predicted voxels",
    "Component": "one component",
    "ThresholdMask": "voxels above a threshold",
    "LabelMask": "voxels of a given mask",
    "ClassScore": "score of the class",
    "Contrast": "against other classes",
    "Errors": "wrong voxels",
    "Box": "a box",
    "Voxel": "one voxel",
    "LayerNeuron": "a unit of a layer",
    "OutputValue": "output",
}
"""Targets in words, where a class has several."""

STATUS_WORDS: dict[str, Callable[[int], str]] = {
    "ok": lambda n: count(n, "map"),
    "zero": lambda n: count(n, "map of zeros", "maps of zeros"),
    "incomplete": lambda n: count(n, "incomplete map"),
    "empty_target": lambda n: count(n, "empty target"),
    "failed": lambda n: f"{n} failed",
    "timeout": lambda n: f"{n} ended by the time limit",
    "skipped": lambda n: f"{n} finished earlier",
    "altered": lambda n: f"{n} altered",
}
"""How many results have a status, in words."""

PROBLEMS = {
    "failed": "failed",
    "timeout": "was ended by the time limit",
    "altered": "has a map that is not the one 'explain' wrote",
}
"""Statuses of results that have no map to show, or none to trust, in words."""


@dataclass(frozen=True)
class Finding:
    """A finding to know before reading the maps."""

    level: Level
    text: str


@dataclass(frozen=True)
class Target:
    """A row of the table of targets."""

    name: str
    meaning: str
    class_name: str | None
    voxels: int | None
    volume_ml: float | None
    value: float | None
    reason: str | None
    score_means: str


def count(n: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun.

    >>> count(1, "map"), count(2, "map"), count(2, "loss", "losses")
    ('1 map', '2 maps', '2 losses')
    """
    return f"{n} {singular if n == 1 else plural or singular + 's'}"


def listed(words: Iterable[str]) -> str:
    """Join words with commas and "and".

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def first(case: CaseResults, entry: Callable[[Record], Any]) -> Any:
    """Return an entry of the first record of the case that has it."""
    values = (entry(result.record) for result in case.results)
    return next((value for value in values if value is not None), None)


def _network(record: Record) -> Any:
    return (record.network or {}).get("name")


def lead(case: CaseResults, info: dict[str, Any]) -> str:
    """Summarise what was explained, in two sentences."""
    if not case.explained:
        return "This case could not be explained: it failed before any method ran."
    bundle = info.get("bundle") or first(case, lambda r: r.bundle)
    version = info.get("bundle_version") or first(case, lambda r: r.bundle_version)
    network = first(case, _network)
    who = (
        f"“{bundle}”{f' (version {version})' if version else ''}" if bundle else f"the network {network or ''}".strip()
    )
    kinds = count(len(case.methods), "method"), count(len(case.targets), "target")
    names = listed(plain_names(case.targets).values())
    text = f"What does {who} look at in this scan? {kinds[0]} asked about {kinds[1]}: {names}."
    predicted = first(case, lambda r: r.predicted_class_name) or first(case, lambda r: r.predicted_class)
    if predicted is not None:
        probability = first(case, lambda r: r.predicted_probability)
        text += f" The predicted class is {predicted}"
        text += f", with probability {probability:.3g}." if probability is not None else "."
    return text


def plain_names(targets: Sequence[str]) -> dict[str, str]:
    """Return the names of targets as people say them; classes that several targets have keep the kind of target.

    >>> plain_names(["MultiClassMask-grey matter", "MultiClassMask-tumour", "Component-tumour"])["Component-tumour"]
    'tumour (one component)'
    """
    short = [plain(target) for target in targets]
    names = {}
    for target, name in zip(targets, short):
        kind = target.split("-", 1)[0]
        names[target] = name if short.count(name) == 1 else f"{name} ({_KINDS.get(kind, kind)})"
    return names if len(set(names.values())) == len(set(targets)) else {target: target for target in targets}


def plain(target: str) -> str:
    """Return a target's label as words: "MultiClassMask-grey matter" is "grey matter"."""
    return target.split("-", 1)[1] if "-" in target else target


def targets(case: CaseResults) -> list[Target]:
    """Describe the targets, in order."""
    described = []
    for name in case.targets:
        results = [r for r in case.explained if r.target == name]
        record = next((r.record for r in results if r.record.target_name is not None), Record())
        voxels = record.target_voxels
        grid = record.network_affine
        volume = None
        if voxels and grid and len(record.network_grid or ()) == 3 and _is_mask(results):
            volume = voxels * _determinant(grid) / 1000
        reason = next((r.reason for r in results if r.status == "empty_target"), None)
        kind = name.split("-")[0] if record.target == "PredictedClasses" else record.target or name
        if kind == "ClassScore":  # one number, no voxels
            voxels = None
        units = record.value_units or "units of the network's output"
        means = f"in {units}" + (
            "" if voxels is None else f", over {voxels:,} voxels: {_mean(record.value, voxels)} each"
        )
        described.append(Target(name, _meaning(kind), record.class_name, voxels, volume, record.value, reason, means))
    return described


def _mean(value: float | None, voxels: int) -> str:
    return "unknown" if value is None or not voxels else f"{value / voxels:.3g}"


def _is_mask(results: Sequence[Result]) -> bool:
    return any(r.mask is not None for r in results)


def _determinant(affine: Sequence[Sequence[float]]) -> float:
    (a, b, c), (d, e, f), (g, h, i) = (row[:3] for row in affine[:3])
    return abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))


def _meaning(kind: str) -> str:
    """Return the first sentence of a target's documentation."""
    try:
        with registered_names_only():
            doc = inspect.getdoc(TARGETS.get(kind)) or ""
    except UsageError:  # of a plug-in that is not installed here
        return ""
    return re.sub(r"[`]+", "", re.split(r"(?<=[.:])\s", " ".join(doc.split("\n\n")[0].split()))[0]).rstrip(":.") + "."


def levels(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return the number of problems and of cautions in words, by level."""
    several = {"bad": "problem", "warn": "caution"}
    counts = {level: sum(f.level == level for f in findings) for level in several}
    return [(level, count(n, several[level])) for level, n in counts.items() if n]


def map_cautions(entry: Mapping[str, Any]) -> list[str]:
    """Return what a reader of a map has to know, from its entry for the viewer (`map_entry`)."""
    texts = []
    if entry["nil"]:
        texts.append(f"{entry['nil']}.")
    elif entry["outside"] is not None and entry["outside"] > OUTSIDE_ALARM:
        texts.append(f"{100 * entry['outside']:.0f} % of the map lies outside the body, where there is nothing to see.")
    if entry["spacing"] and max(entry["spacing"]) > 1.5 * min(entry["grid"]):
        size = " x ".join(f"{s:.3g}" for s in entry["spacing"])
        texts.append(f"coarse: one position of the layer covers {size} {entry['length']}; the map is interpolated.")
    if entry["saturated"] is not None and entry["saturated"] > SATURATED:
        texts.append(f"{100 * entry['saturated']:.2g} % of the target's voxels lie beyond the end of the colours.")
    return texts


def map_tags(status: str, entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the marks of a map in the table: one word for each caution, with its explanation."""
    words = {"zero": "zero everywhere", "incomplete": "incomplete"}
    tags = [{"text": words[status], "title": ""}] if status in words else []
    for text in map_cautions(entry):
        word = (
            "nil" if text.startswith("numerically") else "coarse" if text.startswith("coarse") else "outside the body"
        )
        tags.append({"text": "saturated" if "beyond the end" in text else word, "title": text})
    return tags


def findings(
    case: CaseResults, embedded_notes: Sequence[str] = (), cautions: Mapping[int, Sequence[str]] | None = None
) -> list[Finding]:
    """List findings, the most severe first, those of one severity in the order of the run.

    Args:
        case: the results.
        embedded_notes: notes on the page.
        cautions: `map_cautions` of the maps, by their index in ``case.explained``. A caution that several maps share is
            listed once.
    """
    notable: list[Finding] = []
    names = plain_names(case.targets)
    for result in case.results:
        if result.status in PROBLEMS:
            what = "The case" if result.method is None else f"{result.method} for {names[str(result.target)]}"
            how = PROBLEMS[result.status]
            notable.append(Finding("bad", f"{what} {how}: {result.reason}"))
    for target in dict.fromkeys(r.target for r in case.results if r.status == "empty_target"):
        reason = next(r.reason for r in case.results if r.target == target and r.status == "empty_target")
        notable.append(
            Finding("warn", f"Empty target {names[str(target)]}: {reason or 'nothing was predicted there'}.")
        )
    for row in case.regions:
        if row["alarm"]:
            share = "" if row["share_of_abs"] is None else f" ({100 * row['share_of_abs']:.1f} % of the attribution)"
            text = "" if row["alarm"] == "alarm" else f": {row['alarm']}"
            what = f"Region alarm, {row['method']} for {names.get(row['target'], row['target'])}"
            notable.append(Finding("bad", f"{what}: {row['region']}{share}{text}"))
    for method in dict.fromkeys(row["method"] for row in case.metrics if row["beats_controls"] is False):
        metrics = [r["metric"] for r in case.metrics if r["method"] == method and r["beats_controls"] is False]
        notable.append(Finding("warn", f"{method} does not beat the control maps on {listed(dict.fromkeys(metrics))}."))
    for result in case.explained:
        notable += [
            Finding("warn", f"{result.method} for {names[str(result.target)]}: {text}") for text in _cautions(result)
        ]
    shared: dict[tuple[str, str], list[str]] = {}
    coarse: list[str] = []
    for place, texts in (cautions or {}).items():
        result = case.explained[place]
        for text in texts:
            if text.startswith("coarse"):
                coarse.append(str(result.method))
            else:
                shared.setdefault((str(result.method), text), []).append(names[str(result.target)])
    for (method, text), who in shared.items():
        notable.append(Finding("warn", f"{method} for {listed(dict.fromkeys(who))}: {text}"))
    if coarse:
        notable.append(Finding("note", f"Coarse maps, interpolated from a layer: {listed(dict.fromkeys(coarse))}."))
    if not case.metrics and case.explained:
        notable.append(
            Finding(
                "note",
                "Not evaluated: no metric shows how far these maps can be trusted (run 'esegeta-monai evaluate').",
            )
        )
    notable += [Finding("note", text) for text in embedded_notes]
    there = sum(r.status == "ok" for r in case.explained)
    if case.explained and there == len(case.explained):
        notable.append(
            Finding("good", f"All {count(there, 'map')} were computed." if there > 1 else "The map was computed.")
        )
    order = ("bad", "warn", "note", "good")
    joined = [Finding(f.level, f.text.replace(" %", "\u00a0%")) for f in notable]
    return sorted(joined, key=lambda f: order.index(f.level))


def _cautions(result: Result) -> list[str]:
    record, texts = result.record, []
    if result.status == "zero":
        texts.append("the map is zero everywhere: the target does not depend on the scan, or nothing propagates to it.")
    gap, of_map = record.completeness_gap, record.completeness_gap_of_map
    if gap_is_high(result) and gap is not None:
        texts.append(f"completeness gap {100 * gap:.2g} %: the map's sum misses the change of the score by that much.")
    elif result.status == "incomplete" and of_map is not None:
        texts.append(f"incomplete: the score does not change, but the map sums to {100 * of_map:.2g} % of its total.")
    if record.float64_fallback is not None:
        texts.append(f"computed in float64: {record.float64_fallback}.")
    share = record.absorbed_share
    if share is not None and abs(share) > KEPT_BY_BIASES:
        texts.append(f"biases keep {100 * share:.2g} % of the score; the map shows the rest.")
    deviation = record.blend_deviation
    if deviation is not None and deviation > DEVIATION:
        texts.append(f"the blended windows deviate from the bundle's own prediction by {100 * deviation:.2g} %.")
    coverage = record.coverage
    if coverage is not None and coverage < 1:
        texts.append(f"the windows saw {100 * coverage:.3g} % of the scan.")
    padding, total = record.sum_in_padding, record.sum
    if padding and total and abs(padding) > PADDING * abs(total):
        texts.append(f"{100 * abs(padding / total):.2g} % of the sum fell on padding outside of the scan.")
    return texts


def gap_is_high(result: Result) -> bool:
    """Return True if a map is incomplete; maps of earlier versions have no such status."""
    gap, of_map = result.record.completeness_gap, result.record.completeness_gap_of_map
    return result.status == "incomplete" or (gap is not None and gap > GAP and of_map is None)


def references(case: CaseResults) -> list[str]:
    """List the papers of the methods, each once, and those of the software."""
    papers: list[str] = []
    for result in case.explained:
        text = result.record.reference or _registered(result)
        papers += [p.strip() for p in str(text).split(";") if p.strip()] if text else []
    return [*dict.fromkeys(papers), MONAI, OURS]


def _registered(result: Result) -> str:
    """Return the reference of a method without a sidecar, from its class."""
    try:
        with registered_names_only():
            return METHODS.get(str(result.record.method or str(result.method).split("-")[0])).reference
    except UsageError:
        return ""


def methods_text(case: CaseResults, info: dict[str, Any]) -> str:
    """Write a paragraph for a methods section; numbers in brackets refer to `references`."""
    if not case.explained:
        return ""
    papers = references(case)
    versions = info.get("versions") or first(case, lambda r: r.versions) or {}
    bundle, network = info.get("bundle") or first(case, lambda r: r.bundle), first(case, _network)
    named = []
    for method in case.methods:
        of_method = [r for r in case.explained if r.method == method]
        result = next((r for r in of_method if r.record.method), of_method[0])  # a failure has no record
        own = [p.strip() for p in str(result.record.reference or _registered(result)).split(";") if p.strip()]
        marks = ", ".join(str(papers.index(p) + 1) for p in own)
        parameters = parameters_text(result.record.parameters or {})
        named.append(f"{method}{f' [{marks}]' if marks else ''}{f' ({parameters})' if parameters else ''}")
    text = (
        f"Attribution maps were computed with esegeta_monai {versions.get('esegeta_monai', '')} [{len(papers)}] on "
        f"MONAI {versions.get('monai', '')} [{len(papers) - 1}] and PyTorch {versions.get('torch', '')} for "
        f"{f'the network {network}' if network else 'the network'}{f' of the bundle “{bundle}”' if bundle else ''}. "
        f"Explained {'was' if len(case.targets) == 1 else 'were'} {listed(case.targets)} by {listed(named)}. "
    )
    inferer = first(case, lambda r: r.inferer) or {}
    if inferer.get("roi_size"):
        size = "×".join(map(str, inferer["roi_size"])) if isinstance(inferer["roi_size"], list) else inferer["roi_size"]
        overlap = inferer.get("overlap")
        text += (
            f"The prediction was blended from windows of {size} voxels"
            f"{f' with overlap {overlap}' if overlap is not None else ''} ({inferer.get('mode', 'constant')} weights), "
            "and each map explains the blended whole-volume prediction. "
        )
    if any(r.record.additive for r in case.explained):
        text += (
            "Additive maps were brought to the scan's grid by the sum-conserving adjoint of the preprocessing, others "
            "by interpolation. "
        )
    names = list(dict.fromkeys(r["metric"] for r in case.metrics))
    if names:
        text += (
            f"Maps were evaluated by {listed(names)} together with control maps (random, 3D Sobel edges, constant). "
        )
    seed = first(case, lambda r: r.seed)
    return text + (f"Random numbers had the seed {seed}." if seed is not None else "")


def parameters_text(parameters: dict[str, Any]) -> str:
    """Write parameters other than None as ``name=value``; files are named without folders, which may name a patient.

    >>> parameters_text({"n_steps": 12, "baseline": {"name": "Zero"}, "layer": None})
    'n_steps=12, baseline=Zero()'
    >>> parameters_text({"feature_mask": "supervoxels(mask='/scans/Jane Doe/body.nii.gz')"})
    "feature_mask=supervoxels(mask='body.nii.gz')"
    """

    def formatted(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value.get('name', '')}({parameters_text({k: v for k, v in value.items() if k != 'name'})})"
        text = "×".join(map(str, value)) if isinstance(value, list) else str(value)
        return re.sub(r"""[^'"()\[\],=×]*[\\/](?=[^\\/'"()\[\],=×]+\.\w)""", "", text)

    return ", ".join(f"{name}={formatted(value)}" for name, value in parameters.items() if value is not None)
