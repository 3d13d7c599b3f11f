"""The end of a residual branch: x + scale (y + bias) over y, in one pass over memory.

PyTorch takes two, one for the bias of a convolution and one for the skip connection.
"""

# A checker knows nothing of what a kernel's body means; of the launcher it checks all else:
# pyright: strict, reportMissingTypeStubs=false, reportMissingParameterType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# Some versions of Triton say that a cdiv gives a constexpr, and their functions nothing:
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .splat import launch

BLOCK = 2048  # numbers a program: 16 a thread, two loads of 128 bits of a 16-bit type


@triton.jit(do_not_specialize=["inner", "scale"])
def residual(
    y_ptr, bias_ptr, x_ptr, count, inner, scale, C: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`count` numbers in memory's order: channels last, or those of a channel `inner` at a time."""
    # Only the program's own start needs 64 bits, whose divisions cost several times those of 32.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if not LAST:
        channel = (start // inner % C).to(tl.int32) + ((start % inner).to(tl.int32) + i) // inner
    elif BLOCK % C == 0:
        channel = i
    else:
        channel = (start % C).to(tl.int32) + i
    held = start + i < count
    y = tl.load(y_ptr + start + i, held, 0.0).to(tl.float32)
    x = tl.load(x_ptr + start + i, held, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel % C).to(tl.float32)
    tl.store(y_ptr + start + i, x + scale * (y + bias), held)


def add_residual(y: Tensor, bias: Tensor, x: Tensor, scale: float) -> Tensor:
    """`gsr.ops.residual.add_residual` of y and x that lie in memory alike."""
    _, channels, h, w = y.shape
    launch(
        residual, (triton.cdiv(y.numel(), BLOCK),), y, bias.contiguous(), x,
        y.numel(), h * w, float(scale), C=channels, LAST=not y.is_contiguous(), BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return y
