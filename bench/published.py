"""What `bench/network.py` compares with: the published GaussianSR, LIIF and a plain EDSR.

`Published` computes what the published GaussianSR code computes, in the way in which it computes
it: tensors of [windows x 49 x 8 x k x k] for the splat, both 3 x 3 convolutions over the whole HR
image, and all of that anew for every 30,000 queries. It was written from a specification of that
algorithm, in plain PyTorch, and takes the weights of an `official` model, whose `render` gives the
same image to 1e-5. Where the specification leaves the cost open, the cheaper way is taken: the
49 kernels are placed once for all windows, and only one of the expanded tensors is made, not
several. The Gaussians are the likeliest ones, where the published code draws them at random.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.errors import InputError
from gsr.models import GaussianSR

CHUNK = 30_000  # queries at a time, as published (LIIF's evaluation script has the same number)
WINDOW, TAPS, SPLATTED = 7, 5, 8  # LR pixels a side, HR pixels a side, feature channels
LIIF_WIDTHS = (256, 256, 256, 256)


def conv(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The 3 x 3 convolution `name` of a state dict: [B, C, h, w] to [B, D, h, w]."""
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)


def edsr(weights: dict[str, Tensor], lr: Tensor) -> Tensor:
    """EDSR-baseline, eager and as its paper draws it: [B, 3, h, w] to [B, 64, h, w].

    One such call in float32 is the unit "pass" of all times. It does not use `gsr.models`, so that
    the unit stays what it is when the encoder there gets faster.

    Args:
        weights: the state dict of `gsr.models.encoders.edsr.EDSR` with `res_scale` 1.

    Source: Lim et al., CVPRW 2017, section 3.
    """
    head = conv(weights, "head.0", (lr - 0.5) / 0.5)
    blocks = sum(name.endswith(".body.0.weight") for name in weights)
    x = head
    for i in range(blocks):
        x = x + conv(weights, f"body.{i}.body.2", conv(weights, f"body.{i}.body.0", x).relu_())
    return head + conv(weights, f"body.{blocks}", x)


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict below `prefix`, which their names lose."""
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def queries(size: tuple[int, int]) -> Tensor:
    """Centres (y, x) of all HR pixels in [-1, 1], row by row: [H W, 2]."""
    y, x = ((-1 + 1 / n) + (2 / n) * torch.arange(n).float() for n in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def sample(x: Tensor, coord: Tensor) -> Tensor:
    """The pixels of x [B, C, h, w] nearest to coord [B, Q, 2], (y, x) in [-1, 1]: [B, Q, C]."""
    grid = coord.flip(-1)[:, None]
    return F.grid_sample(x, grid, mode="nearest", align_corners=False)[:, :, 0].mT


def centres(like: Tensor) -> Tensor:
    """Coordinates (y, x) of the pixels of [B, C, h, w] as an image: [B, 2, h, w]."""
    b, _, h, w = like.shape
    return queries((h, w)).T.reshape(1, 2, h, w).expand(b, -1, -1, -1)


# ---- GaussianSR, as published -------------------------------------------------------------------


class Published:
    """The published algorithm: `Published(model)(lr, size, scale)` is [B, 3, H, W], not clamped.

    Args:
        model: an `official` model of the published architecture (EDSR-baseline, 7 x 7 windows, 5
            taps, 8 splatted channels) on the CPU; its weights are used, none of its code.
        chunk: queries for which everything behind the encoder is computed at a time; None computes
            it once, which the published code can do but does not.

    Raises:
        InputError: another model.
    """

    def __init__(self, model: GaussianSR, chunk: int | None = CHUNK):
        c = model.config
        if (
            c.mode != "official"
            or (c.bank.window, c.bank.kernel_size, c.bank.channels) != (WINDOW, TAPS, SPLATTED)
            or c.encoder.res_scale != 1
        ):
            raise InputError("Published needs a model of mode official with the published sizes")
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk must be at least 1, not {chunk}")
        self.chunk = chunk
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.encoder = part(weights, "encoder.")
        self.head = part(weights, "head.")
        self.layers = [f"layers.{2 * i}" for i in range(len(c.decoder.hidden_list) + 1)]

    @torch.inference_mode()
    def __call__(self, lr: Tensor, size: tuple[int, int], scale: float) -> Tensor:
        features = edsr(self.encoder, lr)
        logits = conv(self.head, "classifier", features)
        chosen = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
        b, coord = lr.shape[0], queries(size)
        rgb = [
            self.query(features, chosen, size, scale, some.expand(b, -1, -1))
            for some in coord.split(self.chunk or len(coord))
        ]
        return torch.cat(rgb, dim=1).mT.reshape(b, 3, *size)

    def query(self, features: Tensor, chosen: Tensor, size, scale: float, coord: Tensor) -> Tensor:
        """Everything behind the encoder: colours [B, Q, 3] at coord [B, Q, 2]."""
        splatted = F.interpolate(self.splat(features, chosen, scale), size, mode="bicubic")
        rest = F.interpolate(features[:, SPLATTED:], size, mode="bicubic")
        hr = torch.cat([splatted, rest], dim=1)  # [B, 64, H, W]
        coef = sample(conv(self.head, "decoder.coef", hr), coord)  # [B, Q, 256]
        freq = sample(conv(self.head, "decoder.freq", hr), coord)

        lr_size = coord.new_tensor(features.shape[-2:])
        away = (coord - sample(centres(features), coord)) * lr_size
        cell = 2 / coord.new_tensor(size) * lr_size
        turn = (freq.unflatten(-1, (-1, 2)) * away[:, :, None]).sum(-1)  # [B, Q, 128]
        turn = math.pi * (turn + F.linear(cell, self.head["decoder.phase.weight"]))
        x = coef * torch.cat([turn.cos(), turn.sin()], dim=-1)
        for name in self.layers:
            x = F.gelu(x) if name != self.layers[0] else x
            x = F.linear(x, self.head[f"decoder.{name}.weight"], self.head[f"decoder.{name}.bias"])
        return x * 0.5 + 0.5

    def splat(self, features: Tensor, chosen: Tensor, scale: float) -> Tensor:
        """The first channels, window by window: [B, 8, n_r k, n_c k] in [0, 1]."""
        b, _, h, w = features.shape
        rows, columns = math.ceil(h / WINDOW), math.ceil(w / WINDOW)
        whole = (rows * WINDOW, columns * WINDOW)
        values = cut(F.interpolate(features[:, :SPLATTED], whole, mode="bicubic"))
        chosen = cut(F.interpolate(chosen, whole, mode="bicubic"))
        bank = [self.head[f"bank.{n}"].flatten() for n in ("sigma_x", "sigma_y", "opacity", "rho")]
        sigma_x, sigma_y, opacity, rho = (chosen @ torch.stack(bank, dim=1)).mean(0).T  # [49] each

        k = round(WINDOW * scale)
        placed = place(kernels(sigma_x, sigma_y, rho), k)  # [49, 1, k, k]
        colour = (values * opacity[:, None])[..., None, None]  # [B L, 49, 8, 1, 1]
        out = (colour * placed).sum(1).clamp(0, 1)  # from [B L, 49, 8, k, k]
        out = out.view(b, rows, columns, SPLATTED, k, k).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, SPLATTED, rows * k, columns * k)


def cut(x: Tensor) -> Tensor:
    """[B, C, 7 n_r, 7 n_c] to its windows [B n_r n_c, 49, C]."""
    windows = F.unfold(x, WINDOW, stride=WINDOW).unflatten(1, (-1, WINDOW**2))  # [B, C, 49, L]
    return windows.permute(0, 3, 2, 1).flatten(0, 1)


def kernels(sigma_x: Tensor, sigma_y: Tensor, rho: Tensor) -> Tensor:
    """Gaussians [n], sigma_x down the rows, as taps of which the largest is 1: [n, 5, 5]."""
    covariance = torch.stack(
        [sigma_x**2 + 1e-5, rho * sigma_x * sigma_y, rho * sigma_x * sigma_y, sigma_y**2 + 1e-5], -1
    ).view(-1, 2, 2)
    u = torch.linspace(-5, 5, TAPS)
    points = torch.stack(torch.meshgrid(u, u, indexing="ij"), dim=-1)  # [5, 5, 2]
    power = torch.einsum("abi,nij,abj->nab", points, covariance.inverse(), points)
    taps = torch.exp(-0.5 * power)
    return taps / taps.amax(dim=(1, 2), keepdim=True)


def place(taps: Tensor, k: int) -> Tensor:
    """Kernels [49, 5, 5] at their places in a window of k x k HR pixels: [49, 1, k, k]."""
    before = (k - TAPS) // 2
    after = k - TAPS - before
    padded = F.pad(taps[:, None], (before, after, before, after))
    shift = 1 - 2 * torch.arange(WINDOW) / WINDOW
    theta = torch.zeros(WINDOW, WINDOW, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = 1
    theta[..., 0, 2], theta[..., 1, 2] = shift[None, :], shift[:, None]  # x, y
    grid = F.affine_grid(theta.flatten(0, 1), list(padded.shape), align_corners=True)
    return F.grid_sample(padded, grid, align_corners=True)


# ---- LIIF ---------------------------------------------------------------------------------------


def liif_mlp(channels: int = 64) -> nn.Sequential:
    """LIIF's decoding function: 3 x 3 unfolded features, relative coordinate and cell to RGB."""
    widths = (9 * channels + 4, *LIIF_WIDTHS)
    layers = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3))


