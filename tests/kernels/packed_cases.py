"""Cases of the packed kernels of `direct`, against `gsr.ops.reference` in float64.

python tests/kernels/packed_cases.py [part of a name ...], with TRITON_INTERPRET=1 where there is no
GPU: JSON of their errors on stdout.
"""

import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from kernel_cases import GuardedAllocations, guarded  # noqa: E402

from gsr.kernels import configs, packed  # noqa: E402
from gsr.ops import reference  # noqa: E402
from gsr.ops.arguments import Grid, Packed, Weighting  # noqa: E402
from gsr.ops.resize import bicubic  # noqa: E402

SIGMA, REACH, EPS = (0.1, 0.4), 0.5, 0.01


@dataclass(frozen=True)
class Case:
    lr: tuple[int, int]
    hr: tuple[int, int]
    rows: tuple[int, int] | None = None
    band: tuple[int, int] | None = None
    b: int = 1
    k: int = 2
    radius: int = 1
    normalize: bool = True
    last: bool = False  # channels_last, as convolutions on a GPU leave it
    dtype: torch.dtype = torch.float32
    small: bool = False  # blocks as for a small image
    opacity: float = 0.0  # added to its logits
    arch: str = "default"


CASES = {
    "x1": Case((3, 4), (3, 4)),
    "x2": Case((3, 5), (6, 10), b=2, last=True),
    "x2.5": Case((4, 6), (10, 15)),
    "x3.7": Case((3, 4), (11, 15), last=True),
    "x4, K9": Case((2, 3), (8, 12), k=9),
    "x4.1": Case((10, 3), (41, 12), k=1),
    "x5": Case((2, 3), (10, 15)),
    "x8": Case((2, 2), (16, 16), k=1),
    "x8.5": Case((2, 2), (17, 17), k=1),
    "one pixel": Case((1, 1), (5, 7), radius=2),
    "wide row": Case((1, 37), (2, 93), k=1),
    "tall, narrow": Case((7, 1), (11, 3)),
    "down 0.6": Case((5, 5), (3, 3)),
    "R0": Case((3, 4), (7, 9), radius=0, k=3),
    "R3": Case((4, 5), (9, 11), radius=3, k=1),
    "not normalized": Case((3, 4), (7, 10), normalize=False),
    "batch 3": Case((2, 3), (5, 6), b=3),
    "rows within a cell": Case((3, 3), (17, 7), rows=(7, 10)),
    "rows across cells": Case((4, 3), (10, 7), rows=(3, 8), b=2),
    "band": Case((7, 4), (25, 9), rows=(9, 14), band=(1, 9), b=2),
    "band, the last rows": Case((4, 3), (27, 7), rows=(25, 27), band=(5, 9), last=True),
    "small blocks": Case((2, 3), (5, 8), small=True),
    "bfloat16": Case((3, 4), (8, 10), dtype=torch.bfloat16, last=True),
    "nearly transparent": Case((3, 4), (8, 10), opacity=-20.0),
    "transparent": Case((2, 3), (4, 6), opacity=-200.0),
    "gfx942": Case((1, 66), (3, 132), k=1, arch="gfx942"),
}  # fmt: skip


def quads(packed: Packed) -> torch.Tensor:
    """All nine numbers, [B, K, h, 9 w]."""
    return torch.cat([t.contiguous().view(torch.float32) for t in packed], dim=-1)


def run_case(name: str, device="cpu", kernels=packed) -> dict[str, float]:
    """Largest errors of the packed numbers, of the image and of its levels (far from halves)."""
    case = CASES[name]
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    (h, w), b = case.lr, case.b
    raw = torch.randn(b, case.k, 9, h, w, generator=g)
    raw[:, :, 8] += case.opacity
    raw = guarded(raw.flatten(1, 2).to(device, case.dtype))
    if case.last:
        raw = guarded(raw.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    lr = guarded(torch.rand(b, 3, h, w, generator=g).to(device))
    grid = Grid(case.hr, case.rows or (0, case.hr[0]), case.band or (0, h))
    weighting = Weighting(case.radius, case.normalize, EPS)
    true = reference.direct_gaussians(raw.double(), case.k, SIGMA, REACH)
    base = bicubic(lr.double(), *grid)
    whole = true
    if case.band:  # what is around does not matter
        top, height = case.band
        around = (0, 0, top, height - top - h)
        whole = true.map(lambda t: torch.nn.functional.pad(t, around, value=0.5))
    image = base + reference.splat(whole, grid._replace(band=(0, grid.band[1])), weighting)
    cells = (1, 1) if case.small else (10_000, 10_000)

    def packed_config(_, scale, cells=None, many=cells):
        return configs.choose_packed(case.arch, scale, many)

    with (
        GuardedAllocations() as allocations,
        mock.patch.object(kernels, "packed_config", packed_config),
    ):
        ours = kernels.pack(raw, case.k, SIGMA, REACH)
        out = kernels.splat(ours, lr, grid, weighting)
        levels = kernels.splat(ours, lr, grid, weighting, levels=True)
        disturbed = allocations.disturbed()
    wanted = quads(reference.pack(true.map(torch.Tensor.float)))
    found = quads(ours)
    # float32's own tanh ends at 1, and log2(opacity) of nothing is -inf or far below any weight.
    far = (found < -130) & (wanted < -130)
    error = ((found - wanted).abs() / (1 + wanted.abs())).masked_fill(far, 0)
    exact = (image.clamp(0, 1) * 255).permute(0, 2, 3, 1)
    unsure = (exact - exact.floor() - 0.5).abs() < 0.01
    wrong = (levels.double() - exact.round()).abs().masked_fill(unsure, 0)
    assert levels.shape == exact.shape and levels.dtype == torch.uint8
    assert unsure.double().mean() < 0.1
    return {
        "beside": disturbed,
        "packed": _largest(error),
        "out": _largest(out.double() - image),
        "levels": _largest(wrong),
    }


def _largest(error: torch.Tensor) -> float:
    return float("inf") if error.isnan().any() else error.abs().max().item()


BOUNDS = {"beside": 0, "packed": 1e-5, "out": 1e-5, "levels": 0}


def failures(errors: dict[str, float]) -> list[str]:
    """What of `run_case`'s errors is out of bounds (NaN is)."""
    return [f"{k} {v:.2g}" for k, v in errors.items() if not v <= BOUNDS[k]]


if __name__ == "__main__":
    on = "cuda" if "--cuda" in sys.argv else "cpu"
    parts = [part for part in sys.argv[1:] if part != "--cuda"]
    some = [n for n in CASES if not parts or any(part in n for part in parts)]
    found = {name: run_case(name, on) for name in some}
    wrong = {name: failures(errors) for name, errors in found.items() if failures(errors)}
    print(json.dumps({"failures": wrong} if on == "cuda" else found))
