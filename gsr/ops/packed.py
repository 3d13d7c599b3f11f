"""The operators of `direct` at inference, without gradients: pack Gaussians, then splat them.

`pack` takes what the head's last convolution gives, `splat_packed` gives the image itself: of the
steps between only the splat is left. On CUDA they are kernels (`gsr.kernels.packed`), elsewhere
`gsr.ops.reference`. In PyTorch's registry they are `gsr::pack` and `gsr::splat_packed`.
"""

# torch.library's decorators are not annotated:
# pyright: strict, reportUnknownMemberType=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsr.ops import operators, reference
from gsr.ops.arguments import Grid, Packed, Weighting

Three = tuple[Tensor, Tensor, Tensor]


def serves(raw: Tensor) -> bool:
    """Whether packing pays: on CUDA, where no gradients are wanted."""
    return operators._runs_triton(raw) and not torch.is_grad_enabled()


def pack(raw: Tensor, gaussians: int, sigma: tuple[float, float], reach: float) -> Packed:
    """Gaussians from raw parameters [B, 9 K, h, w], in any floating type and memory format.

    Args:
        raw: the channels that `gsr.ops.reference.direct_gaussians` lists.
        gaussians: K.
        sigma: its bounds, LR pixels, > 0.
        reach: bound of the offsets, LR pixels.

    Raises:
        ValueError: raw has not 9 K channels.
    """
    if raw.dim() != 4 or raw.shape[1] != 9 * gaussians:
        raise ValueError(f"raw must be [B, {9 * gaussians}, h, w], not {list(raw.shape)}")
    return Packed(*operators._call(_pack, _run_pack, raw, gaussians, sigma, reach))


def splat_packed(
    packed: Packed,
    lr: Tensor,
    size: tuple[int, int],
    radius: int,
    normalize: bool,
    eps: float,
    rows: tuple[int, int] | None = None,
    band: tuple[int, int] | None = None,
    levels: bool = False,
) -> Tensor:
    """`lr` [B, 3, h, w] float32 upsampled bicubically plus the Gaussians' splat: [B, 3, H, W].

    Args:
        levels: uint8 [B, H, W, 3] of [0, 255] instead, clamped and rounded: what a file holds.
        rows: as all others as in `gsr.ops.splat`; the bicubic filter needs LR rows within 2.

    Raises:
        ValueError: a shape or type does not fit, or as `gsr.ops.splat`.
    """
    b, _, h, w = packed.blue.shape
    if list(lr.shape) != [b, 3, h, w] or lr.dtype != torch.float32:
        raise ValueError(f"lr must be float32 [{b}, 3, {h}, {w}], not {lr.dtype} {list(lr.shape)}")
    operators._check_weighting(normalize, eps)
    rows, band = operators.check_rows(h, size, rows, band, max(radius, 2))
    return operators._call(
        _splat_packed, _run_splat_packed, *packed, lr, size, rows, radius, normalize, eps, band,
        levels,
    )  # fmt: skip


# PyTorch reads an operator's schema from the annotations, which therefore are flat.


def _run_pack(raw: Tensor, gaussians: int, sigma: Sequence[float], reach: float) -> Three:
    low, high = sigma
    if operators._runs_triton(raw):
        packed = operators._kernels("packed").pack(raw, gaussians, (low, high), reach)
    else:
        found = reference.direct_gaussians(raw.float(), gaussians, (low, high), reach)
        packed = reference.pack(found)
    conic, centre, blue = packed
    return conic, centre, blue


_pack = torch.library.custom_op("gsr::pack", _run_pack, mutates_args=())


@_pack.register_fake
def _(raw: Tensor, gaussians: int, sigma: Sequence[float], reach: float) -> Three:
    b, _, h, w = raw.shape
    kinds = torch.complex128, torch.complex128, torch.float32
    conic, centre, blue = (raw.new_empty(b, gaussians, h, w, dtype=kind) for kind in kinds)
    return conic, centre, blue


def _run_splat_packed(
    conic: Tensor, centre: Tensor, blue: Tensor, lr: Tensor, size: Sequence[int],
    rows: Sequence[int], radius: int, normalize: bool, eps: float, band: Sequence[int],
    levels: bool,
) -> Tensor:  # fmt: skip
    packed, grid = Packed(conic, centre, blue), operators._grid(size, rows, band)
    splat = operators._kernels("packed").splat if lr.is_cuda else reference.splat_packed
    return splat(packed, lr, grid, Weighting(radius, normalize, eps), levels)


_splat_packed = torch.library.custom_op("gsr::splat_packed", _run_splat_packed, mutates_args=())


@_splat_packed.register_fake
def _(conic: Tensor, centre: Tensor, blue: Tensor, lr: Tensor, *others: object) -> Tensor:
    grid: Grid = operators._grid(others[0], others[1], others[5])  # pyright: ignore
    (_, width), (start, stop), _ = grid
    if others[6]:
        return lr.new_empty(lr.shape[0], stop - start, width, 3, dtype=torch.uint8)
    return lr.new_empty(lr.shape[0], 3, stop - start, width)
