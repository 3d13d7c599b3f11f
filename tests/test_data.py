"""Sampling: what a batch holds, and that any step can be made again from its number."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gsr.config import DataConfig
from gsr.data import (
    Draw,
    PatchDataset,
    ScaleBatchSampler,
    downscale,
    make_loader,
    pixel_coords,
    split_pictures,
    steps_per_epoch,
)
from gsr.errors import InputError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        small = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(small).resize((70, 60), Image.Resampling.BICUBIC).save(
            tmp_path / f"{i}.png"
        )
    return tmp_path


def config(folder, **kw):
    return DataConfig(
        **{
            "train": str(folder), "val_count": 1, "patch": 12, "queries": 100, "batch": 3,
            "repeat": 5, "workers": 0, **kw,
        }
    )  # fmt: skip


def test_a_batch(folder):
    c = config(folder)
    paths, val = split_pictures(c)
    assert (len(paths), len(val)) == (3, 1)
    for batch in make_loader(PatchDataset(paths, c), seed=1, first=0, last=4):
        side = round(12 * batch.scale)
        assert batch.size == (side, side)
        assert 1 <= batch.scale <= 4
        assert batch.lr.shape == (3, 3, 12, 12)
        assert batch.coord.shape == (3, 100, 2)
        assert batch.target.shape == (3, 100, 3)
        for t in (batch.lr, batch.target):
            assert t.min() >= 0 and 0.2 < t.max() <= 1


def test_targets_lie_where_their_coordinates_say(folder):
    """The LR patch read at the coordinates is close to the targets, and no other order is."""
    c = config(folder, scale_min=2.0)
    paths, _ = split_pictures(c)
    for batch in make_loader(PatchDataset(paths, c), seed=2, first=0, last=8):

        def distance(coord, b=batch):
            grid = coord.flip(-1)[:, None]
            read = F.grid_sample(b.lr, grid, "bilinear", "border", align_corners=False)
            return (read[:, :, 0].mT - b.target).abs().mean().item()

        right = distance(batch.coord)
        assert right < 0.6 * distance(batch.coord.flip(-1))
        assert right < 0.6 * distance(-batch.coord)


def test_queries_are_distinct(folder):
    c = config(folder, queries=144)
    paths, _ = split_pictures(c)
    batch = next(iter(make_loader(PatchDataset(paths, c), seed=0, first=0, last=1)))
    for coord in batch.coord:
        assert len(torch.unique(coord, dim=0)) == 144


def test_any_step_again(folder):
    c = config(folder)
    paths, _ = split_pictures(c)
    whole = list(make_loader(PatchDataset(paths, c), seed=3, first=0, last=7))
    rest = list(make_loader(PatchDataset(paths, c), seed=3, first=4, last=7))
    for a, b in zip(whole[4:], rest, strict=True):
        assert a.size == b.size
        assert torch.equal(a.lr, b.lr) and torch.equal(a.target, b.target)
    other = next(iter(make_loader(PatchDataset(paths, c), seed=4, first=0, last=1)))
    assert not torch.equal(whole[0].lr, other.lr)


def test_workers_and_cache_change_nothing(folder):
    c = config(folder)
    paths, _ = split_pictures(c)
    plain = list(make_loader(PatchDataset(paths, c), seed=5, first=0, last=4))
    other = config(folder, workers=2, cache=False)
    loader = make_loader(PatchDataset(paths, other), seed=5, first=0, last=4)
    for a, b in zip(plain, loader, strict=True):
        assert torch.equal(a.lr, b.lr) and torch.equal(a.target, b.target)


def test_an_epoch_visits_each_picture_equally(folder):
    c = config(folder)
    per_epoch = steps_per_epoch(3, c)
    assert per_epoch == 5
    for epoch in range(2):
        sampler = ScaleBatchSampler(3, c, 0, epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [draw.index for batch in sampler for draw in batch]
        assert np.bincount(seen).tolist() == [5, 5, 5]
    scales = [batch[0].scale for batch in ScaleBatchSampler(3, c, 0, 0, 200)]
    assert min(scales) < 1.1 and max(scales) > 3.9 and len(set(scales)) == 200


def test_a_patch_is_what_its_random_numbers_say(folder):
    """Crop, Pillow's bicubic, flips and transposition, done again here from the same key."""
    c = config(folder, scale_min=2.0)
    paths, _ = split_pictures(c)
    dataset = PatchDataset(paths, c)
    turned = set()
    for n in range(24):
        draw = Draw(n % 3, 2.0 + n / 24, (7, 2, n, 0))
        lr, index, target, scale = dataset[draw]
        side = round(12 * scale)
        rng = np.random.default_rng(draw.key)
        picture = np.asarray(Image.open(paths[draw.index]))
        y, x = rng.integers(0, 60 - side + 1), rng.integers(0, 70 - side + 1)
        hr = Image.fromarray(picture[y : y + side, x : x + side])
        small = hr.resize((12, 12), Image.Resampling.BICUBIC)
        flip_y, flip_x, transpose = rng.random(3) < 0.5
        turned.add((flip_y, flip_x, transpose))
        for flip, how in ((flip_y, Image.FLIP_TOP_BOTTOM), (flip_x, Image.FLIP_LEFT_RIGHT)):
            hr, small = (p.transpose(how) if flip else p for p in (hr, small))
        hr, small = (p.transpose(Image.TRANSPOSE) if transpose else p for p in (hr, small))
        assert np.array_equal(np.asarray(small).transpose(2, 0, 1), lr.numpy())
        assert np.array_equal(np.asarray(hr).reshape(-1, 3)[index.numpy()], target.numpy())
    assert len(turned) == 8


