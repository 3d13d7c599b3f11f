"""Single programs of the splat kernels in the far corner of images of billions of pixels.

    TRITON_INTERPRET=1 python tests/kernels/far_addresses.py            # errors as JSON on stdout

The tensors are files with holes: the addresses are those of a 49,990 x 49,990 image upscaled to
74,985 x 74,985, the disk holds only what is touched. A program at the end of the last row of the
last image must give what the same Gaussians give in a small image. Where an offset is computed in
32 bits, or a position loses its digits, it does not (or the process dies).

The interpreter computes integers in the widths that the compiler gives them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

if __name__ == "__main__":  # under pytest the checkout is on the path already
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gsr.ops import reference  # noqa: E402
from gsr.ops.arguments import Gaussians, Grid, Weighting  # noqa: E402
from gsr.ops.resize import bicubic  # noqa: E402

B, K, C, R, EPS = 2, 2, 3, 1, 0.01
SIDE, HR = 49_990, 74_985  # h w and H W are beyond 2^31
ROWS, COLUMNS = 6, 40  # of the corner: an even number from the end, as one LR pixel is 1.5 HR ones
HR_ROWS, HR_COLUMNS = 9, 60
TOP, LEFT = SIDE - ROWS, SIDE - COLUMNS
CELLS = 32
OWN = SIDE % CELLS  # columns of the last block
LONGEST = 30_000  # LR pixels of a row upscaled by 9 / 8
QUERIES = 1_200_000_005  # for each image
NEAR = 50  # of them are in the corner, the last ones
TOLERANCE = 1e-5
INPUTS = Gaussians._fields


@contextlib.contextmanager
def program(x: int, y: int = 0):
    """Launches run the program of these indices and no other, and copy nothing afterwards."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    set_index = interpreter.interpreter_builder.set_grid_idx

    def set_grid_idx(*_):
        interpreter.interpreter_builder.grid_dim = (x + 1, y + 1, 1)
        set_index(x, y, 0)

    with (
        mock.patch.object(interpreter.interpreter_builder, "set_grid_idx", set_grid_idx),
        # It would copy each tensor onto itself, holes included.
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None),
    ):
        yield


