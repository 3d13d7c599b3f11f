"""Degradations: what each does to an image, and that a patch depends on nothing but its key."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gsr.config import BlurConfig, DataConfig, DegradeConfig, JpegConfig, NoiseConfig
from gsr.data import degradations as deg
from gsr.data.patches import PatchDataset, make_loader, split_images


def photo(side=160, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def only(**sections):
    """A mixture that degrades every patch, by nothing but the sections given."""
    stages = {"blur": BlurConfig, "noise": NoiseConfig, "jpeg": JpegConfig}
    off = {name: kind(share=0.0) for name, kind in stages.items() if name not in sections}
    return DegradeConfig(**{"clean": 0.0, "kernels": ["bicubic"], **off, **sections})


def difference(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


def test_without_a_mixture_it_is_the_bicubic_of_the_whole_image():
    """The filter reads beyond the box, as it does where the whole image is reduced."""
    hr = photo()
    whole = hr.resize((40, 40), Image.Resampling.BICUBIC)
    patch = deg.degrade(hr, 20, (40, 60, 120, 140), None, np.random.default_rng(0))
    assert np.array_equal(np.asarray(patch), np.asarray(whole)[15:35, 10:30])


@pytest.mark.parametrize("box", [(0, 0, 50, 50), (37, 55, 87, 105), (110, 110, 160, 160)])
def test_a_degraded_patch_lies_where_the_clean_one_does(box):
    """Also at fractional scales and at every border, where there is no margin to cut off."""
    hr = photo()
    clean = deg.degrade(hr, 24, box, None, np.random.default_rng(0))
    same = deg.degrade(hr, 24, box, only(), np.random.default_rng(0))
    assert same.size == (24, 24) and difference(clean, same) < 0.1
    saved = deg.degrade(
        hr, 24, box, only(jpeg=JpegConfig(share=1.0, quality=[95, 95])), np.random.default_rng(0)
    )
    moved = np.roll(np.asarray(clean), 1, axis=0)
    assert difference(clean, saved) < difference(clean, moved) / 4


def test_jpeg_is_that_of_a_file():
    image = photo(64)
    for subsampling, number in (("420", 2), ("444", 0)):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=40, subsampling=number)
        whole = np.asarray(Image.open(file))
        assert np.array_equal(deg.save_jpeg(image, 40, subsampling), whole)
        assert np.array_equal(deg.shifted_jpeg(image, 40, subsampling, (0, 0)), whole)


def test_the_grid_of_blocks_is_shifted():
    """The steps between blocks of a strongly compressed ramp lie where the grid was moved to."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.float32)[:, None], (64, 64))
    image = Image.fromarray(np.stack([ramp.astype(np.uint8)] * 3, axis=-1))
    for shift in (0, 3, 7):
        rows = np.asarray(deg.shifted_jpeg(image, 2, "444", (shift, 0)), int)[..., 0]
        steps = np.abs(np.diff(rows, axis=0)).mean(1)
        strongest = np.sort(np.argsort(steps)[-5:])
        assert set((strongest + 1 + shift) % 8) == {0}


def test_jpeg_draws_quality_subsampling_grid_and_repetition(monkeypatch):
    drawn = []
    shifted = deg.shifted_jpeg
    monkeypatch.setattr(deg, "shifted_jpeg", lambda *a: drawn.append(a[1:]) or shifted(*a))
    config = JpegConfig(quality=[30, 50], chroma_420=0.5, twice=0.5)
    for seed in range(60):
        deg.jpeg(photo(32), config, np.random.default_rng(seed))
    assert {q for q, _, _ in drawn} >= {30, 50} and all(30 <= q <= 50 for q, _, _ in drawn)
    assert {s for _, s, _ in drawn} == {"420", "444"}
    assert 75 < len(drawn) < 105 and len({shift for _, _, shift in drawn}) > 40


def test_noise_has_the_stated_strength():
    flat = Image.new("RGB", (200, 200), (128, 128, 128))
    rng = np.random.default_rng(0)
    gaussian = np.asarray(deg.add_noise(flat, 5.0, 0.0, rng), float)
    assert gaussian.std() == pytest.approx(5.0, rel=0.02)
    assert np.corrcoef(gaussian[..., 0].ravel(), gaussian[..., 1].ravel())[0, 1] < 0.05
    # Of Poisson noise the variance goes with the level: at half of white, 1 / sqrt(2) of it.
    shot = np.asarray(deg.add_noise(flat, 0.0, 10.0, rng), float)
    assert shot.std() == pytest.approx(10 * (128 / 255) ** 0.5, rel=0.02)
    assert shot.mean() == pytest.approx(128, abs=0.2)
    black = deg.add_noise(Image.new("RGB", (50, 50)), 0.0, 10.0, rng)
    assert not np.asarray(black).any()
    grey = np.asarray(deg.add_noise(flat, 5.0, 5.0, rng, grey=True), int)
    assert (grey == grey[..., :1]).all() and grey.std() > 4


def test_blur_and_kernels_change_what_they_should():
    hr, box = photo(), (40, 40, 120, 120)
    clean = deg.degrade(hr, 40, box, None, np.random.default_rng(0))
    soft = deg.degrade(
        hr, 40, box, only(blur=BlurConfig(share=1.0, sigma=[1.0, 1.0])), np.random.default_rng(0)
    )
    contrast = [np.abs(np.diff(np.asarray(i, float), axis=0)).mean() for i in (clean, soft)]
    assert contrast[1] < 0.9 * contrast[0]
    for kernel in deg.KERNELS:
        config = only()
        config.kernels = [kernel]
        out = deg.degrade(hr, 40, box, config, np.random.default_rng(0))
        whole = hr.resize((80, 80), deg.KERNELS[kernel])
        assert difference(out, np.asarray(whole)[20:60, 20:60]) < 1e-9


def test_the_mixture_keeps_to_its_shares(monkeypatch):
    calls = []
    stages = {n: lambda im, c, r, n=n: calls.append(n) or im for n in deg.STAGES}
    monkeypatch.setattr(deg, "STAGES", stages)
    config = DegradeConfig(
        clean=0.25, blur=BlurConfig(share=0.2), noise=NoiseConfig(share=0.5),
        jpeg=JpegConfig(share=1.0),
    )  # fmt: skip
    hr, n = photo(48), 800
    for seed in range(n):
        deg.degrade(hr, 12, (0, 0, 48, 48), config, np.random.default_rng(seed))
    for name, share in (("jpeg", 0.75), ("noise", 0.375), ("blur", 0.15)):
        assert calls.count(name) / n == pytest.approx(share, abs=0.05)


def test_patches_are_functions_of_seed_step_and_place(tmp_path):
    for i in range(3):
        photo(160, i).save(tmp_path / f"{i}.png")

    def batches(workers, first=0):
        c = DataConfig(
            train=str(tmp_path), val_count=1, patch=16, queries=64, batch=4, repeat=20,
            workers=workers, degrade=DegradeConfig(clean=0.25),
        )  # fmt: skip
        dataset = PatchDataset(split_images(c)[0], c)
        return list(make_loader(dataset, seed=3, start=first, stop=6))

    whole = batches(0)
    for a, b in zip(whole, batches(2), strict=True):
        assert torch.equal(a.lr, b.lr) and torch.equal(a.target, b.target)
    for a, b in zip(whole[4:], batches(0, first=4), strict=True):
        assert torch.equal(a.lr, b.lr) and torch.equal(a.coord, b.coord)
