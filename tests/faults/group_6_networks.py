"""Networks that run out of memory, hang, raise errors, return odd values, or change the process."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from esegeta_monai.files.journal import read_run
from tests.faults.runner import Done, Row, command, statuses, unfinished
from tests.support.cli import SIZE, make_bundle, make_scan

GROUP = "6 memory and networks that misbehave"
METHODS = "Saliency,GradCam,IntegratedGradients(n_steps=2),Occlusion(window=16)"

NETWORK = """
import logging, os, random, sys, time, warnings
import numpy, torch

class Net(torch.nn.Module):
    def __init__(self, how="", n=0):
        super().__init__()
        self.first, self.last = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 3, 1)
        self.how, self.n, self.passes = how, n, 0

    def forward(self, x):
        self.passes += 1
        before = getattr(self, "before_" + self.how, None)
        if before is not None:
            changed = before(x)
            x = x if changed is None else changed
        y = self.last(torch.relu(self.first(x)))
        after = getattr(self, "after_" + self.how, None)
        return y if after is None else after(y)

    def before_cuda(self, x):
        if len(x) > self.n:
            raise torch.OutOfMemoryError("CUDA out of memory")
    def before_allocator(self, x):
        if len(x) > self.n:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    def before_python(self, x):
        if len(x) > self.n:
            raise MemoryError("no room")
    def before_gradient(self, x):
        if x.requires_grad and len(x) > self.n:
            raise torch.OutOfMemoryError("CUDA out of memory")
    def before_gradient_allocator(self, x):
        if x.requires_grad and len(x) > self.n:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    def before_later(self, x):
        if self.passes > 3 and len(x) > self.n:
            raise torch.OutOfMemoryError("CUDA out of memory")
    def before_backward(self, x):
        def fail(gradient):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if x.requires_grad and len(x) > self.n:
            x.register_hook(fail)
    def before_trips(self, x):
        if self.passes == self.n:
            raise ValueError("no such thing")
    def before_ends(self, x):
        if self.passes >= self.n:
            os._exit(7)
    def before_forks(self, x):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    def before_filters(self, x):
        warnings.simplefilter("error")
    def before_closes(self, x):
        sys.stdout.close()
    def before_raises(self, x):
        if self.passes >= self.n:
            raise ValueError("no such thing")
    def before_exits(self, x):
        if self.passes >= self.n:
            sys.exit(5)
    def before_interrupts(self, x):
        if self.passes >= self.n:
            raise KeyboardInterrupt
    def before_recurses(self, x):
        return self.forward(x)
    def before_prints(self, x):
        print("NOISE"), warnings.warn("NOISE")
    def before_dtype(self, x):
        torch.set_default_dtype(torch.float64)
    def after_grad(self, y):
        torch.set_grad_enabled(not torch.is_grad_enabled())
        return y
    def before_seeds(self, x):
        torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    def before_folder(self, x):
        os.chdir("/")
    def before_environment(self, x):
        os.environ.clear()
    def before_train(self, x):
        self.train()
    def before_threads(self, x):
        torch.set_num_threads(2)
    def before_silences(self, x):
        logging.disable(logging.CRITICAL), logging.getLogger().handlers.clear()
    def before_leaves(self, x):
        if self.passes == 1:
            child = os.fork()
            if child == 0:
                time.sleep(3600), os._exit(0)
            with open(__file__ + ".pid", "a") as file:
                file.write(f"{child} ")
    def before_writes(self, x):
        x.mul_(0.5)
    def before_learns(self, x):
        with torch.no_grad():
            self.last.weight.mul_(1.001)
    def before_random(self, x):
        return x + torch.randn_like(x)
    def after_nan(self, y):
        return y * float("nan")
    def after_infinite(self, y):
        return y + float("inf")
    def after_once(self, y):
        return y * float("nan") if self.passes == self.n else y
    def after_none(self, y):
        return None
    def after_empty(self, y):
        return y[:, :0]
    def after_short(self, y):
        return y[:1]
    def after_cut(self, y):
        return y[..., :-1]
    def after_classes(self, y):
        return y.argmax(1, keepdim=True)
    def after_half(self, y):
        return y.half()
    def after_detached(self, y):
        return y.detach()
    def after_dictionary(self, y):
        return {"out": y}
    def after_list(self, y):
        return [y, y]
