"""How a network is called, and that it leaves as it came."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from esegeta_monai.engine.network.hooks import capture, find_layer, replaced
from esegeta_monai.engine.network.model import Model, check_network, is_scripted, select_output
from esegeta_monai.engine.network.state import frozen, own_modes, unwrap
from esegeta_monai.engine.rules import lrp
from esegeta_monai.errors import NetworkError, UsageError


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))


def state(network: nn.Module):
    return (
        [m.training for m in network.modules()],
        [p.requires_grad for p in network.parameters()],
        [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        {k: v.clone() for k, v in network.state_dict().items()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()],
    )


def same(a, b) -> bool:
    return (
        a[0] == b[0]
        and a[1] == b[1]
        and all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a[2], b[2]))
        and all(torch.equal(a[3][k], b[3][k]) for k in a[3])
        and a[4] == b[4]
    )


@pytest.mark.parametrize("fail", [False, True])
def test_frozen_puts_everything_back(fail):
    network = small()
    network[0].bias.requires_grad_(False)
    network[1].eval()
    network(torch.rand(2, 1, 6, 6)).sum().backward()
    before = state(network)
    try:
        with frozen(network):
            assert not any(m.training for m in network.modules())
            assert not any(p.requires_grad for p in network.parameters())
            network.train()
            network[0].weight.requires_grad_(True)
            network[0].weight.grad = None
            if fail:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fail
    assert same(state(network), before)
    assert network.training
    assert not network[1].training


def test_frozen_puts_back_buffers_that_the_network_writes_itself():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen = self.seen + 1
            return x * self.calls

    network = Counts()
    seen = network.seen
    with frozen(network):
        network(torch.rand(2))
    assert float(network.calls) == 0
    assert network.seen is seen
    assert float(seen.sum()) == 0


def test_frozen_sets_backward_hooks_aside():
    """They may change gradients, which would not be those of F then, and rules cannot see through what they insert."""
    network, x = small().eval(), torch.rand(1, 1, 6, 6)
    called = []
    network[3].register_full_backward_hook(lambda module, above, below: called.append(module))
    network.register_full_backward_pre_hook(lambda module, above: called.append(module))
    with frozen(network):
        torch.autograd.grad(network(x.requires_grad_()).sum(), x)
        assert not called
        lrp(network, x.detach(), torch.ones(1, 1, 2, 4, 4))
    torch.autograd.grad(network(x).sum(), x)
    assert len(called) == 2


def test_a_network_that_cannot_take_its_input_is_named():
    model = Model(small().eval(), torch.device("cpu"))
    with pytest.raises(NetworkError, match=r"fails on input of shape \(1, 2, 6, 6\): Given groups=1.*; give it the ch"):
        model(torch.rand(1, 2, 6, 6))

    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("as it is")

    with pytest.raises(torch.OutOfMemoryError, match="as it is"):
        Model(Full(), torch.device("cpu"))(torch.rand(1, 2, 6, 6))


def test_capture_records_what_the_layer_gave_before_an_inplace_change():
    network = small().eval()
    x = torch.rand(1, 1, 6, 6)
    with capture(network, ["1", "2"]) as captured:
        out = network(x)
    assert float(captured["1"].detach().min()) < 0
    assert torch.equal(captured["2"], captured["1"].relu())
    assert torch.equal(out, network(x))
    assert captured.calls == {"1": 1, "2": 1}
    assert not any(m._forward_hooks for m in network.modules())


def test_a_layer_that_hands_its_input_on_has_a_gradient_of_its_own():
    """Not that of the input's other uses: a skip connection through an identity beside a branch."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pad, self.branch = nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stem(x)
            return self.pad(h) + self.branch(h)

    network, x = Skip(), torch.rand(1, 3)
    with capture(network, ["pad", "stem"]) as captured:
        out = network(x)
    pad, stem = torch.autograd.grad(out.sum(), [captured["pad"], captured["stem"]])
    assert torch.equal(pad, torch.ones(1, 3))
    assert torch.allclose(stem, 1 + network.branch.weight.sum(0, keepdim=True))
    relevance = lrp(
        network.double(), x.double(), torch.ones(1, 1, 3, dtype=torch.float64), "LRP0", layers={"pad": network.pad}
    )
    assert torch.allclose(relevance.layers["pad"].gradient, torch.ones(1, 1, 3, dtype=torch.float64))


def test_capture_removes_its_hooks_after_an_error():
    network = small()
    with pytest.raises(ZeroDivisionError), capture(network, ["0"]):
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="near matches"), capture(network, ["0", "nope"]):
        pass
    assert not any(m._forward_hooks for m in network.modules())


def test_capture_counts_calls_and_keeps_the_last():
    act = nn.Tanh()
    network = nn.Sequential(act, nn.Linear(3, 3), act)
    x = torch.rand(2, 3)
    with capture(network, ["0"]) as captured:
        out = network(x)
    assert captured.calls["0"] == 2
    assert torch.equal(captured["0"], out)


