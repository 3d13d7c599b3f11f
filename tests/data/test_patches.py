"""Sampling: what a batch holds, and that any step can be made again from its number."""

import io
import itertools
import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gsr.config import DataConfig
from gsr.data.patches import (
    Draw,
    PatchDataset,
    ScaleBatchSampler,
    make_loader,
    micro_batch,
    pixel_coords,
    split_images,
    steps_per_epoch,
    to_bytes,
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
    paths, val = split_images(c)
    assert (len(paths), len(val)) == (3, 1)
    for batch in make_loader(PatchDataset(paths, c), seed=1, start=0, stop=4):
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
    paths, _ = split_images(c)
    for batch in make_loader(PatchDataset(paths, c), seed=2, start=0, stop=8):

        def distance(coord, b=batch):
            grid = coord.flip(-1)[:, None]
            read = F.grid_sample(b.lr, grid, "bilinear", "border", align_corners=False)
            return (read[:, :, 0].mT - b.target).abs().mean().item()

        right = distance(batch.coord)
        assert right < 0.6 * distance(batch.coord.flip(-1))
        assert right < 0.6 * distance(-batch.coord)


def test_queries_are_distinct(folder):
    c = config(folder, queries=144)
    paths, _ = split_images(c)
    batch = next(iter(make_loader(PatchDataset(paths, c), seed=0, start=0, stop=1)))
    for coord in batch.coord:
        assert len(torch.unique(coord, dim=0)) == 144


def test_any_step_again(folder):
    c = config(folder)
    paths, _ = split_images(c)
    whole = list(make_loader(PatchDataset(paths, c), seed=3, start=0, stop=7))
    rest = list(make_loader(PatchDataset(paths, c), seed=3, start=4, stop=7))
    for a, b in zip(whole[4:], rest, strict=True):
        assert a.size == b.size
        assert torch.equal(a.lr, b.lr) and torch.equal(a.target, b.target)
    other = next(iter(make_loader(PatchDataset(paths, c), seed=4, start=0, stop=1)))
    assert not torch.equal(whole[0].lr, other.lr)


@pytest.mark.parametrize(
    "other",
    [
        {"workers": 2, "cache": "none"}, {"cache": "memory"},
        {"workers": 2, "cache": "mmap"}, {"cache": "mmap", "cache_budget": "13kB"},
        {"cache_budget": "0B"},
    ],
)  # fmt: skip
def test_workers_and_cache_change_nothing(folder, other):
    c = config(folder)
    paths, _ = split_images(c)
    plain = list(make_loader(PatchDataset(paths, c), seed=5, start=0, stop=4))
    loader = make_loader(PatchDataset(paths, config(folder, **other)), seed=5, start=0, stop=4)
    for a, b in zip(plain, loader, strict=True):
        assert torch.equal(a.lr, b.lr) and torch.equal(a.target, b.target)
        assert torch.equal(a.coord, b.coord) and a.seeds == b.seeds


def no_decoding(monkeypatch):
    def decode(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr("gsr.data.patches.read_image", decode)


def test_a_mapped_image_is_decoded_once(folder, monkeypatch):
    c = config(folder, cache="mmap", repeat=1)
    paths, _ = split_images(c)
    assert len(PatchDataset(paths, c)) == 3
    no_decoding(monkeypatch)
    assert len(list(make_loader(PatchDataset(paths, c), seed=0, start=0, stop=1))) == 1
    files = list((folder / ".gsr-cache").iterdir())
    assert len(files) == 3 and all(file.suffix == ".npy" for file in files)
    assert split_images(c)[0] == paths  # the cache is no image


def test_a_mapped_image_that_has_changed_is_decoded_again(folder, tmp_path):
    c = config(folder, cache="mmap", cache_dir=str(tmp_path / "cache" / "deep"))
    paths, _ = split_images(c)
    before = PatchDataset(paths, c)
    files = {file.name for file in (tmp_path / "cache" / "deep").iterdir()}
    Image.new("RGB", (64, 50), "red").save(list(paths)[1])
    after = PatchDataset(paths, c)
    now = {file.name for file in (tmp_path / "cache" / "deep").iterdir()}
    assert len(files) == len(now) == 3 and len(files & now) == 2
    assert before.mapped[0].tolist() == after.mapped[0].tolist()
    assert after.mapped[1].shape == (50, 64, 3) and np.unique(after.mapped[1]).tolist() == [0, 255]
    # the same size, another time of change
    os.utime(list(paths)[1], ns=(0, 10**18))
    PatchDataset(paths, c)
    assert len(now & {file.name for file in (tmp_path / "cache" / "deep").iterdir()}) == 2


def test_damaged_and_missing_files_of_the_cache_are_made_again(folder):
    c = config(folder, cache="mmap")
    paths, _ = split_images(c)
    first, second, third = PatchDataset(paths, c).mapped.files
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    second.write_bytes(b"")
    dataset = PatchDataset(paths, c)
    third.unlink()  # while it is in use
    for i, path in enumerate(paths):
        assert np.array_equal(dataset._image(i), np.asarray(Image.open(path)))
    assert first.read_bytes() == whole and third.exists()


def wrong_kinds():
    whole = io.BytesIO()
    np.save(whole, np.zeros((60, 70, 3), np.uint8))
    whole = whole.getvalue()
    yield "grey", np.zeros((60, 70, 1), np.uint8)
    yield "flat", np.zeros((60, 70), np.uint8)
    yield "floats", np.zeros((60, 70, 3), np.float32)
    yield "video", np.zeros((60, 70, 3, 3), np.uint8)
    yield "archive", None
    yield "open bracket", whole.replace(b"'shape': (60", b"'shape': ((0")
    yield "no header", whole.replace(b"shape", b"shaqe")


@pytest.mark.parametrize(
    "name,content", [pytest.param(*kind, id=kind[0]) for kind in wrong_kinds()]
)
def test_files_of_the_cache_of_another_kind_are_made_again(folder, name, content):
    c = config(folder, cache="mmap")
    paths, _ = split_images(c)
    file = PatchDataset(paths, c).mapped.files[0]
    whole = file.read_bytes()
    if content is None:
        np.savez(file.with_suffix(".npz"), np.zeros(3))
        file.with_suffix(".npz").rename(file)
    elif isinstance(content, bytes):
        assert content != whole
        file.write_bytes(content)
    else:
        np.save(file, content)
    picture = PatchDataset(paths, c)._image(0)
    assert np.array_equal(picture, np.asarray(Image.open(list(paths)[0])))
    assert file.read_bytes() == whole


def test_what_is_not_this_sets_stays_in_the_cache(folder, tmp_path):
    """Pictures of another set, and what another run is writing; not what a killed run left."""
    cache = tmp_path / "cache"
    cache.mkdir()
    stays = [cache / f"{'0' * 24}-1-2.npy", cache / "mine.npy", cache / ".new.gsr-tmp"]
    old = cache / ".old.gsr-tmp"
    for path in (*stays, old):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 4000,) * 2)
    (cache / ".gone.gsr-tmp").symlink_to(cache / "nowhere")  # as if it went after being listed
    c = config(folder, cache="mmap", cache_dir=str(cache))
    PatchDataset(split_images(c)[0], c)
    assert all(path.exists() for path in stays) and not old.exists()


