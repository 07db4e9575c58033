"""Several processes that compute a case together get the maps of one, from every method."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from monai.inferers import SliceInferer, SlidingWindowInferer, SlidingWindowInfererAdapt, sliding_window_inference
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.errors import MethodError, MethodTimeout, NetworkError, RankLost, UsageError
from esegeta_monai.explain.case import BatchInputs
from esegeta_monai.explain.prediction import Prediction
from esegeta_monai.methods import METHODS, IntegratedGradients, Method, Occlusion, Saliency, run
from esegeta_monai.targets import Box, MultiClassMask
from esegeta_monai.utils.distributed import Processes, process_group
from tests.support.layers import setting
from tests.support.networks import ELSEWHERE

FEW = {"n_steps": 3, "n_samples": 4, "n_masks": 6, "grid": 2, "steps": 4, "n_iter": 5, "max_channels": 4}
NEED_MORE = {
    "Cam",
    "FeaturePermutation",
    "LayerFeaturePermutation",
    "RegionTest",
    "PatternNet",
    "PatternAttribution",
    *ELSEWHERE,
}  # a linear head, other cases, self-attention, prompts


def spawn(work: Callable[..., None], *args: Any, ranks: int = 3) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_joined, (work, port, ranks, args), nprocs=ranks)


def _joined(rank: int, work: Callable[..., None], port: int, ranks: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    with process_group("gloo") as joined:
        assert (joined.rank, joined.size) == (rank, ranks)
        work(*args)


def small(cls: type[Method]) -> Method:
    if cls.__name__ == "KernelShap":  # needs two samples per feature
        return cls(n_samples=256)
    return cls(**{p: v for p, v in FEW.items() if p in cls.parameter_names()})


def by(objective: Objective, ranks: Processes) -> Objective:
    """The same objective, computed by these ranks; nothing is remembered."""
    return objective.derive(context=RunContext(processes=ranks, window_batch=objective.window_batch))


def every_method(network: str, output: str) -> None:
    result = setting(network, target=MultiClassMask(1, output=output))
    ranks, differences = Processes.current(), {}
    for cls in METHODS:
        if cls.__name__ in NEED_MORE or (cls.needs_linear and output != "logit"):
            continue
        method = small(cls)
        together, alone = by(result.objective, ranks), by(result.objective, Processes())
        with frozen(result.network):
            actual, expected = run(method, alone), run(method, together)
        scale = actual.maps.abs().max()
        assert scale > 0, cls
        differences[cls.__name__] = float((actual.maps - expected.maps).abs().max() / scale)
        for key in ("completeness_gap", "sum_in_padding", "share_through_layer", "booked", "baseline_value"):
            if key in actual.notes:
                assert [actual.note(0)[key]] == pytest.approx([expected.note(0)[key]], rel=1e-6, abs=1e-9), (cls, key)
        passes = ranks.gather(together.context.progress.passes)
        if ranks.rank == 0:
            print(cls.__name__, alone.context.progress.passes, passes, differences[cls.__name__])
    assert len(differences) > 30
    assert max(differences.values()) <= 1e-10, differences


class Apart(Processes):
    """One of several ranks that never meet: what each has is its own part."""

    @contextmanager
    def summed(self, sums: Sequence[Any]) -> Iterator[None]:
        yield

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Told(torch.nn.Module):
    """A network that uses what it is given beside the image, and knows what it has seen."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layer = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(1, 2, 3, padding=1)
        self.seen = 0

    def forward(self, x: Tensor, coordinates: Any = None, condition: Tensor | None = None) -> Tensor:
        self.seen += len(x)
        out = self.layer(x) if condition is None else self.layer(x + condition)
        if coordinates is not None:
            starts = [float(sum(s.start for s in place[2:])) for place in coordinates]
            out = out + torch.tensor(starts, dtype=out.dtype).reshape(-1, *[1] * (out.ndim - 1))
        return out


