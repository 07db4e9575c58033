"""Maps of attention against dense matrices over all tokens, built token by token from hooks on MONAI's blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR, SwinUNETR, ViT
from monai.networks.nets.swin_unetr import BasicLayer, PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.attention import _window_tokens
from esegeta_monai.engine.layer_maps import spread
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import AttentionRelevance, AttentionRollout, LeGrad
from esegeta_monai.targets import ClassScore, OutputValue
from tests.support.networks import CONV, plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close

METHODS = [AttentionRollout, AttentionRelevance, LeGrad]


class Classifier(nn.Module):
    """A ViT that reads its class token, with patches of different sides."""

    def __init__(self, flash: bool = False, cls: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"hidden_size": 8, "mlp_dim": 16, "num_layers": 3, "num_heads": 2}
        self.vit = ViT(
            1, (8, 12), (2, 4), spatial_dims=2, classification=cls, num_classes=3, post_activation="none", **options
        )
        for block in self.vit.blocks:
            block.attn.use_flash_attention = flash
        self.cls, self.head = cls, nn.Linear(8, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)[0] if self.cls else self.head(self.vit(x)[0].mean(1))


def attention_of(network: nn.Module, run: Callable[[], Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Attention matrices of all blocks of a ViT, their gradients, and the tokens' weights, for the score of ``run``."""
    kept: list[Tensor] = []
    last: list[Tensor] = []
    handles = []
    for block in network.blocks:
        block.attn.use_flash_attention = False
        handles.append(
            block.attn.drop_weights.register_forward_hook(lambda m, i, o: kept.append(o.clone()) or kept[-1])
        )
    handles.append(network.blocks[-1].register_forward_hook(lambda m, i, o: last.append(o.clone()) or last[-1]))
    score = run()
    for handle in handles:
        handle.remove()
    *gradients, g = torch.autograd.grad(score, [*kept, *last])
    return [k.detach() for k in kept], gradients, (last[0].detach() * g).abs().sum(-1)[0]


def dense(kind: type, matrices: list[Tensor], gradients: list[Tensor], start: Tensor) -> Tensor:
    """The definitions with square matrices over all tokens, head averages (T, T)."""
    tokens = len(start)
    if kind is LeGrad:
        return sum(g.clamp(min=0).mean(0).mean(0) for g in gradients)
    product = torch.eye(tokens, dtype=start.dtype)
    for a, g in zip(matrices, gradients):
        if kind is AttentionRollout:
            step = (torch.eye(tokens, dtype=start.dtype) + a.mean(0)) / 2
            product = step @ product
        else:
            product = product + (a * g).clamp(min=0).mean(0) @ product
    return start / start.sum() @ product


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("flash", "cls"), [(False, True), (True, True), (False, False)])
def test_a_vit_equals_dense_matrices(kind, flash, cls):
    network = Classifier(flash, cls).double().eval()
    image = torch.randn(1, 1, 8, 12, dtype=torch.float64)
    o = objective_of(network, image[0], [ClassScore(0), ClassScore(2)])
    explained = explain(kind(), o)
    assert all(b.attn.use_flash_attention is flash for b in network.vit.blocks)
    for k, target in enumerate((0, 2)):
        matrices, gradients, start = attention_of(network.vit, lambda target=target: network(image)[0, target])
        expected = dense(kind, [m[0] for m in matrices], [g[0] for g in gradients], start)
        if cls and kind is not LeGrad:
            assert float(start[1:].max()) == 0  # only the class token is read
        grid = expected[-12:].reshape(4, 3) if not cls else expected[1:].reshape(4, 3)
        cells = explained.maps[k, 0]
        assert float(cells.sum() - grid.sum()) == pytest.approx(0, abs=1e-10 * float(grid.sum()))
        close(cells[None, None], spread(grid[None, None], o.plan))
    assert explained.notes["blocks"] == 3