def test_a_image_that_goes_after_it_was_listed(folder):
    c = config(folder, cache="mmap")
    paths, _ = split_images(c)
    list(paths)[1].unlink()
    with pytest.raises(
        InputError, match=f"{list(paths)[1].name} is gone since the folder was listed"
    ):
        PatchDataset(paths, c)


def test_the_cache_keeps_to_its_budget(folder, monkeypatch):
    c = config(folder, cache_budget="25.3 kB")  # an image is 60 * 70 * 3 = 12.6 kB
    paths, _ = split_images(c)
    assert sorted(PatchDataset(paths, c).memory) == [0, 1]
    c.cache = "mmap"
    assert len(PatchDataset(paths, c).mapped) == len(list((folder / ".gsr-cache").iterdir())) == 2
    assert to_bytes("4GB") == 4e9 and to_bytes("2GiB") == 2**31 and to_bytes("1.5 kB") == 1500
    assert to_bytes("7B") == 7 and to_bytes("3MiB") == 3 * 2**20 and to_bytes(None) == float("inf")


def test_a_cache_that_cannot_be_made(folder, tmp_path):
    c = config(folder, cache="mmap", cache_dir=str(folder / "0.png" / "cache"))
    with pytest.raises(InputError, match="data.cache_dir: .* cannot be made"):
        PatchDataset(split_images(c)[0], c)


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_a_batch_in_parts_is_the_batch(folder, ranks, accumulate):
    c = config(folder, batch=6)
    whole = list(ScaleBatchSampler([5] * 3, c, 7, 1, 3))
    samplers = [
        ScaleBatchSampler([5] * 3, c, 7, 1, 3, accumulate, rank, ranks) for rank in range(ranks)
    ]
    assert all(len(sampler) == 2 * accumulate for sampler in samplers)
    parts = [list(sampler) for sampler in samplers]
    for step, batch in enumerate(whole):
        of_step = [p for rank in parts for p in rank[step * accumulate : (step + 1) * accumulate]]
        assert {len(part) for part in of_step} == {micro_batch(6, ranks, accumulate)}
        assert list(itertools.chain(*of_step)) == batch


def test_every_patch_has_noise_of_its_own(folder):
    c = config(folder, batch=6)
    dataset = PatchDataset(split_images(c)[0], c)
    whole = next(iter(make_loader(dataset, seed=0, start=2, stop=3)))
    parts = list(make_loader(dataset, seed=0, start=2, stop=3, accumulate=2))
    assert [*parts[0].seeds, *parts[1].seeds] == [*whole.seeds] and len({*whole.seeds}) == 6
    assert torch.equal(torch.cat([part.lr for part in parts]), whole.lr)


