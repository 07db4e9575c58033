"""``esegeta-monai influence``: the training cases that raised or lowered a prediction."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.weights import WeightSource, fit_names, read_state
from esegeta_monai.cli.cases import Preprocessor, ScanCase, file_of_case, find_cases
from esegeta_monai.cli.concept_tests import batch_of, failures
from esegeta_monai.cli.explain import bundle_targets, each_case, explainer_for, open_log
from esegeta_monai.cli.log import RunLog, reason
from esegeta_monai.cli.reading import open_reader, register_trusted, targets_of
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.cli.values import overrides
from esegeta_monai.engine.labels import label_on_grid
from esegeta_monai.engine.score import Case
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.influence import Checkpoint, ExplainedCase, Influence, InfluenceRun, TracIn, Trak
from esegeta_monai.explain.training_loss import TrainingCase, TrainingLoss
from esegeta_monai.output.report.influence import ShownCase, ShownTarget, shown_cases, write_influence
from esegeta_monai.output.report.thumbnails import label_thumbnail
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.csv_text import plain_rows

__all__ = ["run"]

LOSS_IDS = ("loss", "loss_function", "train::trainer::loss_function", "train::loss", "train::loss_function")


def run(args: Namespace, log: RunLog) -> int:
    """Run the command.

    Returns:
        0: all scans were used, or had an empty target; 1: a scan failed.

    Raises:
        EsegetaError: an option, the bundle, a checkpoint or the output folder is wrong.
    """
    if args.bundle is None:
        raise UsageError("influence needs a bundle (--bundle DIR), whose training loss and checkpoints are known")
    register_trusted(args)
    reader, output = open_reader(args), Path(args.output)
    names = [name for _, name in sorted(reader.channel_names.items())]
    cases = find_cases(args.input, names, leave_out=output)
    training = find_cases(args.training, names, leave_out=output)
    targets = TARGETS.create_all(",".join(targets_of(args))) if args.target else bundle_targets(reader)
    storage.writable_folder(output)
    roi = args.patch_size if args.patch_size is not None else reader.roi
    loss = TrainingLoss(_loss(args, reader), _sizes(roi, training, reader), args.patches, args.seed)
    method = TracIn(args.form) if args.method == "TracIn" else Trak(args.projection, args.ridge, seed=args.seed)
    influence_run = InfluenceRun(explainer_for(reader, args), loss, _checkpoints(args, reader), method, args.layer)
    table = _classes(Path(args.labels)) if Path(args.labels).suffix.lower() == ".csv" else None
    open_log(log, reader, [*cases, *training], output)
    preprocess = Preprocessor(reader)
    problems: list[str] = []

    def explain(case: ScanCase) -> None:
        image, inputs = batch_of(case, preprocess, reader)
        influence_run.explain(ExplainedCase(case.name, image, targets, inputs))

    def add(case: ScanCase) -> None:
        influence_run.add(_training_case(case, preprocess, args.labels, table))

    each_case(cases, explain, failures(problems), log)
    if not influence_run.explained:
        raise UsageError("no scan has a voxel of the target, so nothing is explained: give other scans or --target")
    each_case(training, add, failures(problems), log)
    result = influence_run.result()

    def picture(case: ScanCase, labelled: bool) -> str:
        if labelled:
            shown = _training_case(case, preprocess, args.labels, table)
            return label_thumbnail(shown.image.numpy(), shown.label[0].numpy() if shown.is_map else None)
        return label_thumbnail(torch.as_tensor(preprocess(case)[1]).numpy(), None)

    page = _page(output, result, {c.name: c for c in cases}, {c.name: c for c in training}, args.cases, picture)
    if not args.quiet:
        print(
            f"{len(result.training)} training scan(s) for {len(result.explained)} target(s), {len(problems)} "
            f"problem(s). The page is {page}."
        )
    return int(bool(problems))


def _loss(args: Namespace, reader: BundleReader) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of ``--loss``, or of the training config, which must be trusted like any other."""
    if args.loss is not None:
        try:
            content = json.loads(args.loss)
            parser = ConfigParser({"loss": content})
            loss = parser.get_parsed_content("loss")
        except Exception as error:  # a loss may raise anything
            raise UsageError(f"--loss: it cannot be built: {reason(error)}; give a component as JSON") from error
        if not callable(loss):
            raise UsageError('--loss: give a component as JSON, such as \'{"_target_": "DiceCELoss"}\'')
        return _called(loss)
    given = args.train_config
    if given is None:
        folder = reader.bundle_dir / "configs"
        given = next((f for s in ConfigParser.suffixes if (f := folder / f"train.{s}").is_file()), None)
        if given is None:
            raise UsageError("the bundle has no configs/train.json: give --train-config FILE, or --loss JSON")
    require_trust(Namespace(**{**vars(args), "config": [str(given)], "allowed": False}))
    training = BundleReader(args.bundle, [str(given)], overrides(args.override), reader.device, "optional")
    key = next((key for key in LOSS_IDS if key in training.parser), None)
    if key is None:
        raise UsageError(f"{Path(given).name} has none of the ids {', '.join(LOSS_IDS)}: give --loss JSON")
    return _called(training.resolve(key))


