"""Compare concept methods on the three networks with a known cause; writes benchmarks/results/concepts.md.

    python benchmarks/known_cause/concepts.py [--cases 16] [--donors 39] [--region-cases 3] [--networks lesion,shortcut]

Each method is compared with the effect of removing the object (CaCE) and with a control: the cause's mask at a random
place of the same body region.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from causes import CAUSES, ROOT, Cause, Example
from maps import TARGET
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.engine.feature_masks import foreground
from esegeta_monai.explain.concept_cases import CaseActivations, case_activations, random_masks
from esegeta_monai.explain.concept_discovery import CaseUnits, case_units, concept_effects, find_concepts
from esegeta_monai.explain.concepts import case_concepts, ranked_channels
from esegeta_monai.explain.tcav import examples_of_masks, tcav
from esegeta_monai.methods import ConceptRelevance, RegionTest

LAYERS = ["features.1", "features.3", "features.4"]
FOUND_AT = "features.3"
RANDOM, NEGATIVES, CONCEPTS, GRID = 199, 8, 8, 16
CONTROL = "random place"
TESTS = (("share", "mask"), ("mean", "mask"), ("share", "everywhere"), ("mean", "everywhere"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--donors", type=int, default=39, help="donors of the region test")
    parser.add_argument("--region-cases", type=int, default=3)
    parser.add_argument("--networks", default=",".join(c.name for c in CAUSES))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "known_cause")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "concepts.md")
    args = parser.parse_args()
    results = []
    for cause in CAUSES:
        if cause.name not in args.networks.split(","):
            continue
        cause.folder = args.work
        file = args.work / "concepts" / f"{cause.name}_{args.cases}_{args.donors}_{args.region_cases}.json"
        if not file.exists():
            figures = measure(cause, args.cases, args.donors, args.region_cases)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        results.append(json.loads(file.read_text(encoding="utf-8")))
    args.output.write_text(page(results, args), encoding="utf-8")
    print(f"written: {args.output}")


def measure(cause: Cause, n: int, donors: int, region_cases: int) -> dict[str, Any]:
    """Run everything on one network; return JSON-ready figures."""
    start = time.perf_counter()
    examples = list(cause.examples(n))
    explainer = Explainer(cause.network, checks=False)
    masks = [objects(cause, e) for e in examples]
    print(f"{cause.name}: {n} cases, {time.perf_counter() - start:.0f} s", flush=True)
    result: dict[str, Any] = {"network": cause.name, "objects": list(masks[0]), "cause": cause.truth}
    result["cace"] = removal(cause, examples)
    for name, function in (("tcav", given), ("found", discovered), ("channels", channels)):
        began = time.perf_counter()
        result[name] = function(explainer, examples, masks)
        result[f"{name} seconds"] = time.perf_counter() - began
        print(f"{cause.name}: {name}, {result[f'{name} seconds']:.0f} s", flush=True)
    began = time.perf_counter()
    result["regions"] = regions(explainer, cause, examples[:region_cases], masks, donors)
    result["regions seconds"] = time.perf_counter() - began
    print(f"{cause.name}: regions, {result['regions seconds']:.0f} s", flush=True)
    return result


def objects(cause: Cause, example: Example) -> dict[str, Tensor]:
    """Return the masks (*spatial) of the cause, of the other object, and of the control."""
    masks = {cause.truth: example.truth[0]} | ({cause.other: example.other[0]} if cause.other else {})
    rng = np.random.default_rng([example.seed, 1])
    (moved,) = random_masks(example.truth[0], foreground(example.image.as_subclass(Tensor)), 1, rng)
    masks[CONTROL] = torch.zeros_like(example.truth[0])
    masks[CONTROL][moved.box] = moved.mask
    return masks


def removal(cause: Cause, examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean change of the target when an object is left out of the scan (CaCE)."""
    changes: dict[str, list[float]] = {}
    for example in examples:
        cases = cause.cases(range(example.seed, example.seed + 1))
        for name in [cause.truth, *([cause.other] if cause.other else [])]:
            without = cases.with_planted(0, **{name: False})["image"].as_tensor()
            with torch.no_grad():
                logits = cause.network(torch.stack([example.image.as_subclass(Tensor), without]))[:, 1]
            changes.setdefault(name, []).append(float(logits[0] - logits[1]))
    return {name: float(np.mean(values)) for name, values in changes.items()}


