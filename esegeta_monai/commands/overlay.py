"""``esegeta-monai overlay``: the config file that adds explanation to any bundle, put beside the bundle's own."""

from __future__ import annotations

from argparse import Namespace
from importlib.resources import files
from pathlib import Path

from esegeta_monai.errors import UsageError
from esegeta_monai.storage.files import atomic

__all__ = ["run", "shipped_overlay"]


def shipped_overlay() -> Path:
    """The ``explain.json`` that the package carries."""
    return Path(str(files("esegeta_monai.bundle") / "explain.json"))


def run(args: Namespace, *_: object) -> int:
    """Copies the overlay, never over another file, and says how it is used; or prints where it lies."""
    shipped = shipped_overlay()
    if args.path:
        print(shipped)
        return 0
    if not args.bundle and not args.output:
        raise UsageError("overlay needs --bundle DIR (or --output FILE, or --path to print where the shipped one lies)")
    if args.bundle and not (Path(args.bundle) / "configs").is_dir():
        raise UsageError(f"no bundle at {args.bundle}: it has no folder configs")
    target = Path(args.output) if args.output else Path(args.bundle) / "configs" / "explain.json"
    if target.is_dir():
        target = target / "explain.json"
    if target.exists():
        raise UsageError(f"{target} exists and stays as it is: move it away, or write elsewhere with --output FILE")
    with atomic(target) as temporary:
        temporary.write_bytes(shipped.read_bytes())
    place = target
    if args.bundle and target.resolve().is_relative_to(Path(args.bundle).resolve()):
        place = target.resolve().relative_to(Path(args.bundle).resolve())
    print(f"{target} is written. In the bundle's folder:")
    print(f"  python -m monai.bundle run --config_file \"['configs/inference.json', '{place.as_posix()}']\"")
    print("Settings follow as options: --explain_methods \"['Saliency']\" --explain_output_dir explained")
    return 0