def run(kernels=None) -> dict[str, float]:
    """Errors relative to the largest value, of each kernel's results."""
    kernels = kernels or importlib.import_module("gsr.kernels.splat")
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(B, K, *shape, ROWS, COLUMNS, generator=g)

    # The corner, and the truth about it.
    corner = Gaussians(
        rand(C) * 2 - 1, rand(2) * 0.8 + 0.2, rand() * 1.8 - 0.9, rand(), rand(2) - 0.5
    )
    points = torch.rand(B, NEAR, 2, generator=g, dtype=torch.float64)
    points = points * torch.tensor([ROWS - 2, COLUMNS - 2]) + 1.5
    grad = torch.randn(B, C, HR_ROWS, HR_COLUMNS, generator=g)
    grad_at = torch.randn(B, NEAR, C, generator=g)
    leaves = corner.map(lambda t: t.double().requires_grad_())
    grid = Grid((HR_ROWS, HR_COLUMNS), (0, HR_ROWS), (0, ROWS))
    weighting = Weighting(R, True, EPS)
    want = reference.splat(leaves, grid, weighting)
    want_at = reference.splat_at(leaves, points, weighting)
    want_grads = torch.autograd.grad(want, leaves, grad.double())
    want_grads_at = torch.autograd.grad(want_at, leaves, grad_at.double())
    want, want_at = want.detach(), want_at.detach()
    prepared = kernels._forward(corner, grid, weighting, grad=grad)
    prepared_at = kernels._forward_at(corner, points, weighting, grad=grad_at)
    order, starts = kernels.sort_points(points, ROWS, COLUMNS)

    errors = {}
    with tempfile.TemporaryDirectory() as folder:

        def holes(name, *shape, dtype=torch.float32):
            n = torch.Size(shape).numel()
            path = f"{folder}/{name}"
            return torch.from_file(path, shared=True, size=n, dtype=dtype).view(shape)

        def far(name, tensor):
            """[..., ROWS, COLUMNS] at the end of [..., SIDE, SIDE]."""
            big = holes(name, *tensor.shape[:-2], SIDE, SIDE)
            big[..., TOP:, LEFT:] = tensor
            return big

        inputs = [far(*pair) for pair in zip(INPUTS, corner, strict=True)]
        gradients = [holes(f"d_{name}", *t.shape) for name, t in zip(INPUTS, inputs, strict=True)]
        shared = {
            "K": K, "C": C, "R": R, "NORMALIZE": True, "HAS_OFFSET": True,
        }  # fmt: skip
        strides = K * C * SIDE**2, C * SIDE**2
        block, across = SIDE // CELLS, -(-SIDE // CELLS)
        backward = ((B * K - 1) * SIDE + SIDE - 1) * across + block
        wide = kernels._wide(SIDE, SIDE, HR, HR)
        # What a program of the last block and the last row of cells has to say.
        own_y, own_x = HR_ROWS - 2, HR_COLUMNS - OWN * 3 // 2

        def compare(name, ours, true):
            error = (ours.double() - true).abs().max().item()
            errors[name] = error / max(true.abs().max().item(), 1e-12)

        def gradient_errors(name, true):
            for which, ours, t in zip(INPUTS, gradients, true, strict=True):
                # The program is that of image and k B K - 1.
                compare(
                    f"{name} d_{which}", ours[-1, -1, ..., -1, -OWN:], t[-1, -1, ..., -1, -OWN:]
                )
                ours[-1, -1, ..., -1, -OWN:] = 0

        # ---- the grid
        out = holes("out", B, C, HR, HR)
        out_prepared = holes("prepared", B, C + 1, HR, HR)
        big_grad = holes("grad", B, C, HR, HR)
        big_grad[..., -HR_ROWS:, -HR_COLUMNS:] = grad
        for prepare, target, true in ((False, out, want), (True, out_prepared, prepared.double())):
            with program((B - 1) * across + block):
                kernels.splat_forward[(1, 1, 1)](
                    *inputs, big_grad, target, *strides, SIDE, SIDE, HR, HR, 0, SIDE, 0, HR,
                    SIDE - 1, 1, 1, 1, EPS,
                    PREPARE=prepare, WIDE=wide, PY=2, PX=2, CELLS=CELLS, **shared,
                )  # fmt: skip
            found = target[-1, :, -HR_ROWS:, -HR_COLUMNS:][:, own_y:, own_x:]
            compare(f"splat_forward {prepare=}", found, true[-1, :, own_y:, own_x:])
        out_prepared[-1, :, -HR_ROWS:, -HR_COLUMNS:] = prepared[-1]
        with program(backward):
            kernels.splat_backward[(1, 1, 1)](
                out_prepared, *inputs, *gradients, *strides, SIDE, SIDE, HR, HR, 0, SIDE, 0, HR,
                WIDE=wide, CELLS=CELLS, **shared,
            )  # fmt: skip
        gradient_errors("splat_backward", want_grads)

        # ---- points
        big_points = holes("points", B, QUERIES, 2, dtype=torch.float64)
        big_points[:, -NEAR:] = points + torch.tensor([TOP, LEFT])
        out = holes("out_at", B, QUERIES, C)
        out_prepared = holes("prepared_at", B, QUERIES, C + 1)
        big_grad = holes("grad_at", B, QUERIES, C)
        big_grad[:, -NEAR:] = grad_at
        # The last program has 5 points, the one before it the other 45 and some of the holes'.
        last = (QUERIES - 1) // 128
        count = QUERIES - last * 128
        for prepare, target, true in (
            (False, out, want_at),
            (True, out_prepared, prepared_at.double()),
        ):
            with program((B - 1) * (last + 1) + last):
                kernels.points_forward[(1,)](
                    *inputs, big_points, big_grad, target, *strides, SIDE, SIDE, QUERIES, EPS,
                    PREPARE=prepare, BLOCK=128, **shared,
                )  # fmt: skip
            compare(f"points_forward {prepare=}", target[-1, -count:], true[-1, -count:])
        out_prepared[-1, -NEAR:] = prepared_at[-1]
        big_order = holes("order", B * QUERIES, dtype=torch.int64)
        big_starts = holes("starts", B * SIDE * SIDE + 1, dtype=torch.int64)
        # The corner's points of the last image alone, at the end of all points.
        mine = order[NEAR:] - NEAR
        big_order[-NEAR:] = (B * QUERIES - NEAR) + mine
        corner_starts = (
            starts[ROWS * COLUMNS : -1].view(ROWS, COLUMNS) - NEAR + (B * QUERIES - NEAR)
        )
        big_starts[:-1].view(B, SIDE, SIDE)[-1, TOP:, LEFT:] = corner_starts
        big_starts[-1] = B * QUERIES
        # A row's last cell stops where the next row's first starts, far to the left.
        big_starts[:-1].view(B, SIDE, SIDE)[-1, TOP + 1 :, 0] = corner_starts[1:, 0]
        with program(backward):
            kernels.points_backward[(1, 1, 1)](
                out_prepared, big_points, big_order, big_starts, *inputs, *gradients, *strides,
                SIDE, SIDE, CELLS=CELLS, **shared,
            )  # fmt: skip
        gradient_errors("points_backward", want_grads_at)
    return errors | longest_row_of_32_bits(kernels)


