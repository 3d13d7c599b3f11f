"""Find the fastest block sizes of the grid kernels on this machine's GPU.

    python -m bench.autotune                  # minutes; writes a file in the user's cache folder
    GSR_AUTOTUNE=1 python evaluate.py ...     # a run that uses what was found
    GSR_TUNED=tuned.json python evaluate.py   # the same from a file of one's own

Each candidate is compiled first; those that spill, or of which too few warps fit a multiprocessor,
are never timed. Without a GPU the candidates that survive are printed, best in the model first.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch

from bench import schema
from bench.cost import Shape
from bench.splat import Case, inputs
from gsr.cli import guard
from gsr.errors import InputError
from gsr.kernels import configs  # pyright: ignore[reportAttributeAccessIssue]
from gsr.ops.arguments import Gaussians, Grid, Weighting

KINDS = ("forward", "prepare", "backward")
SCALES = (2, 3, 4, 8)
LEAST_WARPS = 4  # one for each scheduler of a multiprocessor


def candidates(kind: str, scale: int, warp: int = 32) -> list[dict]:
    """All configurations of a kind worth compiling for cells of scale x scale pixels."""
    sides = [n for n in range(1, configs.SIDE + 1) if scale % n == 0]
    blocks: list[dict] = [{}]
    if kind != "backward":
        blocks = [{"PY": py, "PX": px} for py in sides for px in sides]
    # Cells and warps: one cell a lane in one, two or four warps, or two cells a lane.
    lanes = [(warp, 1), (2 * warp, 2), (4 * warp, 4), (2 * warp, 1)]
    return [{**b, "CELLS": cells, "num_warps": warps} for b in blocks for cells, warps in lanes]


def prune(
    found: Iterable[dict], usage: Callable[[dict], dict], warps: Callable[[dict, dict], int]
) -> list[dict]:
    """Those of `found` that do not spill and of which enough warps fit a multiprocessor.

    Args:
        usage: a configuration to `bench.static.resources` of its kernel.
        warps: a configuration and its resources to the warps that a multiprocessor holds.
    """
    left = []
    for config in found:
        used = usage(config)
        if not used["spills"] and warps(config, used) >= LEAST_WARPS:
            left.append(config)
    return left


def select(found: list[dict], timer: Callable[[dict], float]) -> tuple[dict, float]:
    """The configuration that `timer` calls fastest, and its seconds; one that fails is passed over.

    Raises:
        InputError: none is left.
    """
    best, seconds = None, math.inf
    for config in found:
        try:
            t = timer(config)
        except (RuntimeError, *_triton_errors()) as error:  # more asked than the device has
            print(f"  {config}: {error}")
            continue
        if t < seconds:
            best, seconds = config, t
    if best is None:
        raise InputError("none of the candidates runs on this device")
    return best, seconds


def _triton_errors() -> tuple:
    """What Triton raises, none of which is a RuntimeError."""
    try:
        from triton.runtime.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def survivors(use, kind: str, scale: int, arch: str) -> list[dict]:
    """Candidates after pruning; compiles each of them for `arch`, which needs no GPU."""
    from bench import static

    target = static.TARGETS.get(arch) or _target()
    limits = arch if arch in static.LIMITS else "sm_80"

    def usage(config):
        constants = {n: v for n, v in config.items() if n != "num_warps"}
        if kind != "backward":
            constants["PREPARE"] = kind == "prepare"
        name = "splat_backward" if kind == "backward" else "splat_forward"
        constants |= use.constants()
        return static.resources(static.compile_kernel(name, constants, target, config["num_warps"]))

    def warps(config, used):
        return static.occupancy(used, config["num_warps"], limits)

    return prune(candidates(kind, scale, static.LIMITS[limits].warp), usage, warps)


def compile_ahead(work: list[tuple], arch: str, jobs: int) -> None:
    """Compile all candidates in so many processes, into Triton's cache, where launches find them.

    The kernels are compiled for no particular numbers (`kernels/splat.py`), so that what is
    compiled here is what is launched.
    """
    if jobs > 1:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            pool.starmap(survivors, [(*one, arch) for one in work], chunksize=1)


def _target():
    import triton

    return triton.runtime.driver.active.get_current_target()


def shape(use, scale: int) -> Shape:
    """An image of about 2000 x 1350 HR pixels."""
    h, w = 1344 // scale, 2016 // scale
    return Shape(use.K, use.C, use.R, h, w, h * scale, w * scale, offset=use.offset)


def gpu_timer(use, kind: str, scale: int, device: torch.device) -> Callable[[dict], float]:
    """Seconds of a kernel in a configuration, by triton.testing.do_bench.

    "prepare" and "backward" run in one call; what is not being tuned keeps its shipped form.
    """
    from triton.testing import do_bench

    from gsr.kernels import splat  # pyright: ignore[reportAttributeAccessIssue]

    s, shipped = shape(use, scale), configs.splat_config
    g = inputs(Case("tuning", s), device)
    gaussians = Gaussians(*(g[n] for n in Gaussians._fields))
    grid = Grid((s.H, s.W), rows=(0, s.H), band=(0, s.h))
    weighting = Weighting(s.R, normalize=True, eps=g["eps"])
    grad = torch.ones(s.b, s.C, s.H, s.W, device=device)

    def run():
        if kind == "forward":
            return splat.forward(gaussians, grid, weighting)
        return splat.backward(grad, gaussians, grid, weighting)

    def timer(config):
        def choose(wanted, *sizes, **more):
            return config if wanted == kind else shipped(wanted, *sizes, **more)

        with mock.patch.object(splat, "splat_config", choose):
            return float(do_bench(run, quantiles=[0.5])) * 1e-3  # pyright: ignore[reportArgumentType]

    return timer


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autotune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--scale", type=int, nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--use", nargs="+", choices=("lite", "direct", "field"), default=["lite", "field"]
    )
    parser.add_argument(
        "--arch", choices=("sm_80", "sm_90", "sm_100", "gfx942"), default="sm_90",
        help="without a GPU: whose candidates to print (sm_90)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (1)")
    parser.add_argument("--output", type=Path, help=f"default: {configs.tuned_file()}")
    args = parser.parse_args(argv)
    try:
        from bench import static
    except ImportError:
        raise InputError("tuning needs Triton: pip install 'gaussiansr[triton]'") from None
    uses = [u for u in static.USES if u.name in args.use]
    work = [(u, k, s) for u in uses for k in args.kind for s in args.scale]
    if not torch.cuda.is_available():
        for use, kind, scale in work:
            _print_survivors(use, kind, scale, args.arch)
        raise InputError("tuning times kernels and needs a CUDA device, which is not here")

    device = torch.device("cuda", torch.cuda.current_device())
    arch = configs.architecture(device)
    path, rows, tuned = args.output or configs.tuned_file(), [], {}
    if path.exists():  # what is not tuned anew stays
        old = schema.load(path)
        anew = {f"{use.name} {kind} x{scale}" for use, kind, scale in work}
        rows = [r for r in old["rows"] if r["provider"] != arch or r["case"] not in anew]
        tuned = dict(old["configs"])
    compile_ahead(work, arch, args.jobs)
    for use, kind, scale in work:
        left = survivors(use, kind, scale, arch)
        config, seconds = select(left, gpu_timer(use, kind, scale, device))
        key = configs.splat_key(kind, arch, (scale, scale), channels=use.C)
        tuned[key] = config
        print(f"{key}: {config}, {seconds * 1e3:.3f} ms, best of {len(left)}", flush=True)
        rows.append(
            schema.row(
                f"{use.name} {kind} x{scale}",
                arch,
                {"K": use.K, "C": use.C, "R": use.R},
                seconds=dict.fromkeys(("p20", "p50", "p80"), seconds),
                config=config,
            )  # fmt: skip
        )
    protocol = {"timer": "triton.testing.do_bench, median", "scales": args.scale}
    schema.save({**schema.report("autotune", device, protocol, rows), "configs": tuned}, path)
    print(f"written to {path}; it counts with GSR_AUTOTUNE=1, or GSR_TUNED={path}")


def _print_survivors(use, kind, scale, arch):
    from bench import static

    chip = next((c for c in static.CHIPS if c.arch == arch), None)
    left = survivors(use, kind, scale, arch)
    print(f"{use.name} {kind} x{scale} on {arch}: {len(left)} candidates")
    rows = []
    for config in left:
        modelled = math.nan
        if chip:
            row = static.model_row(chip, use, shape(use, scale), kind, config)
            modelled = max(row["model"].values())
        rows.append((modelled, config))
    for modelled, config in sorted(rows, key=lambda r: r[0]):
        text = "" if chip is None else f"  model: {modelled * 1e3:.3f} ms on {chip.name}"
        print(f"  {static.block_text(config):16}{text}", flush=True)


if __name__ == "__main__":
    guard(main)
