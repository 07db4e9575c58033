"""Bundles that run code in every known way, to count how often a command lets them.

``python -m tests.cli.hostile`` prints the table: executions by bundle and command, without and with trust.
"""

from __future__ import annotations

import contextlib
import io
import json
import marshal
import os
import pickle
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esegeta_monai.cli.main import main
from tests.support.cli import NETWORK, config, make_bundle, make_scan

TRUST = "ESEGETA_TRUST"
SIMPLE = """
from monai.networks.nets import UNet

def make():
    return UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=[4, 8], strides=[2], norm="batch")
"""
EXTENSION = '''
import os
from esegeta_monai.methods import Method
os.system("touch {marker}")

class Sneaky(Method):
    """Runs when its file is imported."""

    factor: float = os.system("touch {marker}")
'''


RUN = {"evaluator": {"_target_": "SupervisedEvaluator", "network": "@network"}, "run": ["$@evaluator.run()"]}


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@dataclass(frozen=True)
class Place:
    """A bundle that is being made hostile."""

    root: Path
    marker: Path

    @property
    def command(self) -> str:
        return f"touch {self.marker}"

    @property
    def expression(self) -> str:
        return f"$__import__('os').system('{self.command}')"

    def write(self, **changes: Any) -> None:
        """Write the config with changed ids, and with an evaluator, without which there is no overlay."""
        (self.root / "configs" / "inference.json").write_text(
            json.dumps(config(**{**RUN, **changes})), encoding="utf-8"
        )

    def file(self, name: str, text: str = "") -> Path:
        """Write a file; the default touches the marker when it is imported."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or f"import os\nos.system('{self.command}')\n", encoding="utf-8")
        return path


Make = Callable[[Place], None]


def used(expression: str) -> dict[str, Any]:
    """Ids by which building the network evaluates an expression."""
    return {"extra": expression, "network": "$(@extra, @network_def.to('cpu'))[1]"}


def target(place: Place) -> None:
    place.write(network_def={"_target_": "os.system", "command": place.command})


def target_in_transforms(place: Place) -> None:
    transforms = [*config()["preprocessing"]["transforms"], {"_target_": "os.system", "command": place.command}]
    place.write(preprocessing={"_target_": "Compose", "transforms": transforms})


def target_in_inferer(place: Place) -> None:
    place.write(inferer={"_target_": "subprocess.check_output", "args": ["touch", str(place.marker)]})


def expression(place: Place) -> None:
    place.write(**used(place.expression))


def target_is_expression(place: Place) -> None:
    place.write(network_def={"_target_": "$__import__('os').system", "command": place.command})


def import_in_list(place: Place) -> None:
    place.file("evil_module.py")
    place.write(imports=["$import glob", "$import evil_module"])


def import_in_metadata(place: Place) -> None:
    place.file("evil_module.py")
    file = place.root / "configs" / "metadata.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "changelog": {"0.1": "$import evil_module"}}),
        encoding="utf-8",
    )


def in_macro(place: Place) -> None:
    other = place.file("configs/net.json", json.dumps({"net": {"_target_": "os.system", "command": place.command}}))
    place.write(network_def=f"%{other}::net")


def in_second_config(place: Place) -> None:
    place.file("configs/extra.yaml", f'extra: "{place.expression}"\nnetwork: "{used("")["network"]}"\n')
    place.write(extra=f"%{place.root}/configs/extra.yaml::extra", network=used("")["network"])


def yaml_tag(place: Place) -> None:
    (place.root / "configs" / "inference.json").unlink()
    place.file("configs/inference.yaml", f"network_def: !!python/object/apply:os.system ['{place.command}']\n")


def yaml_alias(place: Place) -> None:
    (place.root / "configs" / "inference.json").unlink()
    text = f"base: &base {{_target_: os.system, command: '{place.command}'}}\nnetwork_def: *base\n"
    rest = {k: v for k, v in config(**RUN).items() if k != "network_def"}
    place.file("configs/inference.yaml", text + "".join(f"{k}: {json.dumps(v)}\n" for k, v in rest.items()))


def scripts_package(place: Place) -> None:
    place.file("scripts/__init__.py")
    place.file("scripts/net.py", SIMPLE)
    place.write(network_def={"_target_": "scripts.net.make"})


def scripts_extension(place: Place) -> None:
    place.file("scripts/mine.py", EXTENSION.format(marker=place.marker))


def scripts_linked(place: Place) -> None:
    other = place.root.parent / "elsewhere"
    other.mkdir()
    (other / "net.py").write_text(f"import os\nos.system('{place.command}')\n{SIMPLE}", encoding="utf-8")
    (place.root / "scripts").symlink_to(other)
    place.write(network_def={"_target_": "scripts.net.make"})


def compiled(place: Place) -> None:
    """A compiled file whose source is harmless."""
    source = place.file("scripts/net.py", SIMPLE)
    state = source.stat()
    code = compile(f"import os\nos.system('{place.command}')\n{SIMPLE}", str(source), "exec")
    file = Path(cache_from_source(str(source)))
    file.parent.mkdir()
    head = MAGIC_NUMBER + struct.pack("<III", 0, int(state.st_mtime), state.st_size)
    file.write_bytes(head + marshal.dumps(code))
    place.write(network_def={"_target_": "scripts.net.make"})


def hides_dependency(place: Place) -> None:
    place.file("nilearn.py")
    place.file("scipy.py")
    place.write(imports=["$import nilearn"])


def hides_library(place: Place) -> None:
    place.file("json.py")
    place.file("antigravity.py")
    place.write(imports=["$import antigravity"])


def hides_by_folder(place: Place) -> None:
    place.file("numpy/linalg.py")
    place.file("numpy/__init__.py")


def at_start(place: Place) -> None:
    place.file("sitecustomize.py")
    place.file("usercustomize.py")


def path_file(place: Place) -> None:
    place.file("evil.pth", f"import os; os.system('{place.command}')\n")


def pickled_weights(place: Place) -> None:
    with open(place.root / "models" / "model.pt", "wb") as file:
        pickle.dump(Payload(place.marker), file)


def pickle_in_expression(place: Place) -> None:
    torch.save(Payload(place.marker), place.root / "models" / "extra.pth")
    place.write(**used(f"$torch.load('{place.root}/models/extra.pth', weights_only=False)"))


def pickle_called_torchscript(place: Place) -> None:
    torch.save({"a": Payload(place.marker)}, place.root / "models" / "model.ts")
    place.write(network_def={"_target_": "torch.load", "f": f"{place.root}/models/model.ts", "weights_only": False})


def object_array(place: Place) -> None:
    np.save(place.root / "models" / "means.npy", np.array([Payload(place.marker)], object), allow_pickle=True)
    place.write(**used(f"$np.load('{place.root}/models/means.npy', allow_pickle=True)"))


def requires(place: Place) -> None:
    place.write(network_def={**NETWORK, "_requires_": [place.expression]})


def disabled(place: Place) -> None:
    place.write(network_def={**NETWORK, "_disabled_": place.expression.replace("$", "$1 == ")})


def mode_callable(place: Place) -> None:
    call = {"_target_": "os.system", "_mode_": "callable", "command": place.command}
    place.write(call=call, network="$(@call(), @network_def.to('cpu'))[1]")


def mode_debug(place: Place) -> None:
    place.write(network_def={"_target_": "os.system", "_mode_": "debug", "command": place.command})


def image_key(place: Place) -> None:
    place.write(image_key=f"$('image', __import__('os').system('{place.command}'))[0]")


def amp(place: Place) -> None:
    place.write(amp=f"$__import__('os').system('{place.command}') == 1")


def weights_path(place: Place) -> None:
    path = f"(torch.os.system('{place.command}'), @bundle_root + '/models/model.pt')[1]"
    place.write(load=f"$@network_def.load_state_dict(torch.load({path}))")


def bundle_root(place: Place) -> None:
    load = "$@network_def.load_state_dict(torch.load(@ckpt))"
    place.write(ckpt=f"{place.expression.replace('$', '$str(')})", load=load)


def initialize(place: Place) -> None:
    place.write(initialize=[place.expression], run=["$@evaluator.run()"], finalize=[place.expression])


def evaluator(place: Place) -> None:
    handlers = [{"_target_": "os.system", "command": place.command}]
    trainer = {"_target_": "SupervisedEvaluator", "network": "@network", "val_handlers": handlers}
    place.write(evaluator=trainer, handlers=handlers, run=["$@evaluator.run()"])


def tracking(place: Place) -> None:
    hooks = {"handlers_id": {"trainer": {"id": "train", "handlers": [{"_target_": "os.system"}]}}}
    place.write(tracking={**hooks, "configs": {"save_execute_config": place.expression}})


def logging_config(place: Place) -> None:
    text = "[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=\n[logger_root]\nhandlers=h\n[handler_h]\n"
    place.file(
        "configs/logging.conf", f"{text}class=StreamHandler\nargs=(__import__('os').system('{place.command}'),)\n"
    )


def entry_points(place: Place) -> None:
    place.file("evil_module.py")
    place.file("evil-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    text = "".join(f"[esegeta_monai.{k}]\nsneaky = evil_module:Sneaky\n" for k in ("methods", "targets", "metrics"))
    place.file("evil-1.0.dist-info/entry_points.txt", text)


def linked_config(place: Place) -> None:
    other = place.root.parent / "elsewhere.json"
    other.write_text(
        json.dumps(config(**RUN, network_def={"_target_": "os.system", "command": place.command})), encoding="utf-8"
    )
    file = place.root / "configs" / "inference.json"
    file.unlink()
    file.symlink_to(other)


def hidden_text(place: Place) -> None:
    """Control characters that would erase the line from a terminal."""
    place.write(**used(f"$(torch.os.system('{place.command}'), '\x1b[2K\x1b[1A \u202e')[0]"))


def yaml_bomb(place: Place) -> None:
    (place.root / "configs" / "inference.json").unlink()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    place.file("configs/inference.yaml", "\n".join(lines))


def yaml_loop(place: Place) -> None:
    (place.root / "configs" / "inference.json").unlink()
    place.file("configs/inference.yaml", "a: &a [*a, *a]\n")


def deep_json(place: Place) -> None:
    (place.root / "configs" / "inference.json").write_text(
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", encoding="utf-8"
    )


def deep_metadata(place: Place) -> None:
    (place.root / "configs" / "metadata.json").write_text('{"a": ' * 50_000 + "1" + "}" * 50_000, encoding="utf-8")


def macro_bomb(place: Place) -> None:
    place.write(**{f"m{i}": [f"%m{i + 1}"] * 10 for i in range(30)}, m30=1)


def macro_loop(place: Place) -> None:
    place.write(a={"b": "%a"})


def huge_config(place: Place) -> None:
    with open(place.root / "configs" / "inference.json", "wb") as file:
        file.truncate(1 << 40)


def device_config(place: Place) -> None:
    file = place.root / "configs" / "metadata.json"
    file.unlink()
    os.mkfifo(file)
    place.write(network_def=f"%{place.root}/configs/metadata.json::net")


def expressions_in_circle(place: Place) -> None:
    place.write(a="$torch.load(@b)", b="$torch.load(@a)", load="$@network_def.load_state_dict(torch.load(@a))")


def link_to_root(place: Place) -> None:
    (place.root / "docs").mkdir()
    (place.root / "docs" / "again").symlink_to(place.root)
    place.write(**used(place.expression))


# By name: what makes the bundle, and whether its code runs once the bundle is trusted.
HOSTILE: dict[str, tuple[Make, bool]] = {
    "_target_ os.system": (target, True),
    "_target_ in transforms": (target_in_transforms, True),
    "_target_ in inferer": (target_in_inferer, True),
    "_target_ is an expression": (target_is_expression, True),
    "$__import__": (expression, True),
    "$import in a list": (import_in_list, True),
    "$import in metadata.json": (import_in_metadata, True),
    "%macro of a file": (in_macro, True),
    "%macro of a YAML file": (in_second_config, True),
    "YAML tag": (yaml_tag, False),
    "YAML alias": (yaml_alias, True),
    "scripts/__init__.py": (scripts_package, True),
    "scripts/ with a method": (scripts_extension, True),
    "scripts/ is a link": (scripts_linked, True),
    "__pycache__ not of its source": (compiled, False),
    "scipy.py": (hides_dependency, False),
    "json.py": (hides_library, False),
    "numpy/": (hides_by_folder, False),
    "sitecustomize.py": (at_start, False),
    "evil.pth (path file)": (path_file, False),
    "pickle as model.pt": (pickled_weights, False),
    "torch.load(weights_only=False)": (pickle_in_expression, True),
    "pickle named .ts": (pickle_called_torchscript, True),
    "NumPy object array": (object_array, True),
    "_requires_": (requires, True),
    "_disabled_": (disabled, True),
    "_mode_ callable": (mode_callable, True),
    "_mode_ debug": (mode_debug, False),
    "image_key": (image_key, True),
    "amp": (amp, True),
    "path of the weights": (weights_path, True),
    "path by reference": (bundle_root, True),
    "initialize, run, finalize": (initialize, False),
    "evaluator and handlers": (evaluator, False),
    "tracking": (tracking, False),
    "logging.conf": (logging_config, False),
    "entry points": (entry_points, False),
    "config is a link": (linked_config, True),
    "control characters": (hidden_text, True),
    "link to itself": (link_to_root, True),
    "YAML bomb": (yaml_bomb, False),
    "YAML in a circle": (yaml_loop, False),
    "deep JSON": (deep_json, False),
    "deep metadata.json": (deep_metadata, False),
    "macro bomb": (macro_bomb, False),
    "macro in a circle": (macro_loop, False),
    "config of 1 TB": (huge_config, False),
    "config is a pipe": (device_config, False),
    "expressions in a circle": (expressions_in_circle, False),
}
BOMBS = tuple(list(HOSTILE)[-9:-1])
"""Bundles of which no command can read the config."""

LOOKING: dict[str, list[str]] = {
    "info": ["info", "--bundle", "{bundle}"],
    "info --json": ["info", "--bundle", "{bundle}", "--json"],
    "overlay": ["overlay", "--bundle", "{bundle}", "--output", "{out}/overlay.json"],
    "overlay --metrics": ["overlay", "--metrics", "--bundle", "{bundle}", "--output", "{out}/metrics.json"],
    "import-esegeta": [
        *("import-esegeta", "{root}/esegeta.json", "--bundle", "{bundle}", "--output", "{out}/esegeta.json")
    ],
    "merge": ["merge", "--bundle", "{bundle}", "--output", "{out}/merged.json"],
    "methods": ["methods", "--bundle", "{bundle}"],
    "methods --json": ["methods", "--bundle", "{bundle}", "--json"],
    "methods NAME": ["methods", "Sneaky", "--bundle", "{bundle}"],
    "targets": ["targets", "--bundle", "{bundle}"],
    "metrics": ["metrics", "--bundle", "{bundle}"],
}
_RUN = ["--bundle", "{bundle}", "--input", "{scan}", "--output", "{out}/run", "--no-pictures", "--methods", "Saliency"]
BUILDING: dict[str, list[str]] = {
    "layers": ["layers", "--bundle", "{bundle}"],
    "check": ["check", "--bundle", "{bundle}"],
    "explain": ["explain", *_RUN],
    "explain --dry-run": ["explain", "--dry-run", *_RUN],
    "evaluate": ["evaluate", *[w for w in _RUN if w != "--no-pictures"], "--metrics", "Sparseness"],
    "patterns": ["patterns", "--bundle", "{bundle}", "--input", "{scan}", "--output", "{out}/patterns.pt"],
    "concepts": ["concepts", "--bundle", "{bundle}", "--input", "{scan}", "--output", "{out}/concepts"],
    "influence": [
        *("influence", "--bundle", "{bundle}", "--input", "{scan}", "--training", "{scan}", "--labels", "{scan}"),
        *("--checkpoints", "{bundle}/models/model.pt", "--output", "{out}/influence"),
    ],
    "app": ["app", "--bundle", "{bundle}", "--input", "{scan}", "--output", "{out}/app", "--port", "0"],
    "demo": ["demo", "--bundle", "{bundle}", "--output", "{out}/demo"],
}


def make_hostile(name: str, folder: Path) -> Place:
    """Make a bundle in a folder, with a scan beside it."""
    folder.mkdir(parents=True)
    root = folder / "bundle"
    template = folder.parent / "template"
    if not template.exists():
        make_bundle(template)
        make_scan(template / "scan.nii.gz")
    shutil.copytree(template, root, ignore=shutil.ignore_patterns("scan.nii.gz"))
    shutil.copy(template / "scan.nii.gz", folder / "scan.nii.gz")
    configured = {"methods": [{"method_name": "captum_Saliency", "use": True, "keywords": {}}]}
    (folder / "esegeta.json").write_text(json.dumps(configured), encoding="utf-8")
    place = Place(root, folder / "marker")
    place.write()
    HOSTILE[name][0](place)
    return place


@dataclass(frozen=True)
class Ran:
    """The end of a command: its exit code, the text on both streams, and whether the marker was touched."""

    code: int
    text: str
    executed: bool


def run_command(words: list[str], place: Place) -> Ran:
    """Run a command in this process; modules that it imports from the bundle are removed afterwards."""
    out = Path(tempfile.mkdtemp(dir=place.root.parent))
    known = {"root": place.root.parent, "bundle": place.root, "scan": place.root.parent / "scan.nii.gz", "out": out}
    before = set(sys.modules)
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            code = main([word.format(**known) for word in words])
        except SystemExit as stop:  # nothing of ours raises it, but a bundle's code may
            code = int(stop.code or 0)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("scripts", "evil_module", "nilearn", "antigravity"):
            del sys.modules[name]
    executed = place.marker.exists()
    place.marker.unlink(missing_ok=True)
    return Ran(code, stream.getvalue(), executed)


def table(folder: Path) -> Iterator[str]:
    """Yield the lines of the table: bundles by commands, with E for an execution and the exit code otherwise."""
    commands = {**LOOKING, **BUILDING}
    yield f"{'bundle':<32} {'executions':>10}  exit codes of {', '.join(commands)}"
    total = runs = 0
    for name in HOSTILE:
        place = make_hostile(name, folder / f"{len(list(folder.iterdir()))}")
        ran = [run_command(words, place) for words in commands.values()]
        executions = sum(r.executed for r in ran)
        total, runs = total + executions, runs + len(ran)
        yield f"{name:<32} {executions:>10}  {' '.join('E' if r.executed else str(r.code) for r in ran)}"
    yield f"{len(HOSTILE)} bundles x {len(commands)} commands: {total} executions in {runs} runs"


if __name__ == "__main__":
    os.environ.pop(TRUST, None)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CONFIG_HOME"] = str(Path(scratch) / "settings")
        for line in table(Path(scratch)):
            print(line, flush=True)
