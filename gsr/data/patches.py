"""Training data: folders of HR images become batches of LR patches and sampled HR pixels.

Every random choice is a function of (seed, step, place in the batch), made by the batch sampler and
not by counting calls in a worker: any step can be reproduced, and a run resumed, from its number. A
batch may be cut into micro-batches, and those shared among processes: its patches stay the same.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gsr import distributed, parts
from gsr.config import BYTES, DataConfig
from gsr.data.degradations import MARGIN, check_stages, degrade
from gsr.errors import InputError
from gsr.io.image import TEMPORARY, list_images, read_image, write_atomic
from gsr.io.paths import make_folder

T = TypeVar("T")
CACHE_DIR = ".gsr-cache"  # in the folder of the images, where `list_images` does not look


class Batch(NamedTuple):
    lr: Tensor  # [B, 3, p, p] float in [0, 1]
    coord: Tensor  # [B, Q, 2], (y, x) in [-1, 1]
    target: Tensor  # [B, Q, 3] float in [0, 1]
    size: tuple[int, int]  # HR size of the patches
    scale: float
    seeds: Sequence[int] | None = None  # of the model's noise, one a patch, below 2^63

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        names = "lr", "coord", "target"
        there = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        return self._replace(**there)


class Draw(NamedTuple):
    """One place in a batch."""

    index: int  # image
    scale: float
    key: tuple[int, ...]  # seeds this patch's own random numbers


@dataclass(frozen=True, eq=False)
class Item:
    """An image of a dataset of the user's own: `data.dataset`."""

    dataset: Any
    index: int

    def __str__(self) -> str:
        return f"data.dataset: item {self.index}"


def read_item(item: Path | Item) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """HR as uint8 [H, W, 3], from a file or a dataset; of one that has pairs, (LR, HR).

    Raises:
        InputError: an unreadable file, or a dataset that gives anything else.
    """
    if isinstance(item, Path):
        return read_image(item)
    given = item.dataset[item.index]
    given = given if isinstance(given, tuple) else (given,)
    if len(given) not in (1, 2) or any(isinstance(image, (list, tuple)) for image in given):
        raise InputError(f"{item} is no image and no tuple of two, LR and HR")
    images = [np.asarray(image) for image in given]
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(
                f"{item} is {image.dtype} {list(image.shape)}; an image is uint8 [H, W, 3]"
            )
    if len(images) == 1:
        return images[0]
    lr, hr = images
    scale = hr.shape[0] // max(1, lr.shape[0])
    if hr.size == 0 or hr.shape != (scale * lr.shape[0], scale * lr.shape[1], 3):
        raise InputError(
            f"{item} is a pair of LR {list(lr.shape)} and HR {list(hr.shape)}; HR must be a whole "
            "number of times larger"
        )
    return lr, hr


def list_items(config: DataConfig) -> dict[str, list[Path | Item]]:
    """The images of each folder of `data.train`, or those of the one `data.dataset`."""
    if config.dataset is None:
        folders = config.train if isinstance(config.train, dict) else [config.train]
        return {folder: [*list_images(folder)] for folder in folders}
    name, key = config.dataset.name, f"data.dataset: {config.dataset.name}"
    dataset = parts.make(parts.find(name, {}, "data.dataset"), (), config.dataset.keys, key)
    count = len(dataset) if hasattr(dataset, "__len__") else 0
    if not count:
        raise InputError(f"{key} has no items: it must have __len__, from 1, and __getitem__")
    return {name: [Item(dataset, i) for i in range(count)]}


def split_images(config: DataConfig) -> tuple[dict[Path | Item, int], list[Path | Item]]:
    """The images to train on, with the visits to each in an epoch, and those to validate on.

    One folder's images are visited `repeat` times each, and so are those of a dataset. Of several
    folders, an epoch has as many visits in all, shared as `data.train` says, to the nearest whole
    number of visits an image.

    Raises:
        InputError: a folder is missing or has no images, or none would be left to train on; the
            dataset cannot be made.
    """
    folders = list_items(config)
    shares = {folder: 1.0 for folder in folders}
    if config.dataset is None and isinstance(config.train, dict):
        shares = config.train
    everything = [item for items in folders.values() for item in items]
    if config.val is not None:
        val: list[Path | Item] = [*spread(list_images(config.val), config.val_count)]
    else:
        val = spread(everything, config.val_count)
        for folder, items in folders.items():
            folders[folder] = [item for item in items if item not in val]
            if not folders[folder]:
                raise InputError(
                    f"data.train: {folder} holds {len(items)} images, and data.val_count "
                    f"{config.val_count} would set all of them aside: lower data.val_count or set "
                    "data.val"
                )
    visits = config.repeat * sum(map(len, folders.values())) / sum(shares.values())
    train = {
        item: max(1, round(visits * shares[folder] / len(items)))
        for folder, items in folders.items()
        for item in items
    }
    return train, val


