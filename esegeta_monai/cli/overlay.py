"""``esegeta-monai overlay`` and ``merge``: write the config file that adds explanations to a bundle."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from esegeta_monai.bundle.configs import merged_config, parse_config
from esegeta_monai.bundle.contents import BundleContents
from esegeta_monai.bundle.nnunet.files import check_single
from esegeta_monai.bundle.overlay import (
    METRICS_OVERLAY,
    MULTI_GPU_OVERLAY,
    OVERLAY,
    evaluator_of,
    fitted_overlay,
    multi_gpu_overlay,
    shipped_overlay,
)
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.static import StaticBundle
from esegeta_monai.cli.folder_run import folder_config
from esegeta_monai.cli.reading import check_options
from esegeta_monai.cli.trust import listing
from esegeta_monai.cli.values import overrides
from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.utils.files import atomic
from esegeta_monai.utils.leftovers import remove_leftovers

__all__ = ["free_file", "read_bundle", "run", "run_merge", "unevaluated_config", "write_text"]


def run(args: Namespace, *_: object) -> int:
    """Write the overlay for a bundle, without replacing other files, and print a summary of the bundle.

    With ``--path``, only print the path of the overlay in the package.
    """
    check_options(args)
    if args.nnunet is not None or args.totalsegmentator is not None:
        return _write_folder_config(args)
    name = METRICS_OVERLAY if args.metrics else OVERLAY
    if args.path:
        print(shipped_overlay(name))
        return 0
    if not args.bundle and not args.output:
        raise UsageError(
            "overlay needs --bundle DIR (or --output FILE, or --path to print the path of the packaged overlay)"
        )
    if args.multi_gpu and not args.bundle:
        raise UsageError(
            "overlay --multi-gpu needs --bundle DIR: the overlay adds a sampler to the bundle's data loader"
        )
    if not args.bundle:
        text = shipped_overlay(name).read_text(encoding="utf-8")
        target = free_file(Path(args.output), name, text)
        write_text(target, text)
        print(f"Wrote {target} for bundles with a list named handlers. --bundle DIR adapts the overlay to any bundle.")
        return 0
    reader, config = read_bundle(args), unevaluated_config(args)
    overlay = fitted_overlay(config, reader.metadata, name)
    text = json.dumps(overlay, indent=4, ensure_ascii=False) + "\n"
    target = free_file(Path(args.output) if args.output else reader.bundle_dir / "configs" / name, name, text)
    second, more_text = None, ""
    if args.multi_gpu:
        more_text = json.dumps(multi_gpu_overlay(config), indent=4) + "\n"
        second = free_file(target.with_name(MULTI_GPU_OVERLAY), name, more_text)
    write_text(target, text)
    if second is not None:
        write_text(second, more_text)
    print("\n".join(f"  {title:<9} {text}" for title, text in description(reader, config, overlay).items()))
    print("\n".join(listing(BundleContents(args.bundle, args.config))))
    written = [_shown(file, reader) for file in (target, second) if file is not None]
    files = [*[f.relative_to(reader.bundle_dir).as_posix() for f in reader.config_files], *written]
    run_id = "" if reader.run_id in (None, "run") else f" {reader.run_id}"
    root = "" if config.get("bundle_root", ".") in (".", "./") else " --bundle_root ."
    launch = "torchrun --nproc_per_node NUMBER_OF_GPUS" if args.multi_gpu else "python"
    print(f"Wrote {' and '.join(str(f) for f in (target, second) if f)}. Run in the bundle's folder:")
    print(f'  {launch} -m monai.bundle run{run_id}{root} --config_file "{files}"')
    more = " --explain_metrics \"['Deletion']\"" if args.metrics else ""
    print(f"Append settings as options: --explain_methods \"['Saliency']\"{more} --explain_output_dir explained")
    return 0


def _write_folder_config(args: Namespace) -> int:
    """Write the config that explains an nnU-Net folder or a task of TotalSegmentator."""
    if args.metrics or args.multi_gpu or args.path:
        raise UsageError("--metrics, --multi-gpu and --path belong to bundles; evaluate a folder by 'evaluate'")
    if args.nnunet is not None:
        check_single(Path(args.nnunet))
    elif args.output is None:
        raise UsageError("overlay --totalsegmentator needs --output FILE")
    text = json.dumps(folder_config(args), indent=4, ensure_ascii=False) + "\n"
    target = free_file(Path(args.output or args.nnunet), OVERLAY, text)
    write_text(target, text)
    print(f"Wrote {target}. Run:")
    print(f"  python -m monai.bundle run --config_file {target} --scans \"['scan.nii.gz']\"")
    print("Append settings as options: --explain_methods \"['Saliency']\" --explain_output_dir explained")
    return 0


def run_merge(args: Namespace, *_: object) -> int:
    """Write one config file: the bundle's own files, followed by the overlay or the files of ``--add``."""
    reader, merged = read_bundle(args), unevaluated_config(args)
    added = [parse_config(_existing(reader, file)) for file in args.add or ()]
    for content in added or [fitted_overlay(merged, reader.metadata)]:
        for key, value in content.items():
            merge_kv(merged, key, value)
    target = free_file(Path(args.output))
    write_text(target, json.dumps(merged.config, indent=4, ensure_ascii=False) + "\n")
    print(f"Wrote {target}: {', '.join(f.name for f in reader.config_files)} and the explanation in one config.")
    return 0