def test_an_epoch_visits_each_image_equally(folder):
    c = config(folder)
    per_epoch = steps_per_epoch([5] * 3, c)
    assert per_epoch == 5
    for epoch in range(2):
        sampler = ScaleBatchSampler([5] * 3, c, 0, epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [draw.index for batch in sampler for draw in batch]
        assert np.bincount(seen).tolist() == [5, 5, 5]
    scales = [batch[0].scale for batch in ScaleBatchSampler([5] * 3, c, 0, 0, 200)]
    assert min(scales) < 1.1 and max(scales) > 3.9 and len(set(scales)) == 200


def test_a_patch_is_what_its_random_numbers_say(folder):
    """Crop, Pillow's bicubic, flips and transposition, done again here from the same key."""
    c = config(folder, scale_min=2.0)
    paths, _ = split_images(c)
    dataset = PatchDataset(paths, c)
    turned = set()
    for n in range(24):
        draw = Draw(n % 3, 2.0 + n / 24, (7, 2, n, 0))
        lr, index, target, scale, _ = dataset[draw]
        side = round(12 * scale)
        rng = np.random.default_rng(draw.key)
        picture = np.asarray(Image.open(list(paths)[draw.index]))
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
        [
            draw.index
            for batch in ScaleBatchSampler([20] * 3, c, 0, e * 10, e * 10 + 10)
            for draw in batch
        ]
        for e in (0, 1)
    )
    assert sorted(first) == sorted(second) and first != second
    assert first != sorted(first)


def test_validation_images(folder, tmp_path):
    """From their own folder, or set aside evenly from the training images."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / "val" / "own.png")
    train, val = split_images(config(folder, val=str(tmp_path / "val")))
    assert [p.name for p in val] == ["own.png"] and len(train) == 5
    (tmp_path / "val" / "own.png").unlink()
    train, val = split_images(config(folder, val_count=2))
    assert [p.name for p in val] == ["1.png", "3.png"]
    assert [p.name for p in train] == ["0.png", "2.png"]


def test_a_bad_image_is_found_before_training(folder):
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    c = config(folder, cache="none")
    with pytest.raises(InputError, match="1.png"):
        PatchDataset(split_images(c)[0], c)


def test_coordinates():
    coord = pixel_coords(torch.arange(6), (2, 3))
    expected = [(y, x) for y in (-0.5, 0.5) for x in (-2 / 3, 0, 2 / 3)]
    torch.testing.assert_close(coord, torch.tensor(expected))


def test_bad_data(folder, tmp_path):
    with pytest.raises(InputError, match="val_count"):
        split_images(config(folder, val_count=4))
    with pytest.raises(InputError, match="nowhere"):
        split_images(config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="smaller than the largest crop"):
        PatchDataset(split_images(config(folder))[0], config(folder, patch=20))
    with pytest.raises(InputError, match="data.batch"):
        steps_per_epoch([5] * 3, config(folder, batch=16))
    for parts in ((4, 1), (1, 12)):
        with pytest.raises(InputError, match="6 cannot be cut .* a multiple of"):
            micro_batch(6, *parts)


def test_folders_are_visited_by_their_shares(folder, tmp_path):
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(drawings / f"{i}.png")
    (tmp_path / "photos").mkdir()
    for path in folder.glob("*.png"):
        path.rename(tmp_path / "photos" / path.name)
    shares = {str(tmp_path / "photos"): 0.75, str(drawings): 0.25}
    c = config(folder, train=shares, val_count=2, repeat=50)
    train, val = split_images(c)
    assert len(train) == 8 and {path.parent.name for path in val} == {"photos", "drawings"}
    assert not set(train) & set(val)
    dataset = PatchDataset(train, c)
    sampler = ScaleBatchSampler(dataset.visits, c, 0, 0, steps_per_epoch(dataset.visits, c))
    seen = Counter(dataset.paths[draw.index] for batch in sampler for draw in batch)
    photos = sum(n for path, n in seen.items() if path.parent.name == "photos")
    assert abs(photos / sum(seen.values()) - 0.75) < 0.02
    by_folder = [[n for p, n in seen.items() if p.parent.name == f] for f in ("photos", "drawings")]
    assert all(max(counts) - min(counts) <= 2 for counts in by_folder)  # the last batch is cut
    # Shares need not sum to 1, and a folder whose images would all be set aside is refused.
    double = config(folder, train={k: 2 * s for k, s in shares.items()}, val_count=2, repeat=50)
    assert split_images(double)[0] == train
    with pytest.raises(InputError, match="photos holds 4 images, .* lower data.val_count"):
        split_images(config(folder, train=shares, val_count=9))