def spread(paths: list[T], count: int) -> list[T]:
    """`count` of the items, evenly spaced: neighbours in a folder are often alike."""
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


def to_bytes(amount: str | None) -> float:
    """Bytes in "4GB", "500 MB" or "2GiB", as `gsr.config.BYTES` allows; infinity for None."""
    if amount is None:
        return math.inf
    number, unit, binary = re.findall(BYTES, amount)[0]
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")


def decoded_bytes(path: Path) -> int:
    """Bytes of an image as uint8 RGB, from its header; 0 for one that `read_image` refuses."""
    try:
        with Image.open(path) as image:
            return 3 * image.width * image.height
    except Exception:  # damaged files raise almost anything, and `read_image` says it better
        return 0


def fitting(paths: list[Path], budget: float) -> int:
    """How many images, from the first on, fit decoded into so many bytes."""
    if budget == math.inf:
        return len(paths)
    total = np.cumsum([decoded_bytes(path) for path in paths])
    return int(np.searchsorted(total, budget, side="right"))


class MappedImages:
    """Decoded images in a folder, one .npy file each, mapped into memory when they are read.

    All processes of a machine share the one copy in the system's page cache, whose memory it takes
    back when it must. A file carries its image's path (as a hash), size and time of change in its
    name: an image that has changed has no file yet.

    Args:
        folder: made if need be.
        paths: the images.

    Raises:
        InputError: the folder cannot be made or written to, or an image is gone.
    """

    def __init__(self, folder: Path, paths: list[Path]):
        try:
            self.folder = make_folder(folder)
        except InputError as error:
            raise InputError(f"data.cache_dir: {error}") from None
        self.paths, self.files = paths, [folder / self._name(path) for path in paths]

    @staticmethod
    def _name(path: Path) -> str:
        named = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(
                f"{path} is gone since the folder was listed ({error.strerror}): run again"
            ) from None
        return f"{named}-{stat.st_size}-{stat.st_mtime_ns}.npy"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        """Image i: uint8 [H, W, 3], read-only. Its file is made where it is missing or damaged.

        Mapped anew each time: a map that is kept would keep a file open, and systems allow few.
        """
        try:
            kept = np.lib.format.open_memmap(self.files[i], mode="r")
            if kept.dtype != np.uint8 or kept.shape[2:] != (3,):
                raise ValueError
            return kept
        except Exception:  # a damaged header is parsed as Python, which may raise anything
            image, packed = read_image(self.paths[i]), io.BytesIO()
            np.save(packed, image)
            write_atomic(self.files[i], packed.getbuffer())
            return image

    def remove_outdated(self) -> None:
        """Remove the files of what these images were before, and what killed runs left over."""
        for file in self.folder.glob(f".*{TEMPORARY}"):
            with suppress(FileNotFoundError):  # another run has just removed or renamed it
                if time.time() - file.stat().st_mtime > 3600:  # or is still writing it
                    file.unlink()
        current = {file.name for file in self.files}
        named = {name.partition("-")[0] for name in current}
        for file in self.folder.glob("*.npy"):
            if file.name not in current and file.name.partition("-")[0] in named:
                file.unlink(missing_ok=True)


