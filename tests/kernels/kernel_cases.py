"""The cases that the splat kernels are proved on, and what one run of a case finds.

    TRITON_INTERPRET=1 python tests/kernels/kernel_cases.py           # all of them, JSON on stdout
    TRITON_INTERPRET=1 python tests/kernels/kernel_cases.py K9 down   # with K9 or down in the name
    python tests/kernels/kernel_cases.py --device cuda                # on a GPU
    python tests/kernels/kernel_cases.py --list

A case is drawn from its name, so that it stays the same whatever stands before it in the list. Its
operator, forward and backward, is compared with `gsr.ops.reference` in float64 and PyTorch's own
gradients of it. What a kernel reads lies among NaNs, what it writes is full of them before and lies
among numbers that have to survive. So a load or store out of bounds, and a store that is missing,
show on the interpreter too.

Triton decides on its interpreter when a kernel is decorated, hence a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # under pytest the checkout is on the path already
    sys.path.insert(0, str(ROOT))

from gsr.ops import reference  # noqa: E402
from gsr.ops.arguments import Gaussians, Grid, Weighting  # noqa: E402

GRADIENTS = ("d_values", "d_sigma", "d_rho", "d_opacity", "d_offset")
OUT, GRAD, HALF = 1e-5, 1e-4, 1e-6  # the tolerances, see `tolerances`


@dataclass(frozen=True)
class Case:
    name: str
    lr: tuple[int, int]
    hr: tuple[int, int] | None = None  # `splat`, or None: `splat_at`
    rows: tuple[int, int] | None = None
    band: tuple[int, int] | None = None  # (top, height): `lr` rows from `top` on of that many
    points: int = 0
    where: str = "spread"  # see `draw_points`
    b: int = 1
    k: int = 1
    c: int = 3
    radius: int = 1
    offset: bool = True
    normalize: bool = True
    eps: float = 0.01
    sigma: tuple[float, float] = (0.2, 1.0)
    rho: tuple[float, float] = (-0.9, 0.9)
    opacity: tuple[float, float] = (0.0, 1.0)
    dtype: str = "float32"
    views: bool = False  # inputs transposed, sliced and expanded
    part: bool = False  # the values are channels of a larger tensor, as a head has them
    grad: str = "drawn"  # or ones, as .sum() sends; or transposed
    arch: str = ""  # with the block sizes of this architecture, not of the machine's
    # Where float32 itself is further from float64 than the usual tolerance, the reason. The bound
    # is then FLOAT32 times the error of `gsr.ops.reference` run in float32 on the same numbers.
    rounding: str = ""

    @property
    def op(self) -> str:
        return "splat_at" if self.hr is None else "splat"


FLOAT32 = 4.0

CANCELS = (
    "one Gaussian and a small eps: out is nearly its value whatever its weight, and the weight's "
    "gradient is what is left of a difference of nearly equal numbers"
)

CASES = [
    # ---- the grid: sizes and scales
    Case("odd", (3, 5), (7, 13)),
    Case("x1", (3, 4), (3, 4), k=2),
    Case("x2", (3, 4), (6, 8)),
    Case("x3 even LR", (2, 4), (6, 12)),
    Case("x4", (1, 3), (4, 12), k=4),
    Case("x8.5", (1, 2), (4, 17)),
    Case("x30", (1, 1), (30, 7), radius=0),
    Case("x30 across", (1, 2), (2, 60)),
    Case("one pixel to one", (1, 1), (1, 1)),
    Case("one pixel, window off the image", (1, 1), (2, 3), radius=3),
    Case("one row", (1, 9), (4, 22)),
    Case("one column", (4, 1), (9, 2)),
    Case("anisotropic tall", (1, 7), (11, 9)),
    Case("anisotropic wide", (2, 2), (3, 13)),
    Case("up one way, down the other", (2, 10), (7, 6), k=2),
    Case("down 0.6", (5, 5), (3, 3), k=2),
    Case("down 0.5, all ties", (4, 6), (2, 3), k=2),
    Case("down to one pixel", (4, 7), (1, 1), radius=2),
    Case("ties x1.5", (2, 4), (3, 6), k=2),
    Case("two blocks of columns", (1, 37), (2, 75)),
    Case("exactly one block", (1, 32), (3, 96)),
    Case("batch 3", (1, 3), (2, 7), b=3, k=2),
    # ---- the grid: shape of the sum
    Case("C1 K1 R0", (3, 4), (7, 9), c=1, radius=0),
    Case("C2", (2, 3), (5, 4), c=2),
    Case("C4", (2, 3), (5, 4), c=4),
    Case("C5 R2", (2, 4), (3, 6), c=5, radius=2),
    Case("C8 R3, the field", (2, 5), (3, 9), c=8, radius=3, offset=False),
    Case("C16 R1", (2, 3), (4, 7), c=16),
    Case("C19", (2, 3), (3, 5), c=19),
    Case("K3 R2", (1, 4), (2, 7), k=3, radius=2),
    Case("K9", (1, 3), (2, 5), k=9),
    # ---- the grid: weights
    Case("no offset", (3, 4), (5, 7), offset=False),
    Case("not normalized", (3, 4), (5, 7), k=2, normalize=False),
    Case("not normalized, no offset", (2, 4), (3, 7), b=2, offset=False, normalize=False),
    Case("thin", (2, 3), (3, 7), k=2, sigma=(0.05, 0.1)),
    Case("wide", (3, 3), (4, 5), sigma=(2.5, 3.0), radius=2),
    Case("both", (2, 4), (3, 9), k=2, sigma=(0.05, 3.0)),
    Case("rho +0.99", (2, 3), (3, 7), k=2, rho=(0.98, 0.99)),
    Case("rho -0.99", (2, 3), (3, 7), k=2, rho=(-0.99, -0.98)),
    Case("rho 0.99, thin, small eps", (2, 3), (5, 7), k=2, rho=(0.98, 0.99), sigma=(0.05, 0.3),
         eps=1e-6),
    Case("transparent", (2, 3), (3, 5), k=2, opacity=(0.0, 0.0)),
    Case("small eps", (2, 3), (3, 5), k=4, sigma=(0.4, 1.0), eps=1e-6),
    Case("one Gaussian, small eps", (2, 3), (5, 7), radius=0, eps=1e-6, sigma=(0.4, 1.0),
         opacity=(0.5, 1.0), rounding=CANCELS),
    # ---- the grid: rows, storage, layout
    Case("rows, the first", (3, 4), (8, 9), rows=(0, 1), k=2),
    Case("rows, the last", (3, 4), (8, 9), rows=(7, 8), k=2),
    Case("rows within a cell", (3, 2), (17, 5), rows=(7, 10)),
    Case("rows across cells", (3, 4), (8, 7), rows=(2, 6), b=2),
    Case("rows, not normalized", (3, 4), (8, 9), rows=(3, 7), normalize=False),
    Case("rows, down", (6, 5), (4, 3), rows=(1, 3), radius=2),
    Case("band", (4, 4), (25, 9), rows=(9, 14), band=(2, 9), b=2, k=2),
    Case("band, the first rows", (3, 3), (13, 7), rows=(0, 4), band=(0, 7)),
    Case("band, the last rows", (5, 3), (9, 7), rows=(7, 9), band=(6, 11), radius=2, offset=False),
    Case("band, not normalized", (3, 4), (25, 9), rows=(11, 13), band=(3, 9), normalize=False),
    Case("bfloat16", (2, 4), (3, 7), k=2, dtype="bfloat16"),
    Case("float16", (2, 4), (3, 7), k=2, dtype="float16"),
    Case("bfloat16, not normalized", (2, 3), (5, 7), c=5, dtype="bfloat16", normalize=False),
    Case("bfloat16 rows of ones", (3, 4), (7, 9), rows=(2, 6), dtype="bfloat16", grad="ones"),
    Case("float16 views", (2, 4), (3, 7), b=2, dtype="float16", views=True),
    Case("views", (2, 4), (3, 7), b=2, k=2, views=True, grad="transposed"),
    Case("views, no offset", (2, 4), (3, 7), b=2, views=True, offset=False, grad="ones"),
    Case("values of a larger tensor", (2, 4), (3, 7), b=2, k=2, part=True),
    Case("C11 of a larger tensor", (2, 3), (3, 5), b=2, k=2, c=11, part=True, dtype="float16"),
    Case("ones", (2, 4), (3, 7), k=2, grad="ones"),
    Case("ones, not normalized", (2, 4), (3, 7), k=2, grad="ones", normalize=False),
    # ---- the grid: block sizes
    Case("sm_80 x4", (1, 3), (4, 12), arch="sm_80"),
    Case("gfx942 x4", (1, 65), (4, 262), arch="gfx942"),
    Case("gfx942 x8", (1, 2), (8, 16), c=8, arch="gfx942"),
    # ---- points
    Case("at gfx942", (2, 66), points=70, k=2, arch="gfx942"),
    Case("at odd", (3, 5), points=37, k=2, b=2),
    Case("at one", (4, 3), points=1, k=2),
    Case("at outside", (3, 4), points=19, where="outside"),
    Case("at far outside", (3, 4), points=9, where="far"),
    Case("at ties", (3, 4), points=25, where="ties", k=2),
    Case("at ties, float64", (3, 4), points=25, where="ties float64", radius=0),
    Case("at centres", (3, 4), points=12, where="centres"),
    Case("at grid, float64", (2, 3), points=35, where="grid float64", k=2),
    Case("at one pixel", (1, 1), points=7, radius=3),
    Case("at more points than a block", (2, 3), points=140),
    Case("at crowd in a cell", (3, 4), points=30, where="crowd"),
    Case("at few of many cells", (4, 33), points=3),
    Case("at C1 R0", (3, 4), points=20, c=1, radius=0),
    Case("at C8 R3", (3, 5), points=20, c=8, radius=3, offset=False),
    Case("at C16", (2, 3), points=15, c=16),
    Case("at K9", (2, 3), points=15, k=9),
    Case("at R2, no offset", (3, 4), points=20, k=2, radius=2, offset=False),
    Case("at not normalized", (3, 4), points=20, k=2, normalize=False),
    Case("at thin and wide", (3, 4), points=20, k=2, sigma=(0.05, 3.0)),
    Case("at rho 0.99", (3, 4), points=20, k=2, rho=(0.98, 0.99)),
    Case("at transparent", (3, 4), points=11, opacity=(0.0, 0.0)),
    Case("at bfloat16", (2, 4), points=20, k=2, dtype="bfloat16"),
    Case("at float16, not normalized", (2, 4), points=20, dtype="float16", normalize=False),
    Case("at views", (2, 4), points=20, b=2, k=2, views=True, grad="transposed"),
    Case("at ones", (2, 4), points=20, k=2, grad="ones"),
    Case("at values of a larger tensor", (2, 4), points=20, b=2, k=2, part=True),
]  # fmt: skip

# Too large for the interpreter.
LARGE = [
    Case("large x4", (67, 101), (268, 404), b=2, k=4, dtype="float32"),
    Case("large field", (48, 61), (149, 245), b=2, c=8, radius=3, offset=False),
    Case("large K9", (33, 70), (101, 333), k=9),
    Case("large R2", (40, 129), (160, 516), k=4, radius=2),
    Case("large rows", (64, 64), (256, 256), rows=(37, 90), k=4),
    Case("large x30", (3, 5), (90, 150), k=4),
    Case("large down", (120, 90), (72, 54), k=4),
    Case("large bfloat16", (64, 67), (256, 260), k=4, dtype="bfloat16"),
    Case("large float16 C16", (40, 35), (160, 140), c=16, radius=2, dtype="float16"),
    Case("large at", (48, 48), points=2304, b=16, k=4),
    Case("large at field", (48, 48), points=2304, b=4, c=8, radius=3, offset=False),
    Case("large at crowd", (16, 40), points=3000, where="crowd", b=2, k=4),
    Case("large at more points than cells", (5, 7), points=20000, k=4),
]
assert len({case.name for case in CASES + LARGE}) == len(CASES + LARGE)


# ---- drawing a case -----------------------------------------------------------------------------


def draw_points(case: Case, rand) -> Tensor:
    """[B, Q, 2] in the image and up to 1.5 LR pixels around it, or as `case.where` says."""
    h, w = case.lr
    size = torch.tensor([h, w], dtype=torch.float64)
    kind, _, dtype = case.where.partition(" ")
    p = rand(case.b, case.points, 2).double()
    p = {
        "spread": lambda: p * (size + 3) - 2,
        "outside": lambda: (p * 2).round() * (size + 2) - 1.7 + 0.5 * p,
        "far": lambda: (p - 0.5) * 1e4,
        "ties": lambda: (p * (2 * size + 2)).floor() / 2 - 1,  # every one a multiple of 1/2
        "centres": lambda: (p * size).floor(),
        "grid": lambda: reference.grid_points(h, w, (5, 7)).expand(case.b, -1, -1),
        "crowd": lambda: torch.where(
            torch.arange(case.points)[:, None] % 10 < 9, (size // 2) + p - 0.5, p * size - 0.5
        ),
    }[kind]()
    return p.to(getattr(torch, dtype or "float32"))


def guarded(tensor: Tensor, guard: float = math.nan, margin: int = 4096) -> Tensor:
    """A contiguous copy with margins before and behind it that are full of `guard`."""
    n = tensor.numel()
    buffer = tensor.new_full((n + 2 * margin,), guard)
    buffer[margin : margin + n] = tensor.reshape(-1)
    return buffer[margin : margin + n].view(tensor.shape)


def as_view(tensor: Tensor) -> Tensor:
    """The same numbers, every other one of a transposed buffer."""
    wide = torch.stack([tensor.mT, torch.full_like(tensor.mT, math.nan)], dim=-1).flatten(-2)
    return wide[..., ::2].mT


def draw(case: Case, device) -> tuple[Gaussians, tuple[Grid | Tensor, Weighting]]:
    """The Gaussians, and the other two arguments of the reference."""
    seed = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    dtype = getattr(torch, case.dtype)
    b, k, (h, w) = case.b, case.k, case.lr

    def rand(*shape):
        return torch.rand(*shape, generator=seed)

    def between(bounds, *shape):
        return bounds[0] + (bounds[1] - bounds[0]) * rand(b, k, *shape, h, w)

    gaussians = Gaussians(
        between((-1.0, 1.0), case.c),
        between(case.sigma, 2),
        between(case.rho),
        between(case.opacity),
        between((-0.5, 0.5), 2) if case.offset else None,
    )
    if case.op == "splat":
        where = Grid(case.hr, case.rows or (0, case.hr[0]), case.band or (0, h))
    else:
        where = (as_view if case.views else guarded)(draw_points(case, rand).to(device))
    gaussians = gaussians.map(lambda t: t.to(device, dtype)).map(as_view if case.views else guarded)
    if case.views:
        opacity = gaussians.opacity[:1, :1, :, :1].expand(b, k, h, w)
        gaussians = gaussians._replace(opacity=opacity)
    if case.part:
        values = gaussians.values
        around = torch.full_like(values, math.nan)
        values = torch.cat([around, values, around], dim=2)[:, :, case.c : 2 * case.c]
        gaussians = gaussians._replace(values=values)
    return gaussians, (where, Weighting(case.radius, case.normalize, case.eps))


def draw_grad(case: Case, shape, device) -> Tensor:
    dtype = getattr(torch, case.dtype)
    if case.grad == "ones":
        return torch.ones((), device=device, dtype=dtype).expand(shape)
    seed = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    grad = torch.randn(shape, generator=seed).to(device, dtype)
    return as_view(grad) if case.grad == "transposed" else guarded(grad)


# ---- running one --------------------------------------------------------------------------------


class GuardedAllocations:
    """What torch.empty and empty_like give meanwhile is full of NaN and lies among GUARDs.

    `disturbed()` counts the GUARDs that something has been written over.
    """

    GUARD = 2.0**14  # a number that every floating type has

    def __enter__(self):
        self.views = []
        allocate = torch.full

        def empty(*size, **options):
            size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            if not options.get("dtype", torch.float32).is_floating_point:
                return allocate(size, 0, **options)
            self.views.append(guarded(allocate(size, math.nan, **options), self.GUARD))
            return self.views[-1]

        def empty_like(tensor, dtype=None):
            return empty(*tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

        self.patches = [
            mock.patch.object(torch, "empty", empty),
            mock.patch.object(torch, "empty_like", empty_like),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()

    def disturbed(self) -> int:
        if not self.views:
            raise AssertionError("the launcher allocates by other means than torch.empty")
        found = 0
        for view in self.views:
            buffer = view.new_empty(0).set_(view.untyped_storage())
            found += int((buffer != self.GUARD).sum() - (view != self.GUARD).sum())
        return found


@contextlib.contextmanager
def block_sizes(case: Case, kernels):
    if not case.arch:
        yield
        return
    configs = importlib.import_module("gsr.kernels.configs")

    def splat_config(kind, device, scale, **more):
        return configs.choose_splat(kind, case.arch, scale, **more)

    def points_config(kind, device):
        return configs.choose_points(kind, case.arch)

    with (
        mock.patch.object(kernels, "splat_config", splat_config),
        mock.patch.object(kernels, "points_config", points_config),
    ):
        yield


def run_kernels(case: Case, device, kernels) -> tuple[Tensor, Gaussians, int]:
    """Output, gradients, and how many numbers beside the allocated ones were written."""
    gaussians, rest = draw(case, device)
    suffix = "" if case.op == "splat" else "_at"
    with GuardedAllocations() as allocations, block_sizes(case, kernels):
        out = getattr(kernels, "forward" + suffix)(gaussians, *rest)
        grad = draw_grad(case, out.shape, device)
        gradients = getattr(kernels, "backward" + suffix)(grad, gaussians, *rest)
        disturbed = allocations.disturbed()
    return out, gradients, disturbed


def run_reference(case: Case, device, dtype) -> tuple[Tensor, list[Tensor | None]]:
    gaussians, (where, weighting) = draw(case, device)
    leaves = gaussians.map(
        lambda t: t.to(dtype, memory_format=torch.contiguous_format, copy=True).requires_grad_()
    )
    whole = leaves
    if case.band:  # the truth is that of the whole image, whatever is around
        top, height = case.band
        around = (0, 0, top, height - top - case.lr[0])
        whole = leaves.map(lambda t: F.pad(t, around, value=0.5))
        where = where._replace(band=(0, height))
    oracle = reference.splat if case.op == "splat" else reference.splat_at
    out = oracle(whole, where, weighting)
    grad = draw_grad(case, out.shape, device).to(dtype)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(out, wanted, grad))
    return out.detach(), [None if t is None else next(found) for t in leaves]


def largest(tensor: Tensor) -> float:
    """Largest magnitude; infinite where there is a NaN."""
    found = tensor.abs().max().item() if tensor.numel() else 0.0
    return math.inf if math.isnan(found) else found


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def compare(out, gradients, true_out, true_gradients) -> dict[str, float]:
    """Largest error of the output, and of each gradient relative to the largest of its values."""
    errors = {}
    if out.dtype in (torch.bfloat16, torch.float16):
        # By how much an element is further off than it may be.
        allowed = 2 * (true_out.to(out.dtype).double() - true_out).abs()
        if out.dtype == torch.bfloat16 and interpreted():
            # There a float32 becomes a bfloat16 by cutting digits off: up to a unit of the last.
            allowed = torch.exp2(torch.frexp(true_out).exponent.double() - 8)
        excess = (out.double() - true_out).abs() - allowed
        errors["out"] = math.inf if excess.isnan().any() else max(excess.max().item(), 0.0)
    else:
        errors["out"] = largest(out.double() - true_out)
    for name, ours, true in zip(GRADIENTS, gradients, true_gradients, strict=True):
        if true is None or ours is None:
            errors[name] = 0.0 if true is ours else math.inf
        elif ours.shape != true.shape:
            errors[name] = math.inf
        else:
            # A gradient that is nought everywhere has no scale; its error is to be nought too.
            errors[name] = largest(ours.double() - true) / max(largest(true), 1e-12)
    return errors


def run_case(case: Case, device="cpu", kernels=None) -> dict[str, float]:
    """Errors of the kernels on a case. `beside` counts stores outside of what was allocated.

    With `case.rounding` the entries `float32 out`, ... hold the same errors of `gsr.ops.reference`
    in float32.
    """
    kernels = kernels or importlib.import_module("gsr.kernels.splat")
    out, gradients, beside = run_kernels(case, device, kernels)
    truth = run_reference(case, device, torch.float64)
    errors = compare(out, gradients, *truth)
    errors["beside"] = beside
    if case.rounding:
        plain = compare(*run_reference(case, device, torch.float32), *truth)
        errors |= {f"float32 {name}": error for name, error in plain.items()}
    return errors


def tolerances(case: Case, errors: dict[str, float]) -> dict[str, float]:
    """Output to 1e-5, each gradient to 1e-4 of its largest value.

    Stored in 16 bits: no element further from the truth than twice what rounding the truth costs,
    plus 1e-6. Nothing is stored out of bounds. `case.rounding` says where float32 is worse.
    """
    bounds = {"out": HALF if case.dtype.endswith("float16") else OUT, "beside": 0}
    bounds |= dict.fromkeys(GRADIENTS, GRAD)
    for name in bounds:
        bounds[name] = max(bounds[name], FLOAT32 * errors.get(f"float32 {name}", 0))
    return bounds


def failures(case: Case, errors: dict[str, float]) -> list[str]:
    bounds = tolerances(case, errors)
    return [
        f"{name} {errors[name]:.2g} > {bound:.2g}"
        for name, bound in bounds.items()
        if not errors[name] <= bound
    ]


def differing(case: Case, device, kernels=None) -> int:
    """How many numbers of two runs are not the same bits."""
    kernels = kernels or importlib.import_module("gsr.kernels.splat")
    one, two = (run_kernels(case, device, kernels) for _ in range(2))
    pairs = zip([one[0], *one[1]], [two[0], *two[1]], strict=True)
    return sum(int((a != b).sum()) for a, b in pairs if a is not None)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Run the kernels' cases; JSON on stdout.")
    parser.add_argument("select", nargs="*", help="parts of names; none: all")
    parser.add_argument("--device", default="cpu", help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--large", action="store_true", help="the large cases too")
    parser.add_argument("--repeat", help="also run this case twice and count differing numbers")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    arguments = parser.parse_args(argv)
    cases = [
        case
        for case in CASES + (LARGE if arguments.large else [])
        if not arguments.select or any(part in case.name for part in arguments.select)
    ]
    if arguments.list:
        print(*cases, sep="\n")
        return 0
    results, failed = {}, 0
    for case in cases:
        start = time.process_time()
        errors = run_case(case, arguments.device)
        wrong = failures(case, errors)
        failed += bool(wrong)
        seconds = round(time.process_time() - start, 3)
        results[case.name] = {"errors": errors, "failures": wrong, "seconds": seconds}
    report = {"cases": results}
    if arguments.repeat:
        case = next(case for case in CASES + LARGE if case.name == arguments.repeat)
        report["differing"] = differing(case, arguments.device)
    print(json.dumps(report, indent=1))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