"""

BY_INTENSITY = """
import os, signal, time
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        top = float(x.detach().max())
        if top > 490 or (top > 390 and x.requires_grad):
            time.sleep(3600)
        if 290 < top < 310:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if 240 < top < 260 and x.requires_grad:
            os.kill(os.getpid(), signal.SIGKILL)
        y = self.first(x)
        return y * float("nan") if 190 < top < 210 else y
"""


def bundle(folder: Path, source: str, **arguments: object) -> Path:
    """A bundle whose network is in its scripts, with fixed weights."""
    loader = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
    changes = {"preprocessing": {"_target_": "Compose", "transforms": [loader]}} if source is BY_INTENSITY else {}
    inferer = {"_target_": "SlidingWindowInferer", "roi_size": [SIZE] * 3, "sw_batch_size": 4, "overlap": 0.25}
    definition = {"_target_": "scripts.faulty.Net", **arguments}
    make_bundle(folder, weights=False, network_def=definition, inferer=inferer, **changes)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "scripts" / "faulty.py").write_text(source, encoding="utf-8")
    names: dict[str, object] = {}
    exec(source, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = names["Net"](**arguments)  # type: ignore[operator]
        if source is NETWORK:  # every class wins somewhere
            scan = torch.rand(1, 1, 24, 24, 24)
            with torch.no_grad():
                out = network.last(torch.relu(network.first(scan)))
                network.last.bias -= out.flatten(2).median(2).values[0]
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def words_of(folder: Path, made: Path, scans: list[Path]) -> list[object]:
    words = ["explain", "--bundle", made, "--input", *scans, "--output", folder / "out", "--methods", METHODS]
    return [*words, "--target", "MultiClassMask(1)", "--no-pictures", "--seed", 1]


def run(
    folder: Path, how: str, n: int = 0, *more: object, before: Callable[[], object] | None = None
) -> tuple[Done, Path]:
    """Explain two scans by a network with a fault."""
    scans = [make_scan(folder / f"{name}.nii.gz", (28, 28, 28), seed=i) for i, name in enumerate(("good", "second"))]
    done = command(*words_of(folder, bundle(folder / "bundle", NETWORK, how=how, n=n), scans), *more, before=before)
    assert not unfinished(folder / "out"), unfinished(folder / "out")
    assert not done.traceback, done.err
    return done, folder / "out"


def maps(output: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nib.load(path).dataobj) for path in output.rglob("*_attr.nii.gz")}


@functools.cache
def expected() -> dict[str, np.ndarray]:
    """The maps of the network without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        done, output = run(Path(folder), "nothing")
        assert done.code == 0, done.err
        return maps(output)


def equal(output: Path, tolerance: float = 1e-5) -> None:
    actual = maps(output)
    assert set(actual) == set(expected())
    for name, wanted in expected().items():
        assert np.abs(actual[name] - wanted).max() <= tolerance * np.abs(wanted).max(), name


def harmless(how: str, n: int = 0, tell: str = "", *more: object) -> Callable[[Path], str | None]:
    """The maps are those of the network without the fault, and a warning names the fault, if it must."""

    def check(folder: Path) -> str | None:
        done, output = run(folder, how, n, *more)
        assert done.code == 0, done.err
        equal(output)
        texts = [text for entry in read_run(output).results for text in entry["warnings"] if tell and tell in text]
        assert bool(texts) == bool(tell), read_run(output).results[0]["warnings"]
        return texts[0][:120] if texts else None

    return check


def refused(how: str, n: int, text: str, code: int = 1) -> Callable[[Path], str]:
    """Each result is named as failed, with the cause."""

    def check(folder: Path) -> str:
        done, output = run(folder, how, n)
        assert done.code == code, (done.code, done.err)
        assert any(text in line for line in done.err.splitlines()), done.err
        if code == 1:
            assert set(statuses(output).values()) <= {"failed", "ok", "zero", "incomplete"}
            assert "failed" in statuses(output).values()
        return f"{dict(Counter(statuses(output).values()))} {(done.errors or [''])[0][-120:]}"

    return check


def warned(how: str) -> Callable[[Path], str]:
    """A network that is no function of its input: a failure or a warning names it."""

    def check(folder: Path) -> str:
        done, output = run(folder, how)
        texts = {text for entry in read_run(output).results for text in entry.get("warnings", [])}
        assert done.code == 1 or texts
        return sorted(texts or set(done.errors))[0][:120]

    return check


