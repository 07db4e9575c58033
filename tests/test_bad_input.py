"""Bad input gets a named error in one line, and nothing else is lost.

The rows of docs/bad_input.md are what these tests see; ``python -m tests.test_bad_input`` writes the file anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from esegeta_monai.cli.main import main
from tests.support.cli import NETWORK, make_bundle, make_scan, run_json, statuses

DOC = Path(__file__).parents[1] / "docs" / "bad_input.md"
TARGET = "MultiClassMask(1)"


@dataclass
class Situation:
    """The place of one test: a bundle, a good scan, and what the command is to be given."""

    folder: Path

    def __post_init__(self) -> None:
        self.bundle = self.folder / "bundle"
        self.good = make_scan(self.folder / "scans" / "good.nii.gz")
        self.bad = self.folder / "scans" / "bad.nii.gz"
        self.output = self.folder / "out"
        self.inputs: list[Path | str] = [self.bad, self.good]
        self.methods = "Saliency"
        self.more: list[str] = ["--target", TARGET]

    def argv(self) -> list[str]:
        words = ["explain", "--bundle", self.bundle, "--input", *self.inputs, "--output", self.output]
        return [str(word) for word in [*words, "--methods", self.methods, "--no-pictures", *self.more]]


@dataclass(frozen=True)
class Row:
    """A kind of bad input: how it is made, the exit code, and what the message must have."""

    what: str
    code: int
    message: str
    make: Callable[[Situation], object]
    goes_on: bool = True

    @property
    def id(self) -> str:
        return self.what.replace(" ", "-")


def missing(s: Situation) -> None:
    make_bundle(s.bundle)


def truncated(s: Situation) -> None:
    make_bundle(s.bundle)
    whole = make_scan(s.bad).read_bytes()
    s.bad.write_bytes(whole[: len(whole) // 2])


def empty(s: Situation) -> None:
    make_bundle(s.bundle)
    s.bad.write_bytes(b"")


def no_nifti(s: Situation) -> None:
    make_bundle(s.bundle)
    s.bad.write_text("date,patient\n2024-01-15,x\n" * 50, encoding="utf-8")


def voxel(value: float) -> Callable[[Situation], None]:
    def make(s: Situation) -> None:
        make_bundle(s.bundle)
        image = nib.load(make_scan(s.bad))
        data = np.asarray(image.dataobj).copy()
        data[3, 4, 5] = value
        nib.save(nib.Nifti1Image(data, image.affine), s.bad)

    return make


def of_shape(*shape: int) -> Callable[[Situation], None]:
    def make(s: Situation) -> None:
        make_bundle(s.bundle)
        make_scan(s.bad, shape)

    return make


def singular(s: Situation) -> None:
    make_bundle(s.bundle)
    image = nib.load(make_scan(s.bad))
    header = image.header.copy()
    header.set_sform(np.array([[2.0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]), code=1)
    header.set_qform(None, code=0)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, header), s.bad)


def one_good(s: Situation, **changes: object) -> None:
    make_bundle(s.bundle, **changes)  # type: ignore[arg-type]
    s.inputs = [s.good]


def with_options(*more: str) -> Callable[[Situation], None]:
    def make(s: Situation) -> None:
        one_good(s)
        s.more = list(more)

    return make


def by(method: str) -> Callable[[Situation], None]:
    def make(s: Situation) -> None:
        one_good(s)
        s.methods = method

    return make


def empty_target(s: Situation) -> None:
    one_good(s)
    weights = torch.load(s.bundle / "models" / "model.pt", weights_only=True)
    for name, value in weights.items():  # the last layer never speaks for class 1
        if name.startswith("model.2") and name.endswith("bias"):
            value[1] = -1e6
    torch.save(weights, s.bundle / "models" / "model.pt")


def probabilities(s: Situation) -> None:
    one_good(s)
    scan = nib.load(s.good)
    file = s.folder / "atlas.nii.gz"
    nib.save(nib.Nifti1Image(np.full(scan.shape, 0.5, np.float32), scan.affine), file)
    s.methods = f"FeatureAblation('{file}')"


def other_grid(s: Situation) -> None:
    make_bundle(s.bundle, channels=2)
    first = make_scan(s.folder / "pair" / "p_T1.nii.gz")
    second = make_scan(s.folder / "pair" / "p_T2.nii.gz", (16, 16, 12))
    good = [make_scan(s.folder / "good" / f"good_{n}.nii.gz", seed=i) for i, n in enumerate(("T1", "T2"))]
    s.inputs = [f"{first},{second}", f"{good[0]},{good[1]}"]


def preprocessing_wants_more(s: Situation) -> None:
    steps = [{"_target_": "LoadImaged", "keys": ["image", "label"], "ensure_channel_first": True}]
    one_good(s, preprocessing={"_target_": "Compose", "transforms": steps})


def cut_weights(s: Situation) -> None:
    one_good(s)
    weights = s.bundle / "models" / "model.pt"
    weights.write_bytes(weights.read_bytes()[:2000])


def foreign_weights(s: Situation) -> None:
    one_good(s)
    torch.save(torch.nn.Linear(2, 2).state_dict(), s.bundle / "models" / "model.pt")


def output_is_a_file(s: Situation) -> None:
    one_good(s)
    s.output.write_text("not a folder", encoding="utf-8")


ODD = """
import torch

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        return str(self.layer(x).sum())
"""


def odd_output(s: Situation) -> None:
    one_good(s, weights=False, network_def={"_target_": "scripts.odd.Odd"})
    (s.bundle / "scripts").mkdir()
    (s.bundle / "scripts" / "odd.py").write_text(ODD, encoding="utf-8")
    torch.save({"layer.weight": torch.zeros(3, 1, 3, 3, 3), "layer.bias": torch.zeros(3)}, s.bundle / "models/model.pt")


def twins(s: Situation) -> None:
    make_bundle(s.bundle)
    s.inputs = [make_scan(s.folder / "p1" / "T1.nii.gz"), make_scan(s.folder / "p2" / "T1.nii.gz", seed=1)]


def no_scans(s: Situation) -> None:
    make_bundle(s.bundle)
    (s.folder / "nothing").mkdir()
    s.inputs = [s.folder / "nothing"]


def no_bundle(s: Situation) -> None:
    s.inputs = [s.good]


def broken_config(s: Situation) -> None:
    one_good(s)
    (s.bundle / "configs" / "inference.json").write_text('{"network_def": ', encoding="utf-8")


def one_channel_network(s: Situation) -> None:
    """metadata.json is silent, so that only the network itself can tell."""
    make_bundle(s.bundle)
    (s.bundle / "configs" / "metadata.json").unlink()
    make_scan(s.bad, (16, 16, 16, 2))


NO_NETWORK = {"network_def": None, "network": None}
ROWS = [
    Row("missing file", 1, r"bad.nii.gz: there is no such file", missing),
    Row("truncated .nii.gz", 1, r"bad.nii.gz: the file is truncated .*copy it again", truncated),
    Row("empty file", 1, r"bad.nii.gz: the file is empty", empty),
    Row("not a NIfTI file", 1, r"bad.nii.gz: no readable NIfTI file", no_nifti),
    Row("NaN voxel", 1, r"bad.nii.gz: 1 of 5120 voxels are NaN or infinite", voxel(float("nan"))),
    Row("infinite voxel", 1, r"bad.nii.gz: 1 of 5120 voxels are NaN or infinite", voxel(float("inf"))),
    Row("2D image for a 3D network", 1, r"bad.nii.gz: a 2D image \(16x20\), but the network", of_shape(16, 20)),
    Row("wrong number of channels", 1, r"bad.nii.gz: 2 channel\(s\), but the network", of_shape(16, 20, 16, 2)),
    Row("wrong number of channels, no metadata", 1, r"expected input.*to have 1 channels", one_channel_network),
    Row("singular affine", 1, r"bad.nii.gz: the affine is singular", singular),
    Row("channels on different grids", 1, r"'p_T2.nii.gz' is not on the grid of 'p_T1.nii.gz'", other_grid),
    Row("class number that the network lacks", 1,
        r"class_index=7: no such class; the network has 3 output channel\(s\).*grey matter",
        with_options("--target", "MultiClassMask(7)"), goes_on=False),
    Row("class name that the network lacks", 1, r"class_index='spleen': the network has no class of that name",
        with_options("--target", "MultiClassMask('spleen')"), goes_on=False),
    Row("target without voxels", 0, r"", empty_target, goes_on=False),
    Row("layer that does not exist", 2, r"the network has no layer 'model.9'; near matches: .*model\.",
        with_options("--methods", "GradCam(layer='model.9')"), goes_on=False),
    Row("method that does not exist", 2, r"there is no method 'Occlusio': did you mean .*Occlusion",
        with_options("--methods", "Occlusio"), goes_on=False),
    Row("target that does not exist", 2, r"there is no target 'Multiclas\w*': did you mean",
        with_options("--target", "MulticlasMask(1)"), goes_on=False),
    Row("parameter that does not exist", 2, r"Saliency: .*its parameters are: abs, name",
        with_options("--methods", "Saliency(absolute=True)"), goes_on=False),
    Row("parameter of another kind", 2, r"Occlusion: window='8': give a whole number or a list of whole numbers",
        with_options("--methods", "Occlusion(window='8')"), goes_on=False),
    Row("feature map that is not there", 1, r"feature map: 'atlas.nii.gz' is neither a file nor a key",
        by("FeatureAblation('atlas.nii.gz')"), goes_on=False),
    Row("feature map of probabilities", 1, r"values that are no whole numbers, such as 0\.5: threshold it",
        probabilities, goes_on=False),
    Row("method that costs too much", 1, r"Rise would score 200,000 perturbations, .* or allow it by --yes",
        by("Rise(200000)"), goes_on=False),
    Row("bundle without a network", 2, r"has no network: configs/inference.json has none of the ids .*network_def",
        lambda s: one_good(s, **NO_NETWORK), goes_on=False),
    Row("bundle without an inferer", 2, r"has no inferer: configs/inference.json has none of the ids",
        lambda s: one_good(s, inferer=None), goes_on=False),
    Row("bundle without preprocessing", 2, r"has no preprocessing: configs/inference.json has none of the ids",
        lambda s: one_good(s, preprocessing=None), goes_on=False),
    Row("no bundle", 2, r"no bundle at .*bundle", no_bundle, goes_on=False),
    Row("broken config", 2, r"configs/inference.json cannot be read", broken_config, goes_on=False),
    Row("network that cannot be built", 2, r"cannot be built: .*override",
        lambda s: one_good(s, network_def={**NETWORK, "strides": [2, 2, 2, 2], "num_res_units": "x"}), goes_on=False),
    Row("missing weights", 2, r"no weights at .*model.pt", lambda s: one_good(s, weights=False), goes_on=False),
    Row("truncated weights", 2, r"model.pt is not a readable checkpoint", cut_weights, goes_on=False),
    Row("weights of another network", 2, r"model.pt does not fit UNet", foreign_weights, goes_on=False),
    Row("preprocessing that needs a label", 1, r"preprocessing failed: KeyError: .*label", preprocessing_wants_more,
        goes_on=False),
    Row("output folder that cannot be written", 2, r"cannot write .*out: .*choose another output folder",
        output_is_a_file, goes_on=False),
    Row("network that returns no tensor", 1, r"the network returns str: only a tensor", odd_output, goes_on=False),
    Row("two scans of one name", 2, r"case 'T1' and case 'T1' would both be called.*--input NAME=FILE", twins,
        goes_on=False),
    Row("folder without scans", 2, r"nothing: no scan in this folder", no_scans, goes_on=False),
    Row("device that is not there", 2, r"--device cuda:63: this machine has", with_options("--device", "cuda:63"),
        goes_on=False),
    Row("option that does not exist", 2, r"there is no option --metod: did you mean --methods",
        with_options("--metod", "x"),
        goes_on=False),
]  # fmt: skip


def errors(stderr: str) -> list[str]:
    """The lines that tell of errors: those of the log and the last one of a command that could not begin."""
    return [line for line in stderr.splitlines() if " ERROR: " in line or line.startswith("esegeta-monai: error:")]


def documented(situation: Situation, row: Row, lines: list[str]) -> str:
    """The row of the table: input, message, exit code; without this machine's folders."""
    message = lines[0] if lines else ""
    message = re.sub(r"^[\d\-: ]+ERROR: ", "", message).removeprefix("esegeta-monai: error: ")
    if not message:
        message = run_json(situation.output)["results"][0].get("reason", "")
    message = message.replace(f"{situation.folder.resolve()}/", "").replace(f"{situation.folder}/", "")
    message = re.sub(r"this machine has \d+", "this machine has 0", message)
    message = re.sub(r"did you mean .*\?", "did you mean …?", message)  # new methods and targets have names too
    return f"| {row.what} | {row.code} | {message.replace('|', chr(92) + '|')} |"


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_named_and_nothing_lost(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    situation = Situation(tmp_path)
    row.make(situation)
    code = main(situation.argv())
    seen = capsys.readouterr().err
    lines = errors(seen)
    assert code == row.code, seen
    assert "Traceback" not in seen
    assert (len(lines) == 1) == (code != 0), f"one line an error:\n{seen}"
    assert re.search(row.message, "".join(lines)), seen
    assert documented(situation, row, lines) in DOC.read_text(encoding="utf-8").splitlines(), "docs/bad_input.md is old"
    files = sorted(p.name for p in situation.output.rglob("*_attr.*")) if situation.output.is_dir() else []
    assert not [p for p in situation.folder.rglob("*") if p.name.startswith(".tmp-")]
    if code == 2:
        assert not files
        assert not (situation.output / "run.json").exists()
        return
    result = statuses(situation.output)
    if row.goes_on:
        good = [status for (case, _, method), status in result.items() if case == "good" and method]
        assert good == ["ok"]
        assert len(result) == 2
        failed = next(e for e in run_json(situation.output)["results"] if e["status"] == "failed")
        assert failed["case"] in ("bad", "p")
        assert str(tmp_path) not in failed["reason"], "folders can name people"
        assert [f.split("_")[0] for f in files] == ["good", "good"]
    else:
        assert set(result.values()) == {"empty_target" if code == 0 else "failed"}
        assert not [f for f in files if f.endswith((".nii.gz", ".png"))]
    assert str(tmp_path) not in (situation.output / "esegeta.log").read_text(encoding="utf-8")


def test_an_empty_target_is_recorded(tmp_path: Path) -> None:
    situation = Situation(tmp_path)
    empty_target(situation)
    assert main(situation.argv()) == 0
    (entry,) = run_json(situation.output)["results"]
    assert (entry["status"], entry["target"]) == ("empty_target", "MultiClassMask-grey matter")
    assert "no voxel of the prediction" in entry["reason"]
    assert [p.suffix for p in (situation.output / "good").iterdir()] == [".json"]


def test_v_adds_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    situation = Situation(tmp_path)
    one_good(situation, weights=False)
    assert main([*situation.argv(), "-v"]) == 2
    seen = capsys.readouterr().err
    assert "Traceback" in seen
    assert seen.splitlines()[-1].startswith("esegeta-monai: error: no weights at")
    situation = Situation(tmp_path / "second")
    truncated(situation)
    assert main([*situation.argv(), "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err
    log = (situation.output / "esegeta.log").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert str(situation.bad) not in log, "not even in a traceback"


def write_doc() -> None:
    """Every situation once, and the table of what was seen."""
    rows = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as stderr:
            situation = Situation(Path(folder))
            row.make(situation)
            with contextlib.redirect_stdout(io.StringIO()):
                code = main(situation.argv())
            lines = errors(stderr.getvalue())
            rows.append(documented(situation, row, lines))
            if code != row.code:
                sys.exit(f"{row.what}: exit code {code}\n{stderr.getvalue()}")
    DOC.write_text("\n".join([HEAD, *rows, ""]), encoding="utf-8")


HEAD = """# Bad input

Messages and exit codes of `esegeta-monai explain`, as tested by `tests/test_bad_input.py`
(`python -m tests.test_bad_input` writes this table).

* Exit code 2: nothing was computed, and no file was written except possibly the output folder.
* Exit code 1: the case or method is in `run.json` with this reason; **the other cases and methods are finished**.
* Exit code 0: not an error; the reason is in `run.json` and in the record.

Each message is one line; `-v` adds the traceback. Files get their final names only when they are complete.

| input | exit code | message |
|---|---|---|"""

if __name__ == "__main__":
    write_doc()