def liif_query(features: Tensor, mlp, coord: Tensor, size: tuple[int, int]) -> Tensor:
    """Colours at coord of the HR image of `size`, with feature unfolding, cell decoding and local
    ensemble: the mean over the four surrounding LR pixels, by the area of the opposite rectangle.

    Args:
        features: [B, C, h, w].
        mlp: [B, Q, 9 C + 4] to [B, Q, D], as `liif_mlp` makes it.
        coord: [B, Q, 2], (y, x) in [-1, 1].

    Returns:
        [B, Q, D].

    Source: LIIF (Chen, Liu, Wang, CVPR 2021), section 3.
    """
    return _liif(unfold(features), mlp, coord, size)


@torch.inference_mode()
def liif_render(features: Tensor, mlp, size: tuple[int, int], chunk: int = CHUNK) -> Tensor:
    """`liif_query` at every HR pixel, `chunk` queries at a time, unfolding once: [B, D, H, W]."""
    b, unfolded = features.shape[0], unfold(features)
    parts = [
        _liif(unfolded, mlp, some.expand(b, -1, -1), size) for some in queries(size).split(chunk)
    ]
    return torch.cat(parts, dim=1).mT.reshape(b, -1, *size)


def unfold(features: Tensor) -> Tensor:
    """Every pixel with its 3 x 3 neighbourhood, zero beyond the border: [B, 9 C, h, w]."""
    b, c, h, w = features.shape
    return F.unfold(features, 3, padding=1).view(b, 9 * c, h, w)


def _liif(unfolded: Tensor, mlp, coord: Tensor, size: tuple[int, int]) -> Tensor:
    lr_size = coord.new_tensor(unfolded.shape[-2:])
    cell = (2 / coord.new_tensor(size) * lr_size).expand_as(coord)
    where = centres(unfolded)
    colours, areas = [], []
    for side_y in (-1, 1):
        for side_x in (-1, 1):
            # Half an LR pixel to one side; a little more, so that no tie is left to rounding.
            corner = coord + (coord.new_tensor([side_y, side_x]) / lr_size + 1e-6)
            corner = corner.clamp(-1 + 1e-6, 1 - 1e-6)
            away = (coord - sample(where, corner)) * lr_size
            colours.append(mlp(torch.cat([sample(unfolded, corner), away, cell], dim=-1)))
            areas.append(away.prod(-1, keepdim=True).abs() + 1e-9)
    total = sum(areas)
    weighted = (c * a / total for c, a in zip(colours, reversed(areas), strict=True))
    return sum(weighted, torch.zeros(()))
