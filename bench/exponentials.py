"""A kernel that computes exponentials and little else: the rate of the special functions."""

# Numbers are given for constexpr:
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

PROGRAMS, BLOCK, STEPS = 4096, 1024, 256
COUNT = PROGRAMS * BLOCK * STEPS


@triton.jit
def exponentials(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Each of the steps needs the one before it, so that none can be left out."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = -at.to(tl.float32)
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out + at, x)


def run(device: torch.device) -> Callable[[], None]:
    """A call that computes COUNT exponentials."""
    out = torch.empty(PROGRAMS * BLOCK, device=device)

    def call() -> None:
        exponentials[(PROGRAMS,)](out, STEPS=STEPS, BLOCK=BLOCK)

    return call
