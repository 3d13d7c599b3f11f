"""Cases of the decoder's kernel, against `gsr.ops.decode.reference`; JSON of errors on stdout.

    TRITON_INTERPRET=1 python tests/kernels/decode_cases.py
    python tests/kernels/decode_cases.py --cuda

Where there is no GPU, blocks are smaller than shipped, so that a small image takes several of them.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from kernel_cases import GuardedAllocations, guarded, interpreted, largest  # noqa: E402

from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig  # noqa: E402
from gsr.kernels import configs, decode  # noqa: E402
from gsr.models import GaussianSR  # noqa: E402
from gsr.models.heads import decode_gpu  # noqa: E402
from gsr.ops import decode as operator  # noqa: E402
from gsr.ops.decode import DecoderWeights, Strip, reference  # noqa: E402

SMALL = {"PIXELS": 32, "WAVES": 16, "UNITS": 16, "DEPTH": 16, "STAGES": 2, "num_warps": 4}


@dataclass(frozen=True)
class Case:
    lr: tuple[int, int]
    hr: tuple[int, int]
    rows: tuple[int, int] | None = None
    band: tuple[int, int] | None = None  # (top, height): `lr` rows from `top` on of that many
    b: int = 1
    channels: int = 16
    narrow: int = 8
    half: int = 16
    layers: int = 2
    skip: bool = False
    dtype: str = "float32"


CASES = {
    "one pixel": Case((1, 1), (1, 1)),
    "odd, more blocks than programs": Case((5, 7), (11, 17), b=2, layers=3),
    "13 channels, none splatted": Case((3, 4), (7, 9), channels=13, narrow=0),
    "blocks of phases, units, channels": Case((3, 5), (5, 11), channels=20, half=32),
    "skip": Case((4, 5), (9, 13), b=2, skip=True, narrow=3),
    "rows": Case((5, 6), (14, 9), rows=(4, 9), skip=True, b=2),
    "rows, the last": Case((5, 6), (14, 9), rows=(13, 14), b=3),
    "band": Case((6, 5), (23, 9), rows=(9, 13), band=(2, 11), skip=True),
    "narrow": Case((9, 1), (21, 1), b=3, layers=1),
    "narrow rows": Case((9, 1), (21, 2), rows=(3, 4), b=40, layers=1),
    "x0.6": Case((10, 7), (6, 4), skip=True),
    "x4.1 across": Case((2, 9), (2, 37)),
    "bfloat16": Case((4, 5), (9, 13), skip=True, layers=3, half=32, dtype="bfloat16"),
}
LARGE = {  # of the published decoder's widths, on a GPU
    name: Case((33, 47), (131, 193), b=2, channels=64, half=128, layers=4, skip=skip, dtype=dtype)
    for name, skip, dtype in [
        ("published", False, "float32"), ("published, skip", True, "float32"),
        ("published, bfloat16", False, "bfloat16"),
    ]
}  # fmt: skip


def draw(case: Case, device):
    """Features, splatted channels, LR, weights and strip; all in float32, whatever the case's."""
    g = torch.Generator().manual_seed(len(str(case)))

    def rand(*shape, scale=1.0):
        return guarded(((torch.rand(shape, generator=g) * 2 - 1) * scale).to(device))

    (h, w), (big_h, big_w), b = case.lr, case.hr, case.b
    strip = Strip(case.hr, case.rows or (0, big_h), case.band or (0, h))
    top, bottom = strip.around
    padded, units = max(16, 1 << (case.channels - 1).bit_length()), 2 * case.half
    weights = DecoderWeights(
        conv=rand(9, 4, case.half, padded, scale=2 / math.sqrt(9 * case.channels)),
        conv_bias=rand(4, case.half),
        phase=rand(case.half, scale=3),
        weights=rand(case.layers, units, units, scale=3 / math.sqrt(units)),
        biases=rand(case.layers, units),
        last=rand(3, units, scale=1 / math.sqrt(units)),
        last_bias=rand(3),
        ry=rand(big_h),
        rx=rand(big_w),
    )
    features = rand(b, case.channels, h, w)
    return (
        features, rand(b, case.narrow, bottom - top, big_w),
        rand(b, 3 if case.skip else 0, h, w), weights, strip,
    )  # fmt: skip