def given(
    explainer: Explainer, examples: Sequence[Example], masks: Sequence[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """Return the rows of TCAV at all layers, for both statistics."""
    cases: list[CaseActivations] = []
    for number, (example, own) in enumerate(zip(examples, masks)):
        name, count = f"case{number}", RANDOM + NEGATIVES
        cases += case_activations(explainer, example.image[None], name, [TARGET], LAYERS, own, randoms=count)
    rows = []
    for statistic, where in TESTS:
        concepts = [
            examples_of_masks([c for c in cases if c.layer == layer], name, RANDOM)
            for layer in LAYERS
            for name in masks[0]
        ]
        rows += [t.row() for t in tcav(concepts, cases, statistic=statistic, where=where)]
    return rows


def discovered(
    explainer: Explainer, examples: Sequence[Example], masks: Sequence[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """Return the concepts of CRAFT and ACE: how often their strongest part meets an object, and what they do to F."""
    units: list[CaseUnits] = [
        case_units(explainer, e.image[None], f"case{i}", [TARGET], FOUND_AT, "supervoxels(n_segments=200)")
        for i, e in enumerate(examples)
    ]
    rows: list[dict[str, Any]] = []
    for finder in ("CRAFT", "ACE"):
        concepts = find_concepts(units, finder, CONCEPTS)
        effects = np.zeros((2, CONCEPTS))
        if finder == "CRAFT":
            several = [
                concept_effects(explainer, e.image[None], "", [TARGET], FOUND_AT, concepts, n_samples=8)[0]
                for e in examples[:4]
            ]
            effects = np.array([np.mean([s.removal for s in several], 0), np.mean([s.sobol for s in several], 0)])
        for c in concepts:
            hits = {name: [] for name in masks[0]}
            for unit, own in zip(units, masks):
                strongest = unit.labels == int(c.strength[unit.case].argmax())
                for name, mask in own.items():
                    hits[name].append(bool((strongest & (mask > 0)).any()))
            (mean,), (score,) = c.mean.values(), c.score.values()
            row = {"finder": finder, **c.row(), "score": score, "mean": mean}
            row |= {"removal": float(effects[0, c.number]), "sobol": float(effects[1, c.number])}
            rows.append(row | {"hits": {name: float(np.mean(h)) for name, h in hits.items()}})
    return rows


def channels(explainer: Explainer, examples: Sequence[Example], masks: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Return the share of the relevance through the strongest channel that is on each object, and of a constant map."""
    entries = [
        case_concepts(explainer, e.image[None], f"case{i}", [TARGET], "features.1.adn.A")[0]
        for i, e in enumerate(examples)
    ]
    ((channel, share),) = ranked_channels(entries, 1)
    mass: dict[str, list[float]] = {name: [] for name in masks[0]}
    for e, own in zip(examples, masks):
        (attribution,) = explainer(e.image[None], [ConceptRelevance("features.1.adn.A", channel)], [TARGET])
        positive = attribution.map.as_tensor()[0].clamp(min=0)
        for name, mask in own.items():
            mass[name].append(float(positive[mask > 0].sum() / positive.sum()))
    constant = float(np.mean([float((own[CONTROL] > 0).double().mean()) for own in masks]))
    return {"channel": channel, "share": share, "constant": constant, **{k: float(np.mean(v)) for k, v in mass.items()}}


def regions(
    explainer: Explainer, cause: Cause, examples: Sequence[Example], masks: Sequence[dict[str, Tensor]], donors: int
) -> dict[str, Any]:
    """Return in how many cases the region of the least p meets each object, and how many significant regions do."""
    others = [o.as_subclass(Tensor) for o in cause.others(0, donors)]
    method = RegionTest(others, f"grid(size={GRID})", q=0.2, seam_control=False)
    first: dict[str, list[float]] = {name: [] for name in masks[0]}
    significant: dict[str, int] = dict.fromkeys(masks[0], 0)
    total, least, statement = 0, [], ""
    for example, own in zip(examples, masks):
        (attribution,) = explainer(example.image[None], [method], [TARGET])
        if attribution.map is None:
            raise RuntimeError(attribution.record["reason"])
        table, statement = attribution.record["features"], attribution.record["statement"]
        best = max(table, key=lambda row: (-row["p"], row["value"]))
        least.append(best["p"])
        total += sum(row["significant"] == 1 for row in table)
        for name, mask in own.items():
            meets = {row["feature"]: bool((mask[box_of(row["feature"])] > 0).any()) for row in table}
            first[name].append(float(meets[best["feature"]]))
            significant[name] += sum(row["significant"] == 1 and meets[row["feature"]] for row in table)
    return {
        "cases": len(examples),
        "first": {name: float(np.mean(v)) for name, v in first.items()},
        "significant": significant,
        "total": total,
        "least": float(np.mean(least)),
        "statement": statement,
        "share": {n: float(np.mean([touched(m[n]) for m in masks[: len(examples)]])) for n in masks[0]},
    }


def box_of(name: str) -> tuple[slice, ...]:
    """Return the box of a region named "box 0 16 32"."""
    return tuple(slice(int(s), int(s) + GRID) for s in name.split()[1:])


def touched(mask: Tensor) -> float:
    """Return the share of the grid's boxes that a mask (*spatial) meets: the chance of one box."""
    counts = [-(-n // GRID) for n in mask.shape]
    met = {tuple(int(i) // GRID for i in v) for v in torch.nonzero(mask > 0)}
    return len(met) / int(np.prod(counts))


def page(results: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """Format the page."""
    command = f"python benchmarks/known_cause/concepts.py --cases {args.cases} --donors {args.donors}"
    lines = [
        "# Concepts on networks with a known cause",
        "",
        f"`{command} --region-cases {args.region_cases}`; networks and objects as in",
        "[known causes](../../docs/known_cause.md).",
        f"{args.cases} cases of each network, all objects present; the target is the logit of the class lesion.",
        f"*{CONTROL}*: the mask of the cause, moved in each case to a random place of the same body region.",
        "",
        "## What each method found",
        "",
        "| network | method | cause | other object | control |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        cause, other = r["objects"][0], r["objects"][1] if len(r["objects"]) > 2 else None
        columns = [cause, other, CONTROL]

        def row(method: str, texts: Sequence[str], r: dict[str, Any] = r) -> str:
            return f"| {r['network']} | {method} | {' | '.join(texts)} |"

        lines.append(row("removed (CaCE)", [f"{c}: {r['cace'][c]:+.2f}" if c in r["cace"] else "–" for c in columns]))
        for statistic, where in TESTS:
            for layer in LAYERS:
                texts = []
                for c in columns:
                    (t,) = [
                        t
                        for t in r["tcav"]
                        if (t["concept"], t["layer"], t["statistic"], t["where"]) == (c, layer, statistic, where)
                    ] or [None]
                    texts.append("–" if t is None else tested(t, statistic))
                lines.append(row(f"TCAV, {statistic}, {where}, `{layer}`", texts))
        for finder in ("CRAFT", "ACE"):
            texts = []
            for c in columns:
                texts.append("–" if c is None else best(r["found"], finder, c))
            lines.append(row(f"{finder}, `{FOUND_AT}`", texts))
        ch = r["channels"]
        texts = ["–" if c is None else f"{ch[c]:.3f} of the relevance" for c in columns]
        texts[2] += f" (constant map {ch['constant']:.4f})"
        lines.append(row(f"channel {ch['channel']} of `features.1` (share {ch['share']:.2f})", texts))
        reg = r["regions"]
        texts = [
            "–"
            if c is None
            else f"first in {reg['first'][c]:.2f} of {reg['cases']} (chance {reg['share'][c]:.2f}), "
            f"{reg['significant'][c]} of {reg['total']} significant"
            for c in columns
        ]
        lines.append(row(f"RegionTest, least p {reg['least']:.3f}", texts))
    lines += [
        "",
        "*TCAV*: score (or mean derivative), Holm-adjusted p over the 9 tests of a network and statistic",
        f"(6 of the lesion network), accuracy on held-out cases; {RANDOM} random concepts; bold: significant at 0.05.",
        f"*CRAFT, ACE*: of the {CONCEPTS} found concepts the one whose strongest part meets the object in most cases:",
        "how often, whether it reappears in both halves of the cases, and what it does to the target (CRAFT: its",
        "change without the concept, and the rank of this among the concepts; ACE: mean derivative). The maximum",
        "over concepts has a chance level of its own, that of the control. *Channel*: positive relevance through",
        "the most relevant channel. *RegionTest*: how often the region of the least p (ties: largest change) meets",
        "the object, and how often a random one does.",
        "",
        "## Seconds",
        "",
        "| network | TCAV | CRAFT and ACE | channels | RegionTest |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        seconds = [f"{r[f'{name} seconds']:.0f}" for name in ("tcav", "found", "channels", "regions")]
        lines.append(f"| {r['network']} | {' | '.join(seconds)} |")
    return "\n".join([*lines, "", "One thread of a busy machine.", ""])


def tested(t: dict[str, Any], statistic: str) -> str:
    value = f"{t['score']:.2f}" if statistic == "share" else f"{t['mean']:+.3g}"
    mark = "**" if t["verdict"] == "significant" else ""
    return f"{mark}{value}, p {t['p_holm']:.3f}{mark}, accuracy {t['accuracy']:.2f}"


def best(rows: Sequence[dict[str, Any]], finder: str, name: str) -> str:
    own = [row for row in rows if row["finder"] == finder]
    row = max(own, key=lambda row: row["hits"][name])
    again = f"{'reappears' if row['named'] else 'does not reappear'} ({row['reappears']:.2f})"
    text = f"concept {row['concept']}: {row['hits'][name]:.2f} of cases, {again}"
    if finder == "ACE":
        return f"{text}, derivative {row['mean']:+.3g}"
    rank = 1 + sum(abs(other["removal"]) > abs(row["removal"]) for other in own)
    return f"{text}, {row['removal']:+.2f}, rank {rank}"


if __name__ == "__main__":
    main()