def description(reader: BundleReader, config: ConfigParser, overlay: dict[str, Any]) -> dict[str, str]:
    """Describe a bundle by title, from the text of its configs; the text of a part that is missing is its error."""
    bundle = StaticBundle(reader)
    classes = ", ".join(f"{i} {name}" for i, name in sorted(reader.class_names.items())[:12])
    more = len(reader.class_names) - 12
    handlers = next(key for key in overlay if key.startswith("+") or "#val_handlers" in key)
    return {
        "bundle": " ".join(filter(None, (reader.name, reader.version))),
        "network": _tried(lambda: bundle.component("network")),
        "weights": _tried(bundle.weights),
        "inferer": _tried(lambda: _inferer(bundle)),
        "channels": ", ".join(name for _, name in sorted(reader.channel_names.items())) or "not named",
        "classes": (classes + (f", and {more} more" if more > 0 else "")) or "not named in metadata.json",
        "output": overlay.get("explain_output") or "the only one",
        "targets": _targets(reader, overlay),
        "layers": "GradCam chooses one; 'esegeta-monai layers --bundle DIR' lists all",
        "handlers": f"{handlers.lstrip('+')} of {evaluator_of(config)}, run by {reader.run_id or 'no id'}",
    }


def _targets(reader: BundleReader, overlay: dict[str, Any]) -> str:
    if overlay.get("explain_targets"):
        return f"{overlay['explain_targets'][0]} (the output is a regression)"
    names = [name for i, name in sorted(reader.class_names.items()) if i != reader.background]
    example = f"; a single one: --explain_targets \"MultiClassMask('{names[0]}')\"" if names else ""
    return f"every predicted class except background{example}"


def _inferer(bundle: StaticBundle) -> str:
    options = bundle.options("inferer")
    windows = "" if "roi_size" not in options else f", windows {options['roi_size']}, overlap {options.get('overlap')}"
    return f"{bundle.component('inferer')}{windows}"


def _tried(what: Callable[[], str]) -> str:
    try:
        return what()
    except EsegetaError as error:
        return f"not known from the config: {error}"


def read_bundle(args: Namespace) -> BundleReader:
    return BundleReader(args.bundle, args.config, overrides(args.override), weights="optional")


def unevaluated_config(args: Namespace) -> ConfigParser:
    """Return the unevaluated config of the bundle's files, with the overrides only."""
    parser = ConfigParser()
    parser.read_config(merged_config(read_bundle(args).config_files))
    content: Any = parser.config
    content.pop(ConfigParser.meta_key, None)
    parser.update(overrides(args.override))
    return parser


def _existing(reader: BundleReader, file: str) -> Path:
    chosen = next((p for p in (reader.bundle_dir / file, Path(file)) if p.is_file()), None)
    if chosen is None:
        raise UsageError(f"no file {file}, neither in {reader.bundle_dir} nor in the working directory")
    return chosen


def _shown(file: Path, reader: BundleReader) -> str:
    """Return the path of a file relative to the bundle if it is inside, else its absolute path."""
    place = file.resolve()
    inside = place.is_relative_to(reader.bundle_dir)
    return place.relative_to(reader.bundle_dir).as_posix() if inside else str(place)


def free_file(target: Path, name: str = OVERLAY, text: str | None = None) -> Path:
    """Return the path to write to; raise an error if it exists with other content than ``text``."""
    target = target / name if target.is_dir() else target
    if target.exists() and not (text is not None and target.is_file() and target.read_bytes() == text.encode()):
        raise UsageError(f"{target} already exists: move it, or choose another file by --output FILE")
    return target


def write_text(target: Path, text: str) -> None:
    remove_leftovers(target.parent)
    with atomic(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