def run_case(case: Case, device="cpu", kernels=decode) -> dict[str, float]:
    """Largest error relative to the largest output, and stores outside of what was allocated.

    With bfloat16 also `rounded`, the error of `reference` in bfloat16.
    """
    features, splatted, lr, weights, strip = draw(case, device)
    double = DecoderWeights(*(t.double() for t in weights))
    true = reference(features.double(), splatted.double(), lr.double(), double, strip)
    errors = {}
    if case.dtype == "bfloat16":
        half = {name: guarded(getattr(weights, name).bfloat16()) for name in ("conv", "weights")}
        weights = weights._replace(**half)
        plain = reference(features, splatted, lr, weights, strip)
        errors["rounded"] = largest(plain.double() - true) / largest(true)

    def small(dtype, device, *, half, channels):
        found = configs.choose_decode("fp32", "gfx", half=half, channels=channels)
        return {**found, **SMALL}

    patch = mock.patch.object(kernels, "decode_config", small if interpreted() else decode_config)
    with GuardedAllocations() as allocations, patch:
        ours = kernels.forward(features, splatted, lr, weights, strip)
        errors["beside"] = allocations.disturbed()
    assert ours.shape == true.shape and ours.dtype == torch.float32
    errors["out"] = largest(ours.double() - true) / largest(true)
    return errors


decode_config = decode.decode_config


def run_head(mode: str) -> dict[str, float]:
    """A head with the kernel, in several strips, against its PyTorch path in float64."""
    torch.manual_seed(0)
    small = DecoderConfig(hidden_dim=10, hidden_list=[14, 7], skip=mode != "official")
    encoder, bank = EncoderConfig(n_feats=12, n_blocks=1), BankConfig(points=4)
    model = GaussianSR(ModelConfig(mode, encoder=encoder, bank=bank, decoder=small)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    lr = torch.rand(2, 3, 8, 9)
    with torch.inference_mode():
        true = model.double()(lr.double(), size=(17, 20))
        model.float()
        with (
            mock.patch.object(decode_gpu, "takes", lambda *_: True),
            mock.patch.object(operator, "has_kernel", lambda _: True),
            mock.patch.object(decode_gpu, "STRIP", 400),
        ):
            ours = model(lr, size=(17, 20))
    return {"out": largest(ours.double() - true) / largest(true)}


# A float32 result is off by 1e-5 of the largest at most. A bfloat16 one by twice what PyTorch's is;
# on the interpreter, which cuts digits off instead of rounding them, by four times.
BOUND, BFLOAT16 = 1e-5, 2


def failures(errors: dict[str, float]) -> list[str]:
    """What of `run_case`'s errors is out of bounds (NaN is)."""
    bounds = {"beside": 0, "rounded": 0.1, "out": BOUND}
    if "rounded" in errors:
        bounds["out"] = BFLOAT16 * (2 if interpreted() else 1) * errors["rounded"]
    return [f"{k} {v:.2g}" for k, v in errors.items() if not v <= bounds[k]]


if __name__ == "__main__":
    on = "cuda" if "--cuda" in sys.argv else "cpu"
    chosen = CASES | LARGE if on == "cuda" else CASES
    found = {name: run_case(case, on) for name, case in chosen.items()}
    if on == "cpu":
        found |= {f"head {mode}": run_head(mode) for mode in ("field", "official", "bicubic")}
    wrong = {name: failures(errors) for name, errors in found.items() if failures(errors)}
    print(json.dumps({"errors": found, "failures": wrong}, indent=1))