class PatchDataset(Dataset):
    """Patches of images, indexed by `Draw`.

    Every file is decoded once here, or read from the cache, so that a bad one is found before the
    first step and not hours into a training. Several processes of a machine share this work. A
    dataset of the user's own is neither looked through nor cached.

    Args:
        train: HR images, each with its visits in an epoch.
        config: `patch`, `queries`, `scale_max`, `degrade` and what concerns the cache are used.
        dense: all pixels of an HR patch are its queries, row by row.

    Raises:
        InputError: an image is unreadable, or smaller than the largest crop, or the cache cannot
            be written.
    """

    def __init__(self, train: Mapping[Path | Item, int], config: DataConfig, dense: bool = False):
        self.paths, self.visits, self.config = list(train), list(train.values()), config
        self.dense = dense
        check_stages(config.degrade)
        paths = [path for path in self.paths if isinstance(path, Path)]  # all or none
        self.memory: dict[int, np.ndarray] = {}
        self.mapped: MappedImages | None = None
        kind = config.cache if paths else "none"
        cached = 0 if kind == "none" else fitting(paths, to_bytes(config.cache_budget))
        if kind == "mmap":
            first = config.train if isinstance(config.train, str) else next(iter(config.train))
            folder = Path(config.cache_dir or Path(first) / CACHE_DIR)
            self.mapped = MappedImages(folder, paths[:cached])
        rank, ranks = distributed.local_rank()
        for i, path in enumerate(paths):
            if kind == "memory" and i < cached:  # each process has its own
                self.memory[i] = read_image(path)
            if i in self.memory or i % ranks == rank:
                self._image(i)
        distributed.agree()  # from here on all images are known to be good, and all files there
        if self.mapped and rank == 0:
            self.mapped.remove_outdated()

    def _image(self, i: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Image i from where it is kept, else as `read_item` gives it."""
        if i in self.memory:
            image = self.memory[i]
        elif self.mapped and i < len(self.mapped):
            image = self.mapped[i]
        else:
            image = read_item(self.paths[i])
        hr = image[-1] if isinstance(image, tuple) else image
        c, (height, width) = self.config, hr.shape[:2]
        largest = round(c.patch * c.scale_max)
        if min(height, width) < largest:
            raise InputError(
                f"{self.paths[i]} is {width} x {height} pixels, smaller than the largest crop "
                f"{largest} (data.patch {c.patch} x data.scale_max {c.scale_max}): remove it or "
                "lower either"
            )
        return image

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor, float, int]:
        """LR [3, p, p] uint8, HR indices [Q], HR pixels [Q, 3] uint8, scale, seed of the noise."""
        rng = np.random.default_rng(draw.key)
        image = self._image(draw.index)
        if isinstance(image, tuple):
            lr, hr = self._cut_pair(image, draw, rng)
        else:
            lr, hr = self._cut(image, draw, rng)
        flip_y, flip_x, transpose = rng.random(3) < 0.5
        lr, hr = (_augment(a, flip_y, flip_x, transpose) for a in (lr, hr))
        pixels = hr.shape[0] * hr.shape[1]
        if self.dense:
            index = np.arange(pixels)
        else:
            index = rng.choice(pixels, self.config.queries, replace=False)
        return (
            torch.from_numpy(lr.transpose(2, 0, 1).copy()),
            torch.from_numpy(index),
            torch.from_numpy(hr.reshape(-1, 3)[index]),
            draw.scale,
            int(rng.integers(2**63)),
        )

    def _cut(
        self, image: np.ndarray, draw: Draw, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """LR and HR of a patch of an HR image."""
        p = self.config.patch
        side = round(p * draw.scale)
        y, x = (int(rng.integers(0, n - side + 1)) for n in image.shape[:2])
        # Degradations reach beyond the patch; without them, as published, nothing does.
        around = 0 if self.config.degrade is None else math.ceil((MARGIN + 4) * side / p)
        top, left = max(0, y - around), max(0, x - around)
        near = image[top : y + side + around, left : x + side + around]
        box = (x - left, y - top, x - left + side, y - top + side)
        near = Image.fromarray(np.ascontiguousarray(near))
        lr = np.asarray(degrade(near, p, box, self.config.degrade, rng))
        return lr, image[y : y + side, x : x + side]

    def _cut_pair(
        self, pair: tuple[np.ndarray, np.ndarray], draw: Draw, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """LR and HR of a patch of an image that comes with its own LR."""
        (lr, hr), p = pair, self.config.patch
        scale = len(hr) // len(lr)
        if scale != draw.scale:
            raise InputError(
                f"{self.paths[draw.index]} is a pair of scale {scale}: set data.scale_min and "
                "data.scale_max to that"
            )
        y, x = (int(rng.integers(0, n - p + 1)) for n in lr.shape[:2])
        patch = hr[scale * y : scale * (y + p), scale * x : scale * (x + p)]
        return lr[y : y + p, x : x + p], patch


def _augment(a: np.ndarray, flip_y: bool, flip_x: bool, transpose: bool) -> np.ndarray:
    a = a[::-1] if flip_y else a
    a = a[:, ::-1] if flip_x else a
    return np.ascontiguousarray(a.transpose(1, 0, 2) if transpose else a)


def micro_batch(batch: int, processes: int, accumulate: int) -> int:
    """Patches that a process takes at once, of a step's batch.

    Raises:
        InputError: the batch cannot be cut into equal parts.
    """
    size, rest = divmod(batch, processes * accumulate)
    if rest or not size:
        raise InputError(
            f"data.batch {batch} cannot be cut into equal parts for {processes} processes with "
            f"train.accumulate {accumulate}: make it a multiple of {processes * accumulate}"
        )
    return size


class ScaleBatchSampler(Sampler):
    """Batches of `Draw`, one scale a batch, uniform in [scale_min, scale_max].

    An epoch visits every image so many times, in an order drawn from (seed, epoch). Steps count
    from 0 over the whole run, so that starting at `start` continues it.

    Args:
        visits: to each image.
        config: `batch` and the scales are used.
        seed, start, stop: of the run; its steps from `start` until before `stop`.
        accumulate: micro-batches that a step's share is cut into; each is one item.
        rank, ranks: this process, and how many share a batch, each a run of neighbours in it.

    Raises:
        InputError: as `micro_batch` and `steps_per_epoch`.
    """

    def __init__(
        self, visits: Sequence[int], config: DataConfig, seed: int, start: int, stop: int,
        accumulate: int = 1, rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        self.config, self.seed = config, seed
        # Round after round over all images that are still to be visited in this epoch.
        self.slots = np.concatenate(
            [np.flatnonzero(np.asarray(visits) > n) for n in range(max(visits))]
        )
        self.start, self.stop = start, stop
        self.per_epoch = steps_per_epoch(visits, config)
        size = micro_batch(config.batch, ranks, accumulate)
        mine = rank * accumulate * size
        self.parts = [range(mine + i * size, mine + (i + 1) * size) for i in range(accumulate)]

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.parts)

    def __iter__(self):
        c, order, ordered = self.config, self.slots, -1
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != ordered:
                rng = np.random.default_rng([self.seed, 0, epoch])
                order, ordered = self.slots[rng.permutation(len(self.slots))], epoch
            scale = float(
                np.random.default_rng([self.seed, 1, step]).uniform(c.scale_min, c.scale_max)
            )
            for part in self.parts:
                yield [
                    Draw(int(order[place * c.batch + j]), scale, (self.seed, 2, step, j))
                    for j in part
                ]


def steps_per_epoch(visits: Sequence[int], config: DataConfig) -> int:
    """Whole batches in so many visits to each image.

    Raises:
        InputError: there is not one whole batch.
    """
    steps = sum(visits) // config.batch
    if steps < 1:
        raise InputError(
            f"data.batch {config.batch} exceeds the {sum(visits)} patches of an epoch: "
            "lower it or raise data.repeat"
        )
    return steps


def _collate(items) -> Batch:
    lr, index, target, scale, seeds = zip(*items, strict=True)
    lr = torch.stack(lr).float() / 255
    side = round(lr.shape[-1] * scale[0])
    coord = pixel_coords(torch.stack(index), (side, side))
    return Batch(lr, coord, torch.stack(target).float() / 255, (side, side), scale[0], seeds)


def make_loader(
    dataset: PatchDataset,
    seed: int,
    start: int,
    stop: int,
    accumulate: int = 1,
    pin: bool = False,
    workers: int | None = None,
) -> DataLoader:
    """This process's micro-batches, `accumulate` a step, for steps `start` to `stop` of a run.

    `workers` processes load them, by default as many as the dataset's config says.
    """
    ranks = distributed.rank(), distributed.world_size()
    c = dataset.config
    return DataLoader(
        dataset,
        batch_sampler=ScaleBatchSampler(dataset.visits, c, seed, start, stop, accumulate, *ranks),
        num_workers=c.workers if workers is None else workers,
        collate_fn=_collate,
        pin_memory=pin,
    )


def load_batches(
    dataset: PatchDataset, seed: int, start: int, stop: int, *, accumulate: int, pin: bool
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step from `start` until before `stop`.

    Raises:
        InputError: an image cannot be read any more.
    """
    loaded = iter(make_loader(dataset, seed, start, stop, accumulate, pin))
    for _ in range(start, stop):
        try:
            yield [next(loaded) for _ in range(accumulate)]
        except InputError as error:  # from a loader process it comes with that one's traceback
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None