class Anew:
    """An inferer that restarts after running out of memory and remembers it, as `SlidingWindowInfererAdapt` does."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def __call__(self, x: Tensor, roi: Any, batch: int, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failures:
            self.failures -= 1
            network(x[..., :8, :8, :8])
        return sliding_window_inference(x, roi, batch, network, *args, **kwargs)


INFERERS = {
    "one window a pass": SlidingWindowInferer((8, 8, 8), 1, 0.25, "gaussian"),
    "four": SlidingWindowInferer((8, 8, 8), 4, 0.5, "gaussian"),
    "all in one": SlidingWindowInferer((8, 8, 8), 100, 0.25),
    "padded": SlidingWindowInferer((16, 8, 4), 3, 0.25, padding_mode="reflect"),
    "buffered": SlidingWindowInferer((8, 8, 8), 3, 0.5, buffer_steps=2, buffer_dim=0),
    "coordinates": SlidingWindowInferer((8, 8, 8), 4, 0.25, "gaussian", with_coord=True),
    "condition": SlidingWindowInferer((8, 8, 8), 4, 0.25, "gaussian"),
    "slices": SliceInferer(spatial_dim=1, roi_size=(8, 8), sw_batch_size=3, overlap=0.25),
    "adapting": SlidingWindowInfererAdapt((8, 8, 8), 3, 0.25, "gaussian"),
    "begun anew": SlidingWindowInfererAdapt((8, 8, 8), 3, 0.25, "gaussian"),
}


@pytest.mark.parametrize("name", INFERERS)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_windows_of_the_prediction(name, size, monkeypatch):
    torch.manual_seed(0)
    inferer, network = INFERERS[name], Told(2 if name == "slices" else 3).double()
    image = torch.randn(1, 1, 13, 14, 11, dtype=torch.float64)
    more = {"condition": torch.randn(image.shape, dtype=torch.float64)} if name == "condition" else {}
    (expected,) = Explainer(network, inferer, checks=False).judge(
        image, [Box(1, (1, 1, 1), (4, 5, 6))], network_kwargs=more
    )
    windows, network.seen, attributes = network.seen, 0, vars(inferer).copy()
    if name == "begun anew":
        monkeypatch.setattr("monai.inferers.inferer.sliding_window_inference", Anew(failures=1))
    seen, total = [], torch.zeros_like(expected.objective.prediction)
    for rank in range(size):
        settings = replace(Explainer(network, inferer, checks=False).settings, processes=Apart(rank, size))
        (case,) = BatchInputs(image, network_kwargs=more).cases(None)
        total += Prediction(settings, case).prediction
        seen.append(network.seen)
        network.seen = 0
    torch.testing.assert_close(total, expected.objective.prediction, rtol=1e-10, atol=1e-12)
    if name != "begun anew":
        assert sum(seen) == windows == len(expected.objective.plan)
        assert max(seen) - min(seen) <= 1
    assert vars(inferer) == attributes


def test_a_prediction_whose_windows_cannot_be_counted_is_refused(monkeypatch):
    monkeypatch.setattr("monai.inferers.inferer.sliding_window_inference", Anew(failures=2))
    explainer = Explainer(Told(3), SlidingWindowInferer((8, 8, 8), 1, 0.25))
    settings = replace(explainer.settings, processes=Apart(0, 2))
    (case,) = BatchInputs(torch.randn(1, 1, 13, 14, 11)).cases(None)
    with pytest.raises(NetworkError, match=r"requested 9 windows instead of 8.*device='cpu'"):
        Prediction(settings, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "output"), [("UNet_instance", "logit"), ("UNet_instance", "probability"), ("ViTAutoEnc", "logit")]
)
def test_every_method_is_the_same_by_one_rank_and_by_three(network, output):
    spawn(every_method, network, output)


class Fails:
    """A hook that fails after some passes; None: never."""

    def __init__(self, after: int | None) -> None:
        self.after, self.passes = after, 0

    def __call__(self, *_: Any) -> None:
        self.passes += 1
        if self.passes == self.after:
            raise ZeroDivisionError("injected")


def alike(what: str) -> None:
    """An error on one process reaches all of them."""
    ranks = Processes.current()
    objective = by(setting("UNet_instance").objective, ranks)
    with frozen(objective.model.network):
        if what == "error":

            def fails(batch: Batch) -> Tensor:
                if ranks.rank == 1:
                    raise ZeroDivisionError("injected")
                return batch.gradient(batch.image)[0]

            kind = ZeroDivisionError if ranks.rank == 1 else MethodError
            with pytest.raises(kind, match="injected" if ranks.rank == 1 else "rank 1: ZeroDivisionError: injected"):
                objective.scatter(fails)
        elif what == "error on a path":
            handle = objective.model.network.register_forward_hook(Fails(after=5 if ranks.rank == 1 else None))
            kind = ZeroDivisionError if ranks.rank == 1 else MethodError
            with pytest.raises(kind, match="injected" if ranks.rank == 1 else "rank 1: ZeroDivisionError: injected"):
                run(IntegratedGradients(n_steps=5, baseline="zero"), objective)
            handle.remove()
        else:
            objective.context.progress.start(0.0 if ranks.rank == 2 else None)
            time.sleep(0.01)
            with pytest.raises(MethodTimeout, match="time limit"):
                objective.scatter(lambda batch: batch.gradient(batch.image)[0])
        maps, _ = by(objective, ranks).scatter(lambda batch: batch.gradient(batch.image)[0])  # and they go on
        alone, _ = by(objective, Processes()).scatter(lambda batch: batch.gradient(batch.image)[0])
        assert float((maps - alone).abs().max() / alone.abs().max()) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("what", ["error", "error on a path", "time limit"])
def test_an_error_of_one_rank_is_an_error_of_all(what):
    spawn(alike, what)


def lost() -> None:
    ranks = Processes.current()
    if ranks.rank == 1:
        os._exit(0)  # no good-bye
    began = time.monotonic()
    with pytest.raises(RankLost, match="another rank has ended"):
        ranks.gather("still there?")
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_rank_that_has_ended_is_noticed():
    spawn(lost, ranks=2)


def half_precision() -> None:
    """Differences drown in an offset, gradients do not see it: one method falls back, one does not."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 3)).eval()
    torch.nn.init.constant_(network[-1].bias, 100.0)
    network[-1].padding = (1, 1)
    image = torch.rand(1, 1, 12, 16)
    methods, target = [Saliency(abs=False), Occlusion(window=2)], Box(0, (2, 2), (10, 14))
    inferer = SlidingWindowInferer((8, 8), 2, 0.5)
    prediction = inferer(image, network).detach()

    def maps(**how: Any) -> list[Any]:
        return list(Explainer(network, inferer, "cpu", **how)(image, methods, [target], prediction=prediction))

    together, full = maps(amp=True, distributed=True), maps()
    decided = [(a.record["amp_correlation"], a.record["amp_fallback"]) for a in together]
    assert Processes.current().gather(decided) == [decided] * 2
    assert [why is None for _, why in decided] == [True, False]
    for a, b, (_, why) in zip(together, full, decided):
        gap = float((a.map - b.map).abs().max())
        if why:  # scores of float32, to 1e-6 of F
            assert gap <= 1e-6 * abs(b.record["value"]), gap
        else:
            assert 1e-5 < gap / float(b.map.abs().max()) < 0.05, gap


