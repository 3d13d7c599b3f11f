"""Training data: a folder of HR pictures becomes batches of LR patches and sampled HR pixels.

Every random choice is a function of (seed, step, place in the batch), made by the batch sampler and
not by counting calls in a worker: any step can be reproduced, and a run resumed, from its number.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gsr.config import DataConfig
from gsr.errors import InputError
from gsr.image import list_images, read_image


class Batch(NamedTuple):
    lr: Tensor  # [B, 3, p, p] float in [0, 1]
    coord: Tensor  # [B, Q, 2], (y, x) in [-1, 1]
    target: Tensor  # [B, Q, 3] float in [0, 1]
    size: tuple[int, int]  # HR size of the patches
    scale: float


class Draw(NamedTuple):
    """One place in a batch."""

    index: int  # picture
    scale: float
    key: tuple[int, ...]  # seeds this patch's own random numbers


def split_pictures(config: DataConfig) -> tuple[list[Path], list[Path]]:
    """The pictures to train on and to validate on.

    Raises:
        InputError: a folder is missing or has no pictures, or none would be left to train on.
    """
    train = list_images(config.train)
    if config.val is not None:
        return train, spread(list_images(config.val), config.val_count)
    if len(train) <= config.val_count:
        raise InputError(
            f"data.train: {config.train} holds {len(train)} pictures, and data.val_count "
            f"{config.val_count} of them would be set aside: lower data.val_count or set data.val"
        )
    val = spread(train, config.val_count)
    return [path for path in train if path not in val], val


def spread(paths: list[Path], count: int) -> list[Path]:
    """`count` of the paths, evenly spaced: neighbours in a folder are often alike."""
    count = min(count, len(paths))
    return [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]


def pixel_coords(index: Tensor, size: tuple[int, int]) -> Tensor:
    """Coordinates of HR pixels given by their row-major index: [..., 2], (y, x) in [-1, 1].

    Built as -1 + 1/n + (2/n) i in float32, the order that the published tie rule assumes.
    """
    h, w = size
    yx = torch.stack([index // w, index % w], dim=-1).float()
    n = torch.tensor([h, w], dtype=torch.float32)
    return -1 + 1 / n + (2 / n) * yx


def downscale(hr: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased bicubic to `size` (h, w); uint8 [H, W, 3] to uint8 [h, w, 3]."""
    return np.asarray(Image.fromarray(hr).resize((size[1], size[0]), Image.Resampling.BICUBIC))


class PatchDataset(Dataset):
    """Patches of pictures, indexed by `Draw`.

    Every picture is decoded once here, so that a bad one is found before the first step and not
    hours into a training.

    Args:
        paths: HR pictures.
        config: `patch`, `queries`, `scale_max` and `cache` are used.

    Raises:
        InputError: a picture is unreadable, or smaller than the largest crop.
    """

    def __init__(self, paths: list[Path], config: DataConfig):
        self.paths, self.config = paths, config
        largest = round(config.patch * config.scale_max)
        self.pictures = {}
        for i, path in enumerate(paths):
            picture = read_image(path)
            height, width = picture.shape[:2]
            if config.cache:
                self.pictures[i] = picture
            if min(height, width) < largest:
                raise InputError(
                    f"{path} is {width} x {height} pixels, smaller than the largest crop "
                    f"{largest} (data.patch {config.patch} x data.scale_max {config.scale_max}): "
                    "remove it or lower either"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor, float]:
        rng = np.random.default_rng(draw.key)
        picture = self.pictures.get(draw.index)
        if picture is None:
            picture = read_image(self.paths[draw.index])
        p = self.config.patch
        side = round(p * draw.scale)
        y, x = (rng.integers(0, n - side + 1) for n in picture.shape[:2])
        hr = picture[y : y + side, x : x + side]
        lr = downscale(np.ascontiguousarray(hr), (p, p))
        flip_y, flip_x, transpose = rng.random(3) < 0.5
        lr, hr = (_augment(a, flip_y, flip_x, transpose) for a in (lr, hr))
        index = rng.choice(side * side, self.config.queries, replace=False)
        return (
            torch.from_numpy(lr.transpose(2, 0, 1).copy()),
            torch.from_numpy(index),
            torch.from_numpy(hr.reshape(-1, 3)[index]),
            draw.scale,
        )


def _augment(a: np.ndarray, flip_y: bool, flip_x: bool, transpose: bool) -> np.ndarray:
    a = a[::-1] if flip_y else a
    a = a[:, ::-1] if flip_x else a
    return np.ascontiguousarray(a.transpose(1, 0, 2) if transpose else a)


class ScaleBatchSampler(Sampler):
    """Batches of `Draw`, one scale a batch, uniform in [scale_min, scale_max].

    An epoch visits every picture `repeat` times in an order drawn from (seed, epoch). Steps count
    from 0 over the whole run, so that starting at `first` continues it.
    """

    def __init__(self, n: int, config: DataConfig, seed: int, first: int, last: int):
        self.n, self.config, self.seed = n, config, seed
        self.first, self.last = first, last
        self.per_epoch = steps_per_epoch(n, config)

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self):
        c, order, ordered = self.config, None, None
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != ordered:
                order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.n * c.repeat)
                ordered = epoch
            scale = float(
                np.random.default_rng([self.seed, 1, step]).uniform(c.scale_min, c.scale_max)
            )
            yield [
                Draw(int(order[place * c.batch + j]) % self.n, scale, (self.seed, 2, step, j))
                for j in range(c.batch)
            ]


def steps_per_epoch(n: int, config: DataConfig) -> int:
    """Whole batches in `repeat` visits to each of n pictures.

    Raises:
        InputError: there is not one whole batch.
    """
    steps = n * config.repeat // config.batch
    if steps < 1:
        raise InputError(
            f"data.batch {config.batch} exceeds the {n} x {config.repeat} patches of an epoch: "
            "lower it or raise data.repeat"
        )
    return steps


def _collate(items) -> Batch:
    lr, index, target, scale = zip(*items, strict=True)
    lr = torch.stack(lr).float() / 255
    side = round(lr.shape[-1] * scale[0])
    coord = pixel_coords(torch.stack(index), (side, side))
    return Batch(lr, coord, torch.stack(target).float() / 255, (side, side), scale[0])


def make_loader(
    dataset: PatchDataset, seed: int, first: int, last: int, pin: bool = False
) -> DataLoader:
    """Batches for steps `first` to `last` of a run."""
    return DataLoader(
        dataset,
        batch_sampler=ScaleBatchSampler(len(dataset), dataset.config, seed, first, last),
        num_workers=dataset.config.workers,
        collate_fn=_collate,
        pin_memory=pin,
    )