def _in_one_run(folder: Path) -> str:
    """Issue: a hanging network, one out of memory, one of NaN, and a good one; and two more ways to die."""
    tops = {"hangs": 500, "hangs_in_gradient": 400, "memory": 300, "killed": 250, "nan": 200, "good": 100}
    for name, top in tops.items():
        path = make_scan(folder / "scans" / f"{name}.nii.gz", (16, 16, 16))
        values = nib.load(path).get_fdata().astype(np.float32)
        nib.save(nib.Nifti1Image(values * top / values.max(), np.eye(4)), path)
    words = ["--bundle", bundle(folder / "bundle", BY_INTENSITY), "--input", folder / "scans", "--no-pictures"]
    words += ["--methods", "Saliency,GradCam(layer=first)", "--target", "MultiClassMask(1)", "--no-checks"]
    command_line = [sys.executable, "-m", "esegeta_monai", "explain", *map(str, words), "--output", str(folder / "out")]
    began = time.monotonic()
    one = ["--input", str(folder / "scans" / "good.nii.gz"), "--output", str(folder / "alone")]  # the last one counts
    subprocess.run([*command_line, *one], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    limit = max(6, round(time.monotonic() - began))  # a busy machine is no fault of a network
    done = subprocess.run(
        [*command_line, "--hard-time-limit", str(limit)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900 + 20 * limit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    results = read_run(folder / "out").results
    by_case = {name: {e["status"] for e in results if e["case"] == name} for name in tops}
    assert done.returncode == 1, done.stderr
    assert by_case["hangs"] == {"timeout"}, by_case
    assert by_case["hangs_in_gradient"] == {"timeout", "ok"}, by_case  # GradCam takes no gradient of the image
    assert by_case["killed"] == {"failed", "ok"}, by_case
    assert by_case["memory"] == by_case["nan"] == {"failed"}, by_case
    assert by_case["good"] == {"ok"}, by_case
    assert json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))["finished"]
    (lost,) = [e for e in results if e["case"] == "hangs_in_gradient" and e["status"] == "timeout"]
    assert lost["method"] == "Saliency"
    return "; ".join(f"{name} {'/'.join(sorted(s))}" for name, s in by_case.items())


def _grandchildren(folder: Path) -> None:
    """The command ends although a process that the network has started goes on."""
    done, _ = run(folder, "leaves")
    children = (folder / "bundle" / "scripts" / "faulty.py.pid").read_text(encoding="utf-8").split()
    for child in children:  # of the network and of its copies
        os.kill(int(child), signal.SIGKILL)  # it runs
    assert done.code == 0


def _exit(folder: Path) -> str:
    done, _ = run(folder, "exits", 5)
    assert done.code not in (0, 2), "taken for success"
    return f"exit code {done.code}"


def _any(folder: Path, how: str) -> str:
    """Maps with a warning, or failures by name: no silence."""
    done, output = run(folder, how)
    texts = {text for entry in read_run(output).results for text in entry.get("warnings", [])}
    checks = {c["check"]: c["verdict"] for e in read_run(output).results for c in e.get("checks", [])}
    assert done.code == 1 or texts or set(checks.values()) - {"passed"}, (done.code, checks)
    return f"exit code {done.code}; {sorted(texts | set(done.errors))[:1]}"[:160]


def _once(how: str, n: int, text: str) -> Callable[[Path], str]:
    """One pass of many fails: it is named, as a failure or in the check to which it belongs, and the rest is done."""

    def check(folder: Path) -> str:
        done, output = run(folder, how, n)
        contents = read_run(output)
        results = Counter(e["status"] for e in contents.results)
        texts = done.errors + [c["text"] for e in contents.results for c in e.get("checks", [])]
        assert any(re.search(text, one) for one in texts), (done.code, texts)
        assert done.code == ("failed" in results), (done.code, done.err)
        assert set(results) <= {"failed", "ok", "zero", "incomplete"}
        assert results["ok"]
        for name, values in maps(output).items():
            wanted = expected()[name]
            assert np.abs(values - wanted).max() <= 1e-5 * np.abs(wanted).max(), name
        return f"{dict(results)} {next(one for one in texts if re.search(text, one))[-120:]}"

    return check


def _ends(folder: Path) -> str:
    """The process ends without a word; what was finished is kept, and the same command goes on from there."""
    done, output = run(folder, "ends", 40)
    assert done.code == 7
    before = {path.name for path in output.rglob("*_attr.json")}
    assert before
    again = command(*words_of(folder, folder / "bundle", [folder / "good.nii.gz", folder / "second.nii.gz"]))
    assert again.code in (0, 7)
    skipped = [key for key, status in statuses(output).items() if status == "skipped"] if again.code == 0 else []
    assert {path.name for path in output.rglob("*_attr.json")} > before or len(skipped) == len(before)
    return f"{len(before)} maps kept, then {len({path.name for path in output.rglob('*_attr.json')})}"


def _relative(folder: Path) -> str:
    """The network changes the working folder, and all paths are relative: files are where they were asked for."""
    bundle(folder / "bundle", NETWORK, how="folder", n=0)
    for i, name in enumerate(("good", "second")):
        make_scan(folder / f"{name}.nii.gz", (28, 28, 28), seed=i)
    words = words_of(Path(), Path("bundle"), [Path("good.nii.gz"), Path("second.nii.gz")])
    done = command(*words, cwd=folder)
    assert done.code == 0, done.err
    equal(folder / "out")
    return "maps in the output folder"


def _closes(folder: Path) -> str:
    """All maps are there; that the summary cannot be printed is an error."""
    done, output = run(folder, "closes")
    assert (done.code, len(done.errors)) == (1, 1), done.err
    assert "closed file" in done.errors[0]
    equal(output)
    return done.errors[0]


ROWS = [
    Row(GROUP, "closes the standard output", _closes, slow=True),
    Row(GROUP, "hangs, hangs in a gradient, no memory, killed, NaN and a good case in one run", _in_one_run, slow=True),
    *(Row(GROUP, f"raises an error from pass {n} on", refused("raises", n, "no such thing"), slow=n > 1)
      for n in (1, 40)),
    *(
        Row(GROUP, f"{what} in pass {n} only", _once(how, n, text), slow=True)
        for what, how, text, passes in (
            ("raises an error", "trips", "no such thing", (1, 3, 9, 12, 30)),
            ("returns NaN", "once", "NaN|not finite", (12, 30)),  # earlier ones are of checks that leave NaN out
        )
        for n in passes
    ),
    Row(GROUP, "calls sys.exit", _exit, slow=True),
    Row(GROUP, "calls os._exit", _ends, slow=True),
    Row(GROUP, "raises KeyboardInterrupt", refused("interrupts", 9, "stopped", code=130), slow=True),
    Row(GROUP, "calls itself without end", refused("recurses", 0, "recursion"), slow=True),
    *(Row(GROUP, f"returns {name}", refused(how, 12, text), slow=how != "nan") for name, how, text in (
        ("NaN", "nan", "NaN or infinite"), ("infinity", "infinite", "NaN or infinite"), ("None", "none", "NoneType"),
        ("no channel", "empty", ""),
    )),
    Row(GROUP, "prints and warns", harmless("prints"), slow=True),
    Row(GROUP, "changes the default dtype", harmless("dtype", tell="default dtype")),
    Row(GROUP, "changes the grad mode", harmless("grad", tell="grad mode")),
    Row(GROUP, "seeds all random numbers", harmless("seeds", tell="seed of torch"), slow=True),
    *(Row(GROUP, name, harmless(how), slow=True) for name, how in (
        ("clears the environment", "environment"),
        ("switches to training", "train"), ("changes the threads", "threads"), ("switches logging off", "silences"),
        ("returns a dictionary", "dictionary"), ("forks in each pass", "forks"),
        ("turns warnings into errors", "filters"),
    )),
    Row(GROUP, "changes the working folder", harmless("folder", tell="working folder"), slow=True),
    Row(GROUP, "changes the working folder, with relative paths", _relative, slow=True),
    Row(GROUP, "leaves a process behind", _grandchildren, slow=True),
    *(Row(GROUP, f"is no function of its input: {how}", warned(how), slow=True) for how in ("learns", "random")),
    Row(GROUP, "returns a list", lambda folder: _any(folder, "list"), slow=True),
    Row(GROUP, "writes into its input", lambda folder: _any(folder, "writes"), slow=True),
    *(Row(GROUP, f"returns {what}", lambda folder, how=how: _any(folder, how), slow=True) for what, how in (
        ("one window of a batch", "short"), ("class numbers", "classes"), ("half precision", "half"),
        ("a detached output", "detached"),
        ("a cut output", "cut"),
    )),
]  # fmt: skip
