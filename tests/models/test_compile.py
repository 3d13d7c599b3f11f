"""torch.compile around the operators: one graph for all sizes, the same results."""

import pytest
import torch
import torch._dynamo.testing

from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig
from gsr.models import GaussianSR


def make(mode):
    torch.manual_seed(0)
    return GaussianSR(
        ModelConfig(
            mode=mode,
            encoder=EncoderConfig(n_feats=12, n_blocks=1),
            bank=BankConfig(points=9),
            decoder=DecoderConfig(hidden_dim=16, hidden_list=[16]),
        )
    ).eval()


SIZES = [
    (12, 13, 2), (20, 31, 3.3), (15, 15, 4), (33, 18, 2.5), (40, 24, 1.7),
    (16, 48, 6), (25, 26, 8), (17, 19, 3), (14, 50, 1.2), (21, 21, 2.2),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_no_compilation_after_the_first_two_of_ten_sizes_and_scales(mode):
    """PyTorch takes another convolution for small images when it has several threads: hence two."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager, compiled = make(mode), make(mode).compile(backend=counter)
    counts = []
    with torch.inference_mode():
        for h, w, scale in SIZES:
            lr = torch.rand(1, 3, h, w)
            torch.testing.assert_close(
                compiled(lr, scale=scale), eager(lr, scale=scale), atol=1e-5, rtol=0
            )
            counts.append(counter.frame_count)
    # A first compilation may reach the backend twice; what matters is that sizes are not baked in.
    assert counts[0] >= 1 and counts[1] == counts[-1] <= 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_inductor(mode):
    torch._dynamo.reset()
    eager, compiled = make(mode), make(mode).compile()
    with torch.inference_mode():
        for h, w, scale in SIZES[:3]:
            lr = torch.rand(1, 3, h, w)
            torch.testing.assert_close(
                compiled(lr, scale=scale), eager(lr, scale=scale), atol=1e-5, rtol=0
            )
