"""Time the splat: every implementation of it on the same cases, in turn, in one run.

    python -m bench splat                              # the cases of bench/splat.py
    python -m bench splat --list
    python -m bench splat --case direct-x4 --output splat.json
    python -m bench.plot splat.json -o splat.png

Each round times every implementation once, together with a large copy, a matrix product and one
EDSR-baseline pass over the same LR image. Machines drift; what is compared was therefore measured
in the same seconds: shares of the copy's bandwidth and of the product's rate, and times in passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from bench import cost, schema
from bench.cost import Shape
from gsr import ops
from gsr.config import EncoderConfig
from gsr.errors import InputError
from gsr.models.encoders.edsr import EDSR
from gsr.ops import reference
from gsr.ops.arguments import Gaussians, Grid, Weighting

EPS = 1e-2


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    dtype: torch.dtype = torch.float32

    @property
    def small(self) -> bool:
        """Small enough for every implementation on any machine."""
        return self.shape.weights < 4e6

    @property
    def large(self) -> bool:
        """Left out on a CPU unless asked for."""
        return self.shape.weights > 4e7


def _cases() -> list[Case]:
    def direct(h, w, scale, **more):
        return Shape(4, 3, 1, h, w, round(h * scale), round(w * scale), **more)

    def field(h, w, scale, **more):
        return Shape(1, 8, 3, h, w, round(h * scale), round(w * scale), offset=False, **more)

    cases = [Case("direct-tiny", direct(11, 13, 2)), Case("field-tiny", field(11, 13, 2))]
    cases += [Case(f"direct-x{s:g}", direct(96, 96, s)) for s in (2, 3, 4, 6, 8)]
    cases += [Case("direct-x2.5x4", replace(direct(96, 96, 4), H=240))]
    cases += [Case("direct-x4-radius2", replace(direct(96, 96, 4), R=2))]
    cases += [Case("direct-x4-K1", replace(direct(96, 96, 4), K=1))]
    cases += [Case("field-x4", field(96, 96, 4))]
    # What training asks for: 16 patches of 48 x 48, 2304 points of each.
    cases += [Case("direct-points", direct(48, 48, 4, b=16, points=2304))]
    cases += [Case("field-points", field(48, 48, 4, b=16, points=2304))]
    cases += [Case("direct-x4-2040x1356", direct(339, 510, 4))]
    cases += [
        Case("direct-x4-2040x1356-bf16", direct(339, 510, 4, itemsize=2), torch.bfloat16),
        Case("direct-x2-2040x1356", direct(678, 1020, 2)),
        Case("field-x4-2040x1356", field(339, 510, 4)),
    ]
    return cases


CASES = {case.name: case for case in _cases()}
DIRECTIONS = ("forward", "forward and backward")


# ---- what is timed ------------------------------------------------------------------------------


def inputs(case: Case, device: torch.device, grad: bool = False) -> dict:
    """Arguments of `gsr.ops.splat`, or of `splat_at` where the case has points; always the same."""
    s, g = case.shape, torch.Generator().manual_seed(0)

    def draw(*shape, low=0.0, high=1.0):
        x = low + (high - low) * torch.rand(s.b, s.K, *shape, s.h, s.w, generator=g)
        return x.to(device, case.dtype).requires_grad_(grad)

    result = {
        "values": draw(s.C, low=-1),
        "sigma": draw(2, low=0.1, high=(s.R + 0.5) / 3),
        "rho": draw(low=-0.9, high=0.9),
        "opacity": draw(),
        "offset": draw(2, low=-0.75, high=0.75) if s.offset else None,
        "radius": s.R,
        "normalize": s.normalize,
        "eps": EPS,
    }
    if s.points:
        y, x = torch.rand(2, s.b, s.points, generator=g, dtype=torch.float64)
        points = torch.stack([y * s.h - 0.5, x * s.w - 0.5], dim=-1)
        return {**result, "points": points.to(device)}
    return {**result, "size": (s.H, s.W)}


def _operator(case: Case) -> Callable[..., Tensor]:
    return ops.splat_at if case.shape.points else ops.splat


def _reference(case: Case) -> Callable[..., Tensor]:
    """The reference with the arguments of the operator."""
    s = case.shape

    def function(
        values, sigma, rho, opacity, offset, radius, normalize, eps, size=None, points=None
    ):
        gaussians = Gaussians(values, sigma, rho, opacity, offset)
        weighting = Weighting(radius, normalize, eps)
        if points is not None:
            return reference.splat_at(gaussians, points, weighting)
        return reference.splat(gaussians, Grid((s.H, s.W), (0, s.H), (0, s.h)), weighting)

    return function


def providers(case: Case, device: torch.device, limit: float) -> dict[str, Callable | str]:
    """Every implementation for `device`: a function, or the sentence that says why not.

    `limit` is how many bytes the reference may hold at a time.
    """
    plain = _reference(case)
    # It gathers C + 6 numbers a weight and has, roughly, four more of this size in its sums.
    wants = 4 * 4 * case.shape.weights * (case.shape.C + 6)
    too_large = f"its tensors would take about {wants / 2**30:.0f} GiB" if wants > limit else None
    return {
        "reference": too_large or plain,
        # With sizes left open, PyTorch 2.13 fails to compile the backward pass of some cases.
        "compiled reference": too_large or torch.compile(plain, dynamic=False),
        "triton" if device.type == "cuda" else "cpu": _operator(case),
    }


def step(function: Callable, arguments: dict, direction: str) -> Callable[[], None]:
    """One call to time."""

    def forward():
        with torch.no_grad():
            function(**arguments)

    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]

    def both():
        out = function(**arguments)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return forward if direction == "forward" else both


def limits(case: Case, device: torch.device) -> dict[str, tuple[Callable, float]]:
    """What is timed beside the case: its function, and the bytes or operations of it."""
    large = device.type == "cuda"
    n = 4096 if large else 768
    a, b = torch.rand(2, n, n, device=device)
    source = torch.rand((256 if large else 16) << 20, device=device)
    target = torch.empty_like(source)
    encoder = EDSR(EncoderConfig()).to(device).eval()
    lr = torch.rand(case.shape.b, 3, case.shape.h, case.shape.w, device=device)

    def encode():
        with torch.no_grad():
            encoder(lr)

    return {
        "copy": (lambda: target.copy_(source), 2.0 * source.numel() * 4),
        "product": (lambda: torch.mm(a, b), 2.0 * n**3),
        "pass": (encode, 1.0),
    }


# ---- timing -------------------------------------------------------------------------------------


def quantiles(times: list[float]) -> dict[str, float]:
    q = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return dict(zip(("p20", "p50", "p80"), q.tolist(), strict=True))


def interleave(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every run, one after the other, for `rounds` rounds or until `seconds` are over.

    At least three rounds. Each run is called until it has been warm twice before anything counts,
    and as often in a sample as fills two milliseconds, so that a launch's overhead averages out.
    """

    def once(run, calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, run in runs.items():
        once(run, 1)
        calls[name] = max(1, min(100, round(2e-3 / once(run, 1))))
    times, end = {name: [] for name in runs}, time.perf_counter() + seconds
    for i in range(rounds):
        if i >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(once(run, calls[name]))
    return times


def measure(
    case: Case, device: torch.device, direction: str, rounds: int, seconds: float, memory: float
) -> tuple[list[dict], dict[str, float]]:
    """Rows of one case, and the limits of the machine while it ran."""
    arguments = inputs(case, device, grad=direction != "forward")
    found = providers(case, device, memory)
    beside = limits(case, device)
    from torch._dynamo.exc import TorchDynamoException

    torch._dynamo.reset()  # what it learnt from other cases would be compiled in
    runs = {}
    for name, function in found.items():
        if callable(function):
            run = step(function, arguments, direction)
            try:
                run()
                runs[name] = run
            except TorchDynamoException as error:
                found[name] = f"torch.compile fails with {type(error).__name__}"
    times = interleave({**runs, **{n: f for n, (f, _) in beside.items()}}, device, rounds, seconds)
    unit = {n: quantiles(times[n])["p50"] for n in beside}
    rates = {
        "bandwidth": beside["copy"][1] / unit["copy"],
        "arithmetic": beside["product"][1] / unit["product"],
    }
    s = case.shape
    moved, operations = cost.forward_bytes(s), cost.forward_operations(s)
    if direction != "forward":
        moved, operations = cost.backward_bytes(s) + moved, operations + cost.backward_operations(s)
    rows = []
    for name, function in found.items():
        common = {
            "case": case.name, "provider": name, "direction": direction, "bytes": moved,
            "operations": operations, "sizes": {**asdict(s), "dtype": str(case.dtype)[6:]},
        }  # fmt: skip
        if not callable(function):
            rows.append(schema.row(**common, note=function))
            continue
        q = quantiles(times[name])
        rows.append(
            schema.row(
                **common,
                seconds=q,
                passes=q["p50"] / unit["pass"],
                share={
                    "memory": moved / q["p50"] / rates["bandwidth"],
                    "arithmetic": operations / q["p50"] / rates["arithmetic"],
                },
            )
        )
    return rows, rates


def table(rows: list[dict]) -> str:
    lines = [
        f"{'case':26} {'direction':21} {'provider':19} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} "
        f"{'passes':>8} {'memory':>7} {'arith.':>7}"
    ]
    for r in rows:
        text = f"{r['case']:26} {r['direction']:21} {r['provider']:19} "
        if r["seconds"] is None:
            lines.append(text + f"not run: {r['note']}")
            continue
        text += " ".join(f"{r['seconds'][p] * 1e3:9.3f}" for p in ("p20", "p50", "p80"))
        text += f" {r['passes']:8.3f} {r['share']['memory']:7.1%} {r['share']['arithmetic']:7.1%}"
        lines.append(text)
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench splat", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help="default: all, on a CPU without the large ones"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--all", action="store_true", help="the large cases too")
    parser.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50, help="most rounds of a case (50)")
    parser.add_argument("--seconds", type=float, default=20, help="of a case, about (20)")
    parser.add_argument("--memory", type=float, default=4, help="GiB the reference may take (4)")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    args = parser.parse_args(argv)
    if args.list:
        for case in CASES.values():
            s = case.shape
            what = f"{s.points} points" if s.points else f"{s.H} x {s.W}"
            print(f"{case.name:26} {s.b} x [{s.h} x {s.w}] to {what}, K {s.K}, C {s.C}, R {s.R}")
        return
    if unknown := set(args.case or ()) - CASES.keys():
        raise InputError(
            f"there is no case {min(unknown)}; python -m bench splat --list names them"
        )
    large = args.all or args.device.startswith("cuda")
    names = args.case or [n for n, case in CASES.items() if large or case.small]
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; use --device cpu")
    rows, rates = [], []
    for name in names:
        for direction in args.direction:
            new, rate = measure(
                CASES[name], device, direction, args.rounds, args.seconds, args.memory * 2**30
            )
            print(table(new) if not rows else table(new).split("\n", 1)[1], flush=True)
            rows += new
            rates.append(rate)
    middle = {n: quantiles([r[n] for r in rates])["p50"] for n in rates[0]}
    print(
        f"one copy: {middle['bandwidth'] / 1e9:.1f} GB/s, one fp32 matrix product: "
        f"{middle['arithmetic'] / 1e9:.0f} Gop/s; a pass is EDSR-baseline over the LR image"
    )
    if args.output:
        protocol = {
            "rounds": args.rounds,
            "seconds": args.seconds,
            "order": "every implementation, copy, matrix product and EDSR pass once a round",
            "share": "bytes / p50 / copy and operations / p50 / product, same rounds",
        }
        schema.save(schema.report("splat", device, protocol, rows, middle), args.output)
