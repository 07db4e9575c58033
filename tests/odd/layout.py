"""Layers whose output has its axes in another order, or tokens. The twins pass the same values on as maps, through a
layer called ``seen``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.odd.base import OddCase, Seen, conv, image, logit, seeded, volume


class Block(nn.Module):
    """Norm and two linear layers over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Laid(nn.Module):
    """A stem, a block on features in some layout, and a head that reads all positions.

    Args:
        dims: 2 or 3.
        patch: of the stem.
        grid: positions of the features.
        width: channels.
        lay: from a map (n, C, *grid) to the layout.
        unlay: back.
        block: on features in that layout; None: `Block`.
    """

    def __init__(
        self,
        dims: int,
        patch: tuple[int, ...],
        grid: tuple[int, ...],
        width: int,
        lay: Callable[[Tensor], Tensor],
        unlay: Callable[[Tensor], Tensor],
        block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.seen: nn.Module | None = None
        self.stem = conv(dims, 1, width, patch, patch)
        self.block = block or Block(width)
        self.head = nn.Linear(width * math.prod(grid), 3)
        self.lay, self.unlay = lay, unlay

    def forward(self, x: Tensor) -> Tensor:
        laid = self.block(self.lay(self.stem(x)))
        if self.seen is not None:
            laid = self.pass_on(laid)
        return self.head(self.unlay(laid).flatten(1))

    def pass_on(self, laid: Tensor) -> Tensor:
        """Pass a layout through a layer that sees it as a map."""
        assert self.seen is not None
        return self.lay(self.seen(self.unlay(laid)))


def with_seen(odd: nn.Module) -> nn.Module:
    stem = next(m for m in odd.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    odd.seen = Seen(len(stem.kernel_size), stem.out_channels)
    return odd


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def case(name: str, make: Callable[[], nn.Module], x: Tensor, layer: str = "block") -> OddCase:
    return OddCase(
        name,
        "layout",
        lambda: seeded(make),
        x,
        logit(),
        twin=with_seen,
        alike=lambda odd: odd,
        layer=layer,
        parts=("seen.conv",),
    )


def channels_last(dims: int, width: int) -> OddCase:
    size, edge = ((12, 12), 3) if dims == 2 else ((8, 8, 8), 4)
    grid = tuple(n // edge for n in size)
    same = ", as many channels as rows" if width == grid[0] else ""
    return case(
        f"channels last, {dims}D{same}",
        lambda: Laid(dims, (edge,) * dims, grid, width, last, first),
        volume(*size),
    )


def laid_tokens(
    name: str, size: tuple[int, ...], patch: tuple[int, ...], width: int = 6, named: bool = False
) -> OddCase:
    grid = tuple(n // p for n, p in zip(size, patch))
    return case(
        name,
        lambda: Laid(
            len(size),
            patch,
            grid,
            width,
            (lambda x: x.flatten(2)) if named else tokens,
            (lambda t: t.unflatten(2, grid)) if named else (lambda t: t.transpose(1, 2).unflatten(2, grid)),
            nn.Sequential(nn.Conv1d(width, width, 1), nn.Tanh()) if named else None,
        ),
        volume(*size),
    )


class Attention(nn.Module):
    """A transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = Block(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.mlp(x + self.attend(y, y, y, need_weights=False)[0])


class Transformer(nn.Module):
    """Patches, class and register tokens, two blocks; the head reads the class token, or the mean of the patches.

    Args:
        size, patch: of the image.
        classes: number of class tokens in front.
        registers: number of further tokens.
        behind: the further tokens follow the patches; else they are between class token and patches.
    """

    def __init__(
        self, size: tuple[int, ...], patch: tuple[int, ...], classes: int, registers: int = 0, behind: bool = True
    ) -> None:
        super().__init__()
        self.seen: nn.Module | None = None
        self.grid = tuple(n // p for n, p in zip(size, patch))
        self.stem = conv(len(size), 1, 8, patch, patch)
        self.place = nn.Parameter(torch.randn(1, math.prod(self.grid), 8))
        self.token = nn.Parameter(torch.randn(1, classes, 8))
        self.register = nn.Parameter(torch.randn(1, registers, 8))
        self.blocks = nn.ModuleList([Attention(8), Attention(8)])
        self.head = nn.Linear(8, 3)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        n, t = len(x), tokens(self.stem(x)) + self.place
        token, register = self.token.expand(n, -1, -1), self.register.expand(n, -1, -1)
        t = torch.cat([token, t, register] if self.behind else [token, register, t], 1)
        t = self.blocks[0](t)
        front = self.token.shape[1] + (0 if self.behind else self.register.shape[1])
        if self.seen is not None:
            end = front + self.place.shape[1]
            seen = self.seen(t[:, front:end].transpose(1, 2).unflatten(2, self.grid))
            t = torch.cat([t[:, :front], tokens(seen), t[:, end:]], 1)
        t = self.blocks[1](t)
        return self.head(t[:, 0] if self.token.shape[1] else t.mean(1))


def transformer(name: str, size: tuple[int, ...], patch: tuple[int, ...], *args: int, behind: bool = True) -> OddCase:
    odd = case(name, lambda: Transformer(size, patch, *args, behind=behind), volume(*size), "blocks.0")
    # AblationCam: is the channel of tokens without a place set to zero too? InternalInfluence: gradients before a layer
    # norm add up to zero over the channels, so the map is rounding.
    # ConceptRelevance: does relevance of tokens without a place pass the layer?
    unclear = ("AblationCam", "InternalInfluence", "ConceptRelevance")
    return replace(odd, undefined=unclear if any(args) else ())


class Shifted(nn.Module):
    """A Swin-like block: rolls, attends within windows of 2 x 2, rolls back; channels are last.

    Args:
        shift: positions.
        flat: returns tokens (n, L, C) instead of (n, h, w, C).
    """

    def __init__(self, shift: int, flat: bool = False) -> None:
        super().__init__()
        self.attend, self.shift, self.flat = Attention(6), shift, flat

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            edge = math.isqrt(x.shape[1])
            x = x.unflatten(1, (edge, edge))
        n, h, w, c = x.shape
        x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        x = self.attend(windows).reshape(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        x = x.roll((self.shift, self.shift), (1, 2))
        return x.flatten(1, 2) if self.flat else x


class Turned(nn.Module):
    """Turns its image before it convolves it.

    Args:
        do: turns.
        undo: turns back, in the twin only, on features.
    """

    def __init__(self, do: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.seen: nn.Module | None = None
        self.enc, self.head = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU()), nn.Linear(4 * 36, 3)
        self.do, self.undo = do, undo

    def forward(self, x: Tensor) -> Tensor:
        h = self.enc(self.do(x))
        return self.head((h if self.seen is None else self.do(self.seen(self.undo(h)))).flatten(1))


def turned(name: str, do: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> OddCase:
    return case(name, lambda: Turned(do, undo), image(1, 12, 12), "enc")


CASES = [
    channels_last(2, 6),
    channels_last(3, 6),
    channels_last(2, 4),
    case("tokens of flat patches, 3D", lambda: Laid(3, (4, 4, 1), (2, 2, 8), 6, tokens,
         lambda t: t.transpose(1, 2).unflatten(2, (2, 2, 8))), volume()),
    laid_tokens("tokens of oblong patches", (12, 12), (2, 4)),
    laid_tokens("as many tokens as channels", (12, 12), (4, 4), 9),
    laid_tokens("positions flattened, channels first", (12, 12), (3, 3), 6, named=True),
    laid_tokens("positions flattened, as many channels as positions", (12, 12), (4, 4), 9, named=True),
    transformer("transformer without class token", (12, 12), (2, 4), 0),
    transformer("transformer with class token", (12, 12), (2, 4), 1),
    transformer("transformer with registers behind", (12, 12), (3, 3), 1, 3),
    transformer("transformer with registers in front", (12, 12), (3, 3), 1, 3, behind=False),
    transformer("tokens and registers make a square", (12, 12), (4, 6), 1, 2),
    transformer("transformer of flat patches, 3D", (8, 8, 8), (4, 4, 1), 1),
    case("shifted windows, channels last", lambda: Laid(2, (2, 2), (6, 6), 6, last, first, Shifted(1)),
         image(1, 12, 12)),
    case("shifted windows, tokens", lambda: Laid(2, (2, 2), (6, 6), 6, tokens,
         lambda t: t.transpose(1, 2).unflatten(2, (6, 6)), Shifted(1, flat=True)), image(1, 12, 12)),
    case("rows and columns exchanged", lambda: Laid(2, (2, 2), (6, 6), 6, lambda x: x.permute(0, 3, 2, 1),
         lambda x: x.permute(0, 3, 2, 1)), image(1, 12, 12)),
    turned("turns its image first", lambda x: x.transpose(-1, -2), lambda x: x.transpose(-1, -2)),
    turned("flips its image first", lambda x: x.flip(-1), lambda x: x.flip(-1)),
    turned("shifts its image first", lambda x: x.roll(x.shape[-1] // 3, -1), lambda x: x.roll(-(x.shape[-1] // 3), -1)),
    case("patches as channels", lambda: Laid(2, (1, 1), (6, 6), 4, lambda x: x, lambda x: x,
         nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 1), nn.Tanh())), image(1, 12, 12)),
]  # fmt: skip
