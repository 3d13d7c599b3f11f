"""The operators: Gaussian splatting, differentiable, on CUDA and on the CPU.

`operators` has their public functions and dispatches to a Triton kernel (`gsr.kernels`) or to the
compiled CPU loops (`cpu`, `cpu_loops`); `reference` is the oracle of all of them, in einsum;
`resize` has the bicubic filters. To read what an operator computes, read `reference`.
"""

from gsr.ops.operators import rows_needed, splat, splat_at, splat_windows

__all__ = ["rows_needed", "splat", "splat_at", "splat_windows"]