@pytest.mark.slow
def test_ranks_decide_alike_how_precisely():
    spawn(half_precision, ranks=2)


def one_box(m: int) -> None:
    """More ranks than windows, and perturbations that share windows."""
    ranks = Processes.current()
    result = setting("DenseNet121").objective
    assert len(result.windows) == 1
    boxes = Boxes([[i, i] for i in range(m)], [[i + 4, i + 4] for i in range(m)])
    with frozen(result.model.network):
        actual, expected = score_changes(by(result, Processes()), boxes), score_changes(by(result, ranks), boxes)
    assert bool(actual.any())
    assert float((actual - expected).abs().max() / actual.abs().max()) <= 1e-10


@pytest.mark.slow
def test_more_ranks_than_windows():
    spawn(one_box, 5)


def test_shares_are_whole_and_as_even_as_can_be():
    for n in range(12):
        parts = [Processes(r, 5).share(range(n)) for r in range(5)]
        assert [i for part in parts for i in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for turn in range(6):
            assert sorted(i for r in range(5) for i in Processes(r, 5).share(range(n), turn)) == list(range(n))
        over_all = [sum(len(Processes(r, 5).share(range(n), turn)) for turn in range(5)) for r in range(5)]
        assert over_all == [n] * 5


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    tensor = torch.ones(2)
    with ranks.summed([tensor]):
        tensor += 1
    assert tensor.tolist() == [2, 2]
    assert ranks.gather("x") == ["x"]


def test_processes_that_were_not_joined_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="init_process_group"):
        Processes.current()


def costs_alike() -> None:
    """Processes that compute together estimate costs without waiting for each other, and count the same passes."""
    torch.manual_seed(0)  # the same network and image in every process
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 1))
    image, inferer = torch.rand(1, 1, 16, 24), SlidingWindowInferer((8, 8), 2, 0.5)
    methods = [Saliency(), IntegratedGradients("zero", n_steps=3), Occlusion(4, baseline=0.0)]
    for cost in Explainer(network, inferer, distributed=True).costs(image, methods, [MultiClassMask(1)]):
        everywhere = Processes.current().gather((cost.method, cost.passes, cost.exact, cost.note))
        assert everywhere == [(cost.method, cost.passes, True, None)] * 2
        assert cost.seconds is not None


@pytest.mark.slow
def test_processes_estimate_costs_together() -> None:
    spawn(costs_alike, ranks=2)
