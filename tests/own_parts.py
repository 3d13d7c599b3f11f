"""What a user might write in a module of their own, right and wrong."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from gsr.config import EncoderConfig
from gsr.models.encoders.swinir import SwinIR


class Plain(nn.Module):
    """Convolutions; says any halo."""

    def __init__(self, n_feats, depth=2, halo=None, whole=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, n_feats, 3, padding=1),
            *(nn.Conv2d(n_feats, n_feats, 3, padding=1) for _ in range(depth - 1)),
        )
        self.halo = None if whole else depth if halo is None else halo

    def forward(self, lr):
        return self.body(lr)


class Attention(Plain):
    """Channel attention over the whole image."""

    def forward(self, lr):
        x = self.body(lr)
        return x * torch.sigmoid(10 * x.mean(dim=(-2, -1), keepdim=True))


class Double(Plain):
    """Features of twice the size."""

    def forward(self, lr):
        return self.body(lr).repeat_interleave(2, dim=-1)


class Single(Plain):
    """Computes in float32, whatever it is given."""

    def forward(self, lr):
        return torch.relu(lr.float() @ torch.eye(lr.shape[-1])).repeat(1, 3, 1, 1)[
            :, : self.body[0].out_channels
        ]


class Wide(Plain):
    """Looks further along the rows than down the columns."""

    def __init__(self, n_feats, halo=5):
        super().__init__(n_feats, 1, halo)
        self.along = nn.Conv2d(n_feats, n_feats, (1, 9), padding=(0, 4))

    def forward(self, lr):
        return self.along(self.body(lr))


class Pairs(Plain):
    """Takes the mean of pairs of rows, from the first on."""

    def forward(self, lr):
        x = self.body(lr)
        rows = torch.arange(x.shape[-2]) // 2 * 2
        return (x[:, :, rows] + x[:, :, (rows + 1).clamp(max=x.shape[-2] - 1)]) / 2


class Counted(Plain):
    """Has buffers of whole numbers and a weight under two names."""

    def __init__(self, n_feats):
        super().__init__(n_feats, 1, 3)
        self.norm = nn.BatchNorm2d(n_feats)
        self.once = nn.Conv2d(n_feats, n_feats, 3, padding=1)
        self.again = self.once
        self.register_buffer("order", torch.arange(n_feats).flip(0))

    def forward(self, lr):
        return self.again(self.once(self.norm(self.body(lr))[:, self.order]))


class Windowed(SwinIR):
    """Attention in windows, which are counted from the image's corner."""

    def __init__(self, n_feats, alignment=4):
        c = EncoderConfig("swinir", n_feats, dim=8, depths=[2], heads=2, window=4)
        super().__init__(c)
        self.alignment = alignment


class Named(Plain):
    """Uses the name of what SwinIR has, for something else."""

    def __init__(self, n_feats):
        super().__init__(n_feats)
        self.register_buffer("window", torch.hann_window(8))


class NoHalo(nn.Module):
    def __init__(self, n_feats):
        super().__init__()


def function(*given, **keys):
    raise AssertionError("a function that nothing should have called")


def scaled(out, target, by=1.0):
    return by * (out - target).abs().mean()


def invert(image, rng):
    return Image.fromarray(255 - np.asarray(image))


def array(image, rng):
    return np.asarray(image)


def silent(a, b):
    """A schedule or a loss that returns nothing."""


def forgets(model, lr):
    torch.optim.Adam(model.parameters(), lr=lr)


def crop(image, rng):
    return image.crop((0, 0, 5, 5))


class Images:
    """Any images; a list is a dataset too."""

    def __init__(self, side=70, count=4, kind="uint8", scale=0):
        self.side, self.count, self.kind, self.scale = side, count, kind, scale

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 256, (self.side, self.side + 5, 3)).astype(self.kind)
        if self.scale:
            return image, image.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        return image


def colours(out, target):
    """A loss of queries, [B, Q, 3]."""
    assert out.shape[1:] == target.shape[1:] == (48, 3)
    return (out - target)[..., 0].abs().mean()
