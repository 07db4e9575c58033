"""The private names of MONAI, ignite and torch that the package reads exist and mean what it takes them for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.inferers import SlidingWindowSplitter
from monai.transforms import Lambdad
from torch import nn
from torch.utils.checkpoint import checkpoint

from esegeta_monai.utils import upstream


@contextmanager
def of(package: str) -> Iterator[None]:
    """Name the installed version of a package where one of its private names has changed."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{package} {version(package)} changed a private name: {type(error).__name__}: {error}")


def test_a_changed_name_is_reported_with_the_version():
    message = rf"^torch {version('torch').split('+')[0]}.*no attribute '_gone'"
    with pytest.raises(pytest.fail.Exception, match=message), of("torch"):
        _ = torch.zeros(1)._gone


def test_write_count_grows_with_each_write_in_place():
    with of("torch"):
        tensor = torch.zeros(2)
        before = upstream.write_count(tensor)
        tensor[:1].add_(1)
        assert upstream.write_count(tensor) == before + 1


def test_views_and_their_base():
    with of("torch"):
        tensor = torch.zeros(2, 2)
        assert upstream.is_view(tensor[0])
        assert not upstream.is_view(tensor)
        assert upstream.view_base(tensor[0]) is tensor
        assert upstream.view_base(tensor) is None


def test_operations_that_a_mode_sees():
    seen = []

    class Mode(upstream.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(upstream.operation_schema(func))
            return func(*args, **(kwargs or {}))

    with of("torch"), Mode():
        torch.zeros(2).add_(1)
    assert [(name, arguments[0], writes) for name, arguments, writes in seen[-1:]] == [("aten::add_", "self", True)]


def test_the_module_inside_a_compiled_one():
    with of("torch"):
        module = nn.Linear(1, 1)
        assert upstream.compiled_original(torch.compile(module, backend="eager")) is module
        assert upstream.compiled_original(module) is None


def test_transforms_and_the_tensors_inside_them():
    x = torch.zeros(2, 1)
    seen = []

    def note(y):
        seen.append((upstream.active_transform(), upstream.transformed_value(y) is x))
        return y.sum()

    with of("torch"):
        note(x)
        torch.func.vmap(note)(x)
        torch.func.vmap(torch.func.grad(note))(x)
    assert seen == [(None, True), ("vmap", True), ("grad", True)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_switched_off(reentrant):
    runs = []

    def noted(x):
        runs.append(torch.is_grad_enabled())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    with of("torch"), upstream.without_checkpoints(), upstream.non_reentrant_checkpoints():
        torch.autograd.grad(checkpoint(noted, x, use_reentrant=reentrant).sum(), x)
    assert runs == [True]


def test_reentrant_checkpoints_run_as_the_other_kind():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        torch.autograd.grad(checkpoint(torch.exp, x, use_reentrant=True).sum(), x)
    runs = []

    def noted(x):
        runs.append(None)
        return x.exp()

    with of("torch"), upstream.non_reentrant_checkpoints():
        y = checkpoint(noted, x, use_reentrant=True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, x.exp())
    assert len(runs) == 2  # activations are computed again, not stored


def test_a_deleted_buffer_is_put_back():
    with of("torch"):
        module = nn.BatchNorm1d(2)
        buffers = dict(upstream.own_buffers(module))
        assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
        del module.running_mean
        upstream.own_buffers(module)["running_mean"] = buffers["running_mean"]
        assert module.state_dict()["running_mean"].equal(torch.zeros(2))


def test_backward_hooks_are_taken_off_and_put_back():
    with of("torch"):
        module, calls = nn.Linear(1, 1), []
        module.register_full_backward_hook(lambda *_: calls.append("hook"))
        module.register_full_backward_pre_hook(lambda *_: calls.append("pre-hook"))
        hooks = upstream.backward_hooks(module)
        assert [attribute for _, attribute, _ in hooks] == ["_backward_hooks", "_backward_pre_hooks"]
        for owner, attribute, _ in hooks:
            setattr(owner, attribute, OrderedDict())
        module(torch.ones(1, 1, requires_grad=True)).backward()
        assert calls == []
        for owner, attribute, own in hooks:
            setattr(owner, attribute, own)
        module(torch.ones(1, 1, requires_grad=True)).backward()
        assert calls == ["pre-hook", "hook"]


def test_scan_interval():
    with of("monai"):
        assert upstream.scan_interval((10, 8), (4, 8), (0.5, 0.5)) == (2, 8)


def test_patches_of_a_splitter():
    with of("monai"):
        splitter = SlidingWindowSplitter((4, 0), overlap=0.5, offset=(-1, 0), pad_mode="constant")
        patch, overlap, offset = upstream.splitter_parameters(splitter, (6, 5))
        assert (patch, overlap, offset) == ((4, 0), (0.5, 0.0), (-1, 0))
        assert upstream.splitter_padding(splitter, (6, 5), (4, 5), offset, overlap) == [(1, 1), (0, 0)]


def test_handlers_of_an_engine():
    with of("pytorch-ignite"):
        engine = Engine(lambda engine, batch: None)
        first, second = (lambda engine: None), (lambda engine: None)
        for handler in (first, second):
            engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
        assert upstream.attached_handlers(engine, Events.EPOCH_COMPLETED) == [first, second]
        assert upstream.attached_handlers(engine, Events.STARTED) == []


def test_postprocessing_of_an_engine():
    with of("monai"):
        transform = Lambdad("pred", lambda x: x)
        engine = SupervisedEvaluator(
            torch.device("cpu"), DataLoader(Dataset([])), nn.Identity(), postprocessing=transform
        )
        handlers = upstream.attached_handlers(engine, IterationEvents.MODEL_COMPLETED)
        assert transform in [upstream.postprocessing_of(handler) for handler in handlers]
        assert upstream.postprocessing_of(print) is None
