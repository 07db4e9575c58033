"""Explain an nnU-Net folder, or a task of TotalSegmentator, from a config of ``python -m monai.bundle run``."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esegeta_monai.errors import UsageError

__all__ = ["FolderRun", "folder_config", "model_options"]


def model_options(args: Namespace) -> list[str]:
    """Return the options of `esegeta_monai.cli.arguments.add_model` for a model that is no bundle."""
    if args.totalsegmentator is not None:
        return ["--totalsegmentator", args.totalsegmentator, *(["--fast"] if args.fast else [])]
    options = ["--nnunet", str(Path(args.nnunet).resolve())]
    options += [] if args.folds is None else ["--folds", args.folds]
    options += [] if args.step_size is None else ["--step-size", str(args.step_size)]
    options += [] if args.previous_stage is None else ["--previous-stage", str(Path(args.previous_stage).resolve())]
    return options + ([] if args.mirroring else ["--no-mirroring"])


def folder_config(args: Namespace) -> dict[str, Any]:
    """Return a config that explains the model of the arguments on the scans that it names under ``scans``.

    It has the settings of ``explain.json`` under the same ids.
    """
    settings: dict[str, Any] = {
        "methods": ["Saliency", "GradCam"],
        "targets": None,
        "output": None,
        "output_dir": "explained",
        "overwrite": False,
        "head": None,
        "seed": 0,
        "report": False,
        "checks": True,
        "agreement": False,
        "dry_run": False,
    }
    run: dict[str, Any] = {"_target_": "esegeta_monai.cli.folder_run.FolderRun", "model": "@model", "scans": "@scans"}
    return {
        "model": model_options(args),
        "scans": ["scans"],
        **{f"explain_{name}": value for name, value in settings.items()},
        "explain_more": [],
        "explain_run": run | {name: f"@explain_{name}" for name in settings} | {"more": "@explain_more"},
        "run": ["$@explain_run()"],
    }


class FolderRun:
    """The command ``explain`` as a part of a config; it computes and writes what the command does.

    Args:
        model: options that name the model, such as ``["--nnunet", DIR, "--folds", "0,1"]``.
        scans: values of ``--input``; a text is one of them.
        methods, targets: one text, or a list of texts.
        output_dir: output folder.
        output, overwrite, head, seed, report, checks, agreement, dry_run: see
            `esegeta_monai.handlers.ExplanationHandler`.
        more: further options of the command, such as ``["--window-batch", "2"]``.

    Raises:
        UsageError: a method or target is not given as text.
    """

    def __init__(
        self,
        model: Sequence[str],
        scans: str | Sequence[str],
        methods: str | Sequence[str] = ("Saliency", "GradCam"),
        targets: str | Sequence[str] | None = None,
        output_dir: str | Path = "explained",
        *,
        output: int | str | None = None,
        overwrite: bool = False,
        head: str | None = None,
        seed: int = 0,
        report: bool = False,
        checks: bool | str = True,
        agreement: bool = False,
        dry_run: bool = False,
        more: Sequence[str] = (),
    ) -> None:
        self.arguments = ["explain", *map(str, model), "--input", *_texts("scans", scans)]
        self.arguments += ["--output", str(output_dir), "--seed", str(seed)]
        for option, values in (("--methods", methods), ("--target", targets)):
            for text in _texts(option, values):
                self.arguments += [option, text]
        for option, value in (("--network-output", output), ("--head", head)):
            self.arguments += [] if value is None else [option, str(value)]
        switches = {
            "--overwrite": overwrite,
            "--report": report,
            "--no-checks": not checks,
            "--check-maps": checks == "maps",
            "--agreement": agreement,
            "--dry-run": dry_run,
        }
        self.arguments += [option for option, on in switches.items() if on]
        self.arguments += map(str, more)

    def __call__(self) -> None:
        """Run the command.

        Raises:
            SystemExit: with the exit code of the command, unless all is done.
        """
        from esegeta_monai.cli.main import main

        code = main(self.arguments)
        if code:
            raise SystemExit(code)


def _texts(name: str, values: str | Sequence[str] | None) -> list[str]:
    listed = [] if values is None else [values] if isinstance(values, str) else list(values)
    wrong = next((value for value in listed if not isinstance(value, str)), None)
    if wrong is not None:
        raise UsageError(f"{name}: {json.dumps(wrong, default=str)} is no text: write it as on the command line")
    return listed