def test_capture_of_a_layer_without_a_tensor_is_refused():
    class Dict(nn.Module):
        def forward(self, x):
            return {"x": x}

    network = nn.Sequential(Dict())
    with pytest.raises(NetworkError, match="not a tensor"), capture(network, ["0"]):
        network(torch.rand(1))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize("kind", [Pair, lambda *items: list(items), lambda *items: items])
def test_of_several_outputs_the_first_is_recorded_and_all_go_on(kind):
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return kind(x * 2, x * 3)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pair = self.two(x)
            return pair[0] + (pair.second if isinstance(pair, Pair) else pair[1])

    network, x = Sum(), torch.rand(2, 3, dtype=torch.float64)
    with capture(network, ["two"]) as captured:
        assert torch.allclose(network(x), 5 * x)
    assert torch.equal(captured["two"], 2 * x)
    with replaced(network, "two", torch.zeros_like):
        assert torch.equal(network(x), 3 * x)
    layer = lrp(network, x, torch.ones(1, 2, 3, dtype=torch.float64), layers={"two": network.two}).layers["two"]
    assert torch.allclose(layer.relevance, 2 * x[None])


def test_a_layer_whose_rows_are_not_the_windows_is_refused():
    """Its rows would be taken for windows: attention inside parts of a window, tokens in front of the batch."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(-1, 1, 4)).reshape(x.shape)

    network, x = Parts().double(), torch.rand(2, 4, 4, dtype=torch.float64)
    with pytest.raises(NetworkError, match=r"'inner' gives \(8, 1, 4\) for 2 window"), capture(network, ["inner"]):
        network(x)
    with pytest.raises(NetworkError, match="first axis is not the windows"), replaced(network, "inner", lambda v: v):
        network(x)
    with pytest.raises(NetworkError, match="first axis is not the windows"):
        lrp(network, x, torch.ones(1, 2, 4, 4, dtype=torch.float64), layers={"inner": network.inner})
    with capture(network, ["inner"], of_windows=False) as captured:
        network(x)
    assert captured["inner"].shape == (8, 1, 4)
    assert not network._forward_pre_hooks


def test_find_layer_lists_near_matches():
    network = nn.ModuleDict({"encoder1": nn.Conv2d(1, 1, 1), "decoder1": nn.Conv2d(1, 1, 1)})
    assert find_layer(network, "encoder1") is network["encoder1"]
    with pytest.raises(UsageError, match="near matches: encoder1"):
        find_layer(network, "encoder")


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
    ],
)
def test_select_output(output, key, expected):
    assert torch.equal(select_output(output, key), expected)


@pytest.mark.parametrize(
    ("output", "key", "message"),
    [
        (A, 1, "single tensor"),
        ({"a": A, "b": B}, None, r"\['a', 'b'\]"),
        ({"a": A}, "z", r"\['a'\]"),
        ((A, B), 2, "2 outputs"),
        ((A, B), "x", "2 outputs"),
        ("text", None, "str"),
        (None, None, "NoneType"),
    ],
)
def test_select_output_says_what_there_is(output, key, message):
    with pytest.raises(NetworkError, match=message):
        select_output(output, key)


def test_half_precision_weights_are_refused_by_name():
    check_network(small())
    with pytest.raises(NetworkError, match=r"network\.float\(\)"):
        check_network(small().half())


def test_unwrap_and_scripted():
    network = small()
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
    network = small()
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


class Skipping(nn.Module):
    """Two layers one behind the other and a way round both; a module that hands out a buffer."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.ones(1, 2, 8, 8, dtype=torch.float64))

        def forward(self, x):
            return self.value.expand(len(x), -1, -1, -1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.first, self.second = (nn.Conv2d(n, 2, 3, padding=1) for n in (1, 2, 2))
        self.constant = self.Constant()

    def forward(self, x):
        x = self.front(x)
        return torch.tanh(self.second(torch.tanh(self.first(x)))) * x * self.constant(x)


def test_a_graph_that_begins_at_the_layers_has_their_gradients_and_nothing_in_front():
    network, x = Skipping().double().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    layers, gradients = ["first", "second", "constant"], {}
    with frozen(network):
        for leaves in (True, False):
            with capture(network, [*layers, "front"][: 3 if leaves else 4], leaves=leaves) as captured:
                out = network(x if leaves else x.clone().requires_grad_())
            chosen = layers if leaves else layers[:2]  # the buffer is on no path from the image
            gradients[leaves] = torch.autograd.grad(out.sin().sum(), [captured[name] for name in chosen])
        assert captured["front"].requires_grad
        with capture(network, ["first"], leaves=True) as captured:
            outputs = []
            handle = network.front.register_forward_hook(lambda m, a, out: outputs.append(out))
            network(x)
            handle.remove()
        assert not outputs[0].requires_grad
        assert not network.constant.value.requires_grad
    for begun, whole in zip(gradients[True], gradients[False]):
        assert torch.equal(begun, whole)
