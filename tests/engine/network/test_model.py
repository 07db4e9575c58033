"""How a network is called, its outputs, inputs and precision."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from esegeta_monai.engine.network.model import Model, check_network, is_scripted, select_output
from esegeta_monai.engine.network.state import frozen, own_modes, unwrap
from esegeta_monai.errors import NetworkError
from tests.support.networks import Computed, conv_norm_relu


def test_a_network_that_cannot_take_its_input_is_named():
    model = Model(conv_norm_relu().eval(), torch.device("cpu"))
    with pytest.raises(NetworkError, match=r"fails on input of shape \(1, 2, 6, 6\): Given groups=1.*; give it the ch"):
        model(torch.rand(1, 2, 6, 6))

    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("as it is")

    with pytest.raises(torch.OutOfMemoryError, match="as it is"):
        Model(Computed(full), torch.device("cpu"))(torch.rand(1, 2, 6, 6))


A, B = torch.zeros(1, 2), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("output", "key", "expected"),
    [
        (A, None, A),
        (A, 0, A),
        ((A, B), None, A),
        ([A, B], 1, B),
        ((A, B), -1, B),
        (([A], B), None, A),
        ({"x": A}, None, A),
        ({"aux": A, "pred": B}, None, B),
        ({"out": A, "logits": B}, None, B),
        ({"a": A, "b": B}, "b", B),
        ({"classes": [A, B]}, "classes.1", B),
        ({"classes": [A, B]}, ("classes", 1), B),
        ({"a.1": A, "b": B}, "a.1", A),
        (((A, B), A), "0.1", B),
    ],
)
def test_select_output(output, key, expected):
    assert torch.equal(select_output(output, key), expected)


@pytest.mark.parametrize(
    ("output", "key", "message"),
    [
        (A, 1, "single tensor"),
        ({"a": A, "b": B}, None, r"a \(1, 2\), b \(1, 3\): choose one with output=KEY"),
        ({"a": A}, "z", r"'z' is none of .* a \(1, 2\)"),
        ((A, B), 2, r"0 \(1, 2\), 1 \(1, 3\)"),
        ((A, B), "x", r"0 \(1, 2\), 1 \(1, 3\)"),
        ({"classes": [A, B], "boxes": [B, B]}, None, r"classes\.0 \(1, 2\), classes\.1 \(1, 3\), boxes\.0"),
        ({"classes": [A, B]}, "classes", r"classes\.0 \(1, 2\)"),
        ({"classes": [A, B]}, "classes.2", r"classes\.1 \(1, 3\)"),
        ("text", None, "str"),
        (None, None, "NoneType"),
    ],
)
def test_select_output_lists_the_available_outputs(output, key, message):
    with pytest.raises(NetworkError, match=message):
        select_output(output, key)


def test_half_precision_weights_are_refused_by_name():
    check_network(conv_norm_relu())
    with pytest.raises(NetworkError, match=r"network\.float\(\)"):
        check_network(conv_norm_relu().half())


def test_unwrap_and_scripted():
    network = conv_norm_relu()
    assert unwrap(nn.DataParallel(network)) is network
    assert not is_scripted(network)
    assert is_scripted(torch.jit.trace(network.eval(), torch.rand(1, 1, 6, 6)))


class Recorder(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return args[0] * self.weight


def test_several_image_inputs_and_further_arguments_are_passed():
    network = Recorder()
    model = Model(network, torch.device("cpu"), inputs={"image": 2, "prior": 1}, args=("extra",), kwargs={"flag": True})
    x = torch.rand(1, 3, 4, 4)
    model(x, coordinates="here", condition=A)
    assert torch.equal(network.args[0], x[:, :2])
    assert network.args[1:] == ("here", "extra")
    assert torch.equal(network.kwargs["prior"], x[:, 2:])
    assert network.kwargs["flag"] is True
    assert network.kwargs["condition"] is A


def test_the_slice_axis_is_taken_out_and_put_back():
    network = Recorder()
    x = torch.rand(1, 1, 4, 1, 5)
    out = Model(network, torch.device("cpu"))(x, slice_axis=1)
    assert network.args[0].shape == (1, 1, 4, 5)
    assert torch.equal(out, x)


def test_autocast_gives_float32():
    network = nn.Conv2d(1, 1, 3)
    model = Model(network, torch.device("cpu"), amp=True)
    x = torch.rand(1, 1, 8, 8)
    assert model.autocast_dtype == torch.bfloat16
    assert model(x).dtype == torch.float32
    assert not torch.equal(model(x), network(x))
    assert Model(network, torch.device("cpu")).autocast_dtype is None
    half = Model(network, torch.device("cpu"), amp=True, amp_kwargs={"dtype": torch.float16})
    assert half.autocast_dtype == torch.float16


def test_autocast_keeps_no_window_after_its_pass():
    """torch's cache holds a half-precision copy of each leaf with a gradient until the outermost autocast ends."""
    network = conv_norm_relu()
    with own_modes("cpu"), frozen(network):
        model = Model(network, torch.device("cpu"), amp=True)
        x = torch.rand(1, 1, 8, 8, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
        seen = weakref.ref(x)
        del x
        gc.collect()
        assert seen() is None


BACKENDS: Any = torch.backends


def precisions() -> list[Any]:
    def read(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except RuntimeError:
            return "set by operation"

    places = [BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul] if hasattr(BACKENDS.cudnn, "conv") else []
    old = [lambda: BACKENDS.cudnn.allow_tf32, lambda: BACKENDS.cuda.matmul.allow_tf32]
    return [*map(read, [*old, torch.get_float32_matmul_precision]), *(p.fp32_precision for p in places)]


def by_operation(place: str, value: str) -> Callable[[], None]:
    def call() -> None:
        owner = BACKENDS
        for name in place.split("."):
            owner = getattr(owner, name)
        owner.fp32_precision = value

    return call


OLD = {
    "as torch comes": lambda: None,
    "matmul high": lambda: torch.set_float32_matmul_precision("high"),
    "no TF32": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "TF32 in matmul": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
}


NEW = {"conv": by_operation("cudnn.conv", "ieee"), "matmul": by_operation("cuda.matmul", "tf32")}


@pytest.mark.parametrize("setting", OLD)
def test_float32_is_float32_and_settings_are_put_back(setting):
    cudnn, matmul = BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    OLD[setting]()
    try:
        check_settings()
    finally:
        BACKENDS.cudnn.allow_tf32 = cudnn
        torch.set_float32_matmul_precision(matmul)


@pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="this torch has no settings by operation")
@pytest.mark.parametrize("setting", NEW)
def test_settings_by_operation_are_put_back_too(setting):
    """In a process of its own: torch has no way back from them to the older ones."""
    worker = torch.multiprocessing.get_context("spawn").Process(target=_after, args=(setting,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def _after(setting: str) -> None:
    NEW[setting]()
    check_settings()


def check_settings() -> None:
    before = precisions()
    with pytest.raises(ZeroDivisionError), own_modes("cpu"):
        _ = 1 / 0
    assert precisions() == before
    with own_modes("cpu"):
        cudnn, _, _, *operations = precisions()
    assert cudnn in (False, "set by operation")
    assert set(operations) <= {"ieee"}
    assert operations or cudnn is False


def test_settings_that_a_network_changes_are_restored_and_named() -> None:
    class Disturbing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = 2 * x
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(not torch.is_grad_enabled())
            torch.manual_seed(7)
            os.chdir("/")
            return y

    folder = os.getcwd()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = Model(Disturbing(), torch.device("cpu"))
    with torch.no_grad():
        model(torch.ones(1, 1, 4))
        assert not torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.rand(2), expected)
    words = ["the seed of torch's random numbers (to 7)", "the working folder"]
    words += ["torch's default dtype (to torch.float64)", "torch's grad mode (on)"]
    assert sorted(model.disturbs) == words
    assert os.getcwd() == folder