def _called(loss: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if not callable(loss):
        raise UsageError(f"the loss of the training config is a {type(loss).__name__}, no function: give --loss JSON")
    if isinstance(loss, torch.nn.Module):
        loss.eval()
    return loss


def _sizes(roi: Any, training: Sequence[ScanCase], reader: BundleReader) -> list[int] | None:
    """Return the patch, one size per axis; None: whole images."""
    if roi is None:
        return None
    dims = Preprocessor(reader).spatial_dims or 3
    sizes = [int(roi)] * dims if np.ndim(roi) == 0 else [int(n) for n in roi]
    return sizes * dims if len(sizes) == 1 else sizes


def _checkpoints(args: Namespace, reader: BundleReader) -> list[Checkpoint]:
    rates = args.learning_rates or [1.0] * len(args.checkpoints)
    if len(rates) != len(args.checkpoints):
        raise UsageError(f"--learning-rates has {len(rates)} values for {len(args.checkpoints)} checkpoints")
    key = reader.weight_source.key
    checkpoints = []
    for text, rate in zip(args.checkpoints, rates):
        state = read_state(WeightSource(Path(text), "--checkpoints", key), torch.device("cpu"))
        fit_names(state, reader.network)
        checkpoints.append(Checkpoint(state, rate, Path(text).name))
    return checkpoints


def _classes(path: Path) -> dict[str, int]:
    """Read the table of classes: columns case and label."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            _, rows = plain_rows(file)
        labels = {str(row["case"]).strip(): int(str(row["label"])) for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError) as error:
        raise UsageError(
            f"--labels {path.name}: give a CSV file with the columns case and label, a whole number ({reason(error)})"
        ) from error
    if not labels or len(labels) < len(rows):
        raise UsageError(f"--labels {path.name}: it has no row, or a case twice")
    return labels


def _training_case(
    case: ScanCase, preprocess: Preprocessor, labels: str, table: Mapping[str, int] | None
) -> TrainingCase:
    image, data = preprocess(case)[1:]
    plain = image.as_tensor().cpu()
    if table is not None:
        if case.name not in table:
            raise UsageError(f"--labels {Path(labels).name}: it has no row for {case.name}")
        return TrainingCase(case.name, plain, torch.tensor(table[case.name]))
    where = Case(torch.as_tensor(image.affine).double().cpu(), data, {})
    label = label_on_grid(file_of_case("labels", labels, case, data), plain, where)
    return TrainingCase(case.name, plain, label[None].float())


def _page(
    output: Path,
    result: Influence,
    explained: Mapping[str, ScanCase],
    training: Mapping[str, ScanCase],
    count: int,
    picture: Callable[[ScanCase, bool], str],
) -> Path:
    lists, own = shown_cases(result, count)

    def shown(n: int, score: float) -> ShownCase:
        name = result.training[n]
        numbers = float(score), float(result.self_influence[n]), float(result.losses[n])
        return ShownCase(name, *numbers, picture(training[name], True))

    targets = [
        ShownTarget(case, target, picture(explained[case], False),
                    *([shown(n, result.scores[t, n]) for n in chosen] for chosen in lists[t]))
        for t, (case, target) in enumerate(result.explained)
    ]  # fmt: skip
    return write_influence(output, result, targets, [shown(n, result.self_influence[n]) for n in own])