def run_windows(kernels=None) -> dict[str, float]:
    """Errors of the last program of `windows_forward` in an image of more than 2^31 numbers."""
    kernels = kernels or importlib.import_module("gsr.kernels.windows")
    window, taps, side, channels, across = 7, 5, 70, 8, 245
    ky, kx, count = side, side, channels * across * across  # the result: 17,150 x 17,150 x 8
    g = torch.Generator().manual_seed(2)
    features = torch.zeros(1, channels, window * across, window * across)
    features[0, -1, -window:, -window:] = torch.rand(window, window, generator=g)
    shared = torch.rand(window**2, taps, taps, generator=g) * 0.3
    weights = reference.window_weights(shared, (ky, kx)).reshape(-1, window**2).contiguous()
    true = reference.splat_windows(features[:, -1:, -window:, -window:], shared, (ky, kx))[0, 0]
    with tempfile.TemporaryDirectory() as folder:
        size = channels * (across * side) ** 2
        out = torch.from_file(f"{folder}/out", shared=True, size=size, dtype=torch.float32)
        pixels, columns = 64, 32
        blocks = -(-count // columns)
        # The last block of columns: of the last pixels, and of the first.
        for pixel in (-(-ky * kx // pixels) - 1, 0):
            with program(pixel * blocks + blocks - 1):
                kernels.windows_forward[(1,)](
                    features, weights, out, across, across, count, ky, kx, WINDOW=window, NP=64,
                    PIXELS=pixels, COLUMNS=columns, PRECISION="ieee",
                )  # fmt: skip
        found = out.view(channels, across * side, across * side)[-1, -side:, -side:].reshape(-1)
        ends = torch.arange(ky * kx)
        ends = (ends < pixels) | (ends >= ky * kx // pixels * pixels)
        error = (found - true.reshape(-1))[ends].abs().max().item()
    return {"windows_forward": error}


def run_packed(kernels=None) -> dict[str, float]:
    """Errors of the last programs of the packed kernels, in images of more than 2^31 numbers."""
    kernels = kernels or importlib.import_module("gsr.kernels.packed")
    g = torch.Generator().manual_seed(3)
    raw = torch.randn(K, 9, ROWS, COLUMNS, generator=g)
    lr = torch.rand(3, ROWS, COLUMNS, generator=g)
    true = reference.direct_gaussians(raw.flatten(0, 1)[None].double(), K, (0.1, 0.4), 0.5)
    grid = Grid((HR_ROWS, HR_COLUMNS), (0, HR_ROWS), (0, ROWS))
    image = bicubic(lr[None].double(), *grid) + reference.splat(true, grid, Weighting(R, True, EPS))
    corner = reference.pack(true.map(torch.Tensor.float))
    corner = [t.view(torch.float32) for t in corner]
    block, across = SIDE // CELLS, -(-SIDE // CELLS)
    errors = {}
    with tempfile.TemporaryDirectory() as folder:

        def holes(name, *shape, dtype=torch.float32):
            n = torch.Size(shape).numel()
            return torch.from_file(f"{folder}/{name}", True, n, dtype=dtype).view(shape)

        big_raw = holes("raw", B, K, 9, SIDE, SIDE)
        big_raw[-1, ..., TOP:, LEFT:] = raw
        names = {"conic": 4, "centre": 4, "blue": 1}
        big = [holes(name, B, K, SIDE, n * SIDE) for name, n in names.items()]
        with program(((B - 1) * SIDE + SIDE - 1) * across + block):
            kernels.packed_gaussians[(1,)](
                big_raw, *big, 9 * K * SIDE**2, SIDE**2, SIDE, 1, SIDE, SIDE, 0.1, 0.4, 0.5,
                K=K, CELLS=CELLS,
            )  # fmt: skip
        for (name, n), ours, t in zip(names.items(), big, corner, strict=True):
            difference = ours[-1, :, -1, -OWN * n :] - t[0, :, -1, -OWN * n :]
            errors[f"packed_gaussians {name}"] = (difference.abs() / (1 + t.abs().max())).max()
            ours[-1, :, TOP:, n * LEFT :] = t[0]
        big_lr = holes("lr", B, 3, SIDE, SIDE)
        big_lr[-1, :, TOP:, LEFT:] = lr
        own_y, own_x = HR_ROWS - 2, HR_COLUMNS - OWN * 3 // 2
        true_own = image[0, :, own_y:, own_x:]
        for levels in (False, True):
            out = holes("bytes", B, HR, HR, 3, dtype=torch.uint8) if levels else None
            out = holes("out", B, 3, HR, HR) if out is None else out
            with program((B - 1) * across + block):
                kernels.packed_splat[(1,)](
                    *big, big_lr, out, K * SIDE**2, SIDE**2, 3 * SIDE**2, SIDE**2, SIDE, SIDE,
                    HR, HR, 0, 0, HR, SIDE - 1, 1, 1, 1, EPS, K=K, R=R, NORMALIZE=True,
                    LEVELS=levels, WIDE=kernels._wide(SIDE, SIDE, HR, HR), PY=2, PX=2, SPLIT=True,
                    CELLS=CELLS,
                )  # fmt: skip
            if levels:
                found = out[-1, -2:, own_x - HR_COLUMNS :].permute(2, 0, 1)
                error = (found.double() - true_own.clamp(0, 1) * 255).abs() - 0.501
                errors["packed_splat levels"] = error.clamp(min=0).max()
            else:
                error = out[-1, :, -2:, own_x - HR_COLUMNS :] - true_own
                errors["packed_splat"] = error.abs().max()
    return {name: float(error) for name, error in errors.items()}


def longest_row_of_32_bits(kernels) -> dict[str, float]:
    """Errors at the end of a row as long as positions of 32 bits are used for."""
    g = torch.Generator().manual_seed(1)
    w, big_w = LONGEST, LONGEST * 9 // 8
    assert not kernels._wide(1, w, 1, big_w) and kernels._wide(1, w, 1, big_w * 21 // 20)

    def rand(*shape):
        return torch.rand(1, 1, *shape, 1, w, generator=g)

    inputs = Gaussians(
        rand(1) * 2 - 1, rand(2) * 0.8 + 0.2, rand() * 1.8 - 0.9, rand(), rand(2) - 0.5
    )
    leaves = inputs.map(lambda t: t.double().requires_grad_())
    grad = torch.randn(1, 1, 1, big_w, generator=g)
    grid = Grid((1, big_w), (0, 1), (0, 1))
    true = reference.splat(leaves, grid, Weighting(R, False, EPS))
    true_grads = torch.autograd.grad(true, leaves, grad.double())
    out = torch.full((1, 1, 1, big_w), float("nan"))
    gradients = [torch.full_like(t, float("nan")) for t in inputs]
    shared = {
        "K": 1, "C": 1, "R": R, "NORMALIZE": False, "HAS_OFFSET": True, "WIDE": False,
        "CELLS": CELLS,
    }  # fmt: skip
    last = (w - 1) // CELLS
    with program(last):
        kernels.splat_forward[(1, 1, 1)](
            *inputs, grad, out, w, w, 1, w, 1, big_w, 0, 1, 0, 1, 0, 1, 1, 1, EPS,
            PREPARE=False, PY=1, PX=2, **shared,
        )  # fmt: skip
        kernels.splat_backward[(1, 1, 1)](
            grad, *inputs, *gradients, w, w, 1, w, 1, big_w, 0, 1, 0, 1, **shared
        )
    names = ["out", *(f"d_{name}" for name in INPUTS)]
    errors = {}
    for name, ours, t in zip(names, [out, *gradients], [true, *true_grads], strict=True):
        end = (w - last * CELLS - 1) * ours.shape[-1] // w  # the program's own, whole cells
        difference = (ours.double() - t.detach())[..., -end:].abs().max().item()
        errors[f"32 bits: {name}"] = difference / t.abs().max().item()
    return errors


def main() -> int:
    errors = run() | run_windows() | run_packed()
    print(json.dumps(errors, indent=1))
    return not all(error <= TOLERANCE for error in errors.values())


if __name__ == "__main__":
    sys.exit(main())
