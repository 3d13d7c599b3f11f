"""Shared by the tests: a model small enough to run everywhere, and a small image."""

import numpy as np
import pytest
import torch

from gsr.config import DirectConfig, EncoderConfig, ModelConfig

TINY = ModelConfig(
    encoder=EncoderConfig(n_feats=8, n_blocks=1), direct=DirectConfig(gaussians=2, width=8)
)


@pytest.fixture
def tiny_model():
    """A `direct` model with random weights everywhere (a fresh one adds nothing to bicubic)."""
    from gsr.models import GaussianSR

    torch.manual_seed(0)
    model = GaussianSR(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model.eval()


@pytest.fixture
def image():
    """uint8 [12, 17, 3]: smooth, so that results are comparable, and different in channels."""
    y, x = np.mgrid[0:12, 0:17]
    channels = [120 + 80 * np.sin(x / 3 + k) * np.cos(y / (2 + k)) for k in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


picture = image  # its former name


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA or AMD GPU; skipped without one")


def pytest_terminal_summary(terminalreporter):
    """Says how much was not tried, which a row of s among the dots does not."""
    reason = "no CUDA device"
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("cuda" in r.keywords and reason in str(r.longrepr) for r in skipped)
    if count:
        terminalreporter.write_line(f"GPU tier: {count} tests skipped, {reason}")