class Stages(nn.Module):
    """Two stages of a Swin transformer on 4 tokens along each axis, with shifted windows and patch merging."""

    def __init__(self, dims: int, window: int = 2, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(dims)
        options = {"num_heads": 2, "drop_path": [0.0] * depth, "mlp_ratio": 2.0, "qkv_bias": True}
        self.embed = CONV[dims](1, 4, 2, stride=2)
        sizes = [window] * dims
        self.lower = BasicLayer(4, depth, window_size=sizes, downsample=PatchMerging, **options)
        self.upper = BasicLayer(8, depth, window_size=sizes, downsample=None, **options)
        self.head = nn.Linear(8, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upper(self.lower(self.embed(x))).flatten(2).mean(2))


def block_matrix(block: SwinTransformerBlock, matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """One square matrix over all tokens of a Swin block, token pair by token pair, from the attention of its windows.

    Args:
        matrix: (windows, N, N), mean over heads.
    """
    shift = [0 if g <= w else s for g, w, s in zip(grid, block.window_size, block.shift_size)]
    window = [min(g, w) for g, w in zip(grid, block.window_size)]
    tokens = list(itertools.product(*map(range, grid)))
    whole = torch.zeros(len(tokens), len(tokens), dtype=matrix.dtype)

    def place(token: tuple[int, ...]) -> tuple[int, int]:
        moved = [(t - s) % g for t, s, g in zip(token, shift, grid)]
        of_window = within = 0
        for m, g, w in zip(moved, grid, window):
            of_window, within = of_window * (g // w) + m // w, within * w + m % w
        return of_window, within

    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            (a, p), (b, q) = place(query), place(key)
            if a == b:
                whole[i, j] = matrix[a, p, q]
    return whole


def swin_dense(kind: type, network: Stages, image: Tensor, target: int) -> Tensor:
    """The definitions with square matrices over all tokens of each stage, and the mean as patch merging."""
    dims = image.ndim - 2
    blocks = [*network.lower.blocks, *network.upper.blocks]
    kept: list[Tensor] = []
    last: list[Tensor] = []
    handles = [
        b.attn.attn_drop.register_forward_hook(lambda m, i, o: kept.append(o.clone()) or kept[-1]) for b in blocks
    ]
    handles.append(blocks[-1].register_forward_hook(lambda m, i, o: last.append(o.clone()) or last[-1]))
    score = network(image)[0, target]
    for handle in handles:
        handle.remove()
    *gradients, g = torch.autograd.grad(score, [*kept, *last])
    start = (last[0].detach() * g).abs().sum(-1).flatten()
    grids = [(4,) * dims] * len(network.lower.blocks) + [(2,) * dims] * len(network.upper.blocks)
    mean = torch.zeros(2**dims, 4**dims, dtype=image.dtype)  # each merged token is the mean of 2 per axis
    for j, token in enumerate(itertools.product(range(4), repeat=dims)):
        parent = 0
        for t in token:
            parent = 2 * parent + t // 2
        mean[parent, j] = 1 / 2**dims
    masked = [float(m.detach().min()) for m in kept]
    assert min(masked) < 1e-30  # pairs of tokens that the shift brings together are masked
    if kind is LeGrad:
        parts = [
            block_matrix(b, x.clamp(min=0).mean(1), grid).sum(0) / x.shape[-1]
            for b, x, grid in zip(blocks, gradients, grids)
        ]
        half = len(network.lower.blocks)
        return sum(parts[:half]) + sum(parts[half:]) @ mean
    row = start / start.sum()
    for number in reversed(range(len(blocks))):
        b, a, x, grid = blocks[number], kept[number].detach(), gradients[number], grids[number]
        if kind is AttentionRollout:
            row = (row + row @ block_matrix(b, a.mean(1), grid)) / 2
        else:
            row = row + row @ block_matrix(b, (a * x).clamp(min=0).mean(1), grid)
        if number == len(network.lower.blocks):
            row = row @ mean
    return row


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_swin_windows_equal_dense_matrices(kind, dims):
    network = Stages(dims).double().eval()
    image = torch.randn(1, 1, *[8] * dims, dtype=torch.float64)
    o = objective_of(network, image[0], [ClassScore(1)])
    expected = swin_dense(kind, network, image, 1).reshape(1, 1, *[4] * dims)
    close(explain(kind(), o).maps, spread(expected.detach(), o.plan))


def test_a_swin_block_of_one_window_is_a_vit():
    """All tokens in one window, in order, without a shift: the block mixes as one of a ViT."""
    block = Stages(3, window=4).lower.blocks[1]
    assert torch.equal(_window_tokens(block, (4, 4, 4)), torch.arange(64)[None])
    assert any(block.shift_size)  # it shifts only where there are several windows
    padded = _window_tokens(Stages(2, window=3).lower.blocks[0], (4, 4))
    assert padded.shape == (4, 9)
    assert sorted(padded[padded >= 0].tolist()) == list(range(16))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("network", "roi"),
    [
        (lambda: UNETR(1, 3, (32, 32), 4, 8, 16, 2, spatial_dims=2), 32),
        (
            lambda: SwinUNETR(1, 3, feature_size=12, spatial_dims=2, depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4)),
            64,
        ),
    ],
    ids=["UNETR", "SwinUNETR"],
)
def test_a_segmentation_network_through_windows(kind, network, roi):
    """The maps of two windows add up; the start is shared by all windows."""
    torch.manual_seed(0)
    net = network().double().eval()
    image = torch.randn(1, roi, roi * 3 // 2, dtype=torch.float64)
    o = objective_of(net, image, [OutputValue(1)], SlidingWindowInferer((roi, roi), 2, 0.5))
    assert len(o.windows) == 2
    together = explain(kind(), o)
    alone = [explain(kind(), _window(o, w)) for w in o.windows]
    shares = torch.tensor([float(a.notes["start"][0]) for a in alone])
    shares = torch.ones(2) if kind is LeGrad else shares / shares.sum()
    close(together.maps, sum(s * a.maps for s, a in zip(shares, alone)), 1e-6)
    assert float(together.maps.min()) >= 0
    assert together.maps[0, 0].std() > 0


def _window(o, w):
    """The objective with one window only, the blending weights kept."""
    other = o.derive()
    vars(other)["score_windows"] = [[w]]
    vars(other)["windows"] = [w]
    return other


def test_errors_name_the_way_out():
    network, image = plain(2)
    o = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(MethodError, match="no self-attention block"):
        explain(AttentionRollout(), o)
    explainer = Explainer(Classifier().eval())
    (attribution,) = explainer(torch.rand(1, 1, 8, 12), ["AttentionRelevance"], [ClassScore(1)])
    assert attribution.map is not None
    assert attribution.record["layer"] == "vit.blocks.0"
    assert attribution.record["part"] == "attention only"
