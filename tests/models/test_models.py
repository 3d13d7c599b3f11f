"""What the three modes share: which images, sizes and scales a model takes."""

import numpy as np
import pytest
import torch

from gsr.config import BankConfig, EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.models import GaussianSR
from gsr.models.registry import HEADS
from gsr.models.sizes import resolve_size


@pytest.mark.parametrize(
    "lr",
    [
        torch.rand(3, 8, 8),
        torch.rand(1, 1, 8, 8),
        torch.rand(1, 3, 0, 8),
        torch.rand(8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=lambda lr: f"{lr.dtype} {list(lr.shape)}",
)
def test_other_tensors_are_refused(tiny_model, lr):
    for call in (tiny_model.encode, lambda lr: tiny_model(lr, scale=2)):
        with pytest.raises(InputError) as caught:
            call(lr)
        assert str(caught.value).endswith(f"[0, 1], not {lr.dtype} {list(lr.shape)}")


@pytest.mark.parametrize("mode", HEADS)
def test_every_head_takes_seeds(mode):
    """`train.py` gives them to every model; the noise of a bank's training alone uses them."""
    config = ModelConfig(mode, EncoderConfig(n_feats=12, n_blocks=1), bank=BankConfig(points=9))
    model, lr = GaussianSR(config), torch.rand(2, 3, 8, 8)
    a, b, c = (model.train().encode(lr, seeds) for seeds in ([1, 2], [1, 2], [1, 3]))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    drawn = mode in ("field", "official")
    assert all(torch.equal(*pair) for pair in zip(a, c, strict=True)) != drawn
    a, b = (model.eval().encode(lr, seeds) for seeds in ([1, 2], None))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", [(2, 7, 2), (1, 0, 2), (1, 7, 3), (7, 2)])
def test_other_points_are_refused(tiny_model, shape):
    encoded = tiny_model.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"coord must be \[1, Q, 2\], Q at least 1, not \["):
        tiny_model.query(encoded, (16, 16), torch.zeros(shape))


@pytest.mark.parametrize("rows", [(4, 4), (6, 4), (-1, 3), (0, 17)])
def test_rows_that_are_none_are_refused(tiny_model, rows):
    encoded = tiny_model.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match="are not rows of an image of height 16"):
        tiny_model.render(encoded, (16, 16), rows=rows)


def test_resolve_size():
    assert resolve_size((12, 17), scale=2) == ((24, 34), (2.0, 2.0))
    assert resolve_size((12, 17), scale=torch.tensor([1.5, 2])) == ((18, 34), (1.5, 2.0))
    assert resolve_size((12, 17), size=torch.Size([24, 17])) == ((24, 17), (2.0, 1.0))
    size, scale = resolve_size((12, 17), np.array([25, 34]), scale=2.1)
    assert size == (25, 34) and scale == (2.1, 2.1) and type(size[0]) is int


@pytest.mark.parametrize(
    "size, scale, sentence",
    [
        (None, None, "give size=(H, W) or scale"),
        (24, None, "two whole numbers"),
        ((24,), None, "two whole numbers"),
        ((24, 34, 3), None, "two whole numbers"),
        ((24.0, 34), None, "two whole numbers"),
        ("24", None, "two whole numbers"),
        ((0, 34), None, "positive"),
        ((2**31, 34), None, "below 2^31"),
        (None, 0.01, "positive"),  # no pixel left
        (None, 1e308, "positive and at most 1,000,000"),
        (None, float("nan"), "positive and at most 1,000,000"),
        ((24, 34), -1, "positive and at most 1,000,000"),
        ((24, 34), (1, 2, 3), "a number or (s_y, s_x)"),
    ],
)
def test_sizes_that_are_refused(size, scale, sentence):
    with pytest.raises(InputError) as caught:
        resolve_size((12, 17), size, scale)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