def test_every_epoch_has_its_own_order(folder):
    c = config(folder, repeat=20, batch=6)
    first, second = (
        [draw.index for batch in ScaleBatchSampler(3, c, 0, e * 10, e * 10 + 10) for draw in batch]
        for e in (0, 1)
    )
    assert sorted(first) == sorted(second) and first != second
    assert first != sorted(first)


def test_validation_pictures(folder, tmp_path):
    """From their own folder, or set aside evenly from the training pictures."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / "val" / "own.png")
    train, val = split_pictures(config(folder, val=str(tmp_path / "val")))
    assert [p.name for p in val] == ["own.png"] and len(train) == 5
    (tmp_path / "val" / "own.png").unlink()
    train, val = split_pictures(config(folder, val_count=2))
    assert [p.name for p in val] == ["1.png", "3.png"]
    assert [p.name for p in train] == ["0.png", "2.png"]


def test_a_bad_picture_is_found_before_training(folder):
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    c = config(folder, cache=False)
    with pytest.raises(InputError, match="1.png"):
        PatchDataset(split_pictures(c)[0], c)


def test_coordinates():
    coord = pixel_coords(torch.arange(6), (2, 3))
    expected = [(y, x) for y in (-0.5, 0.5) for x in (-2 / 3, 0, 2 / 3)]
    torch.testing.assert_close(coord, torch.tensor(expected))


def test_downscale_keeps_the_axes():
    hr = np.zeros((8, 12, 3), np.uint8)
    hr[:, 6:] = 200
    lr = downscale(hr, (4, 6))
    assert lr.shape == (4, 6, 3)
    assert lr[0, 0, 0] < 20 and lr[0, 5, 0] > 180


def test_bad_data(folder, tmp_path):
    with pytest.raises(InputError, match="val_count"):
        split_pictures(config(folder, val_count=4))
    with pytest.raises(InputError, match="nowhere"):
        split_pictures(config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="smaller than the largest crop"):
        PatchDataset(split_pictures(config(folder))[0], config(folder, patch=20))
    with pytest.raises(InputError, match="data.batch"):
        steps_per_epoch(3, config(folder, batch=16))
