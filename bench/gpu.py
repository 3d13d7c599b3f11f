"""Try and measure everything on the GPU at hand, and report it: one command, offline.

    make gpu                                          # ten minutes at most, into out/gpu
    python -m bench gpu --output out/gpu --part rates kernels
    python -m bench gpu --device cpu --quick          # a rehearsal where there is no GPU

Every part is a process of its own with a time limit: one that fails or hangs is reported, and the
rest goes on. What a part has measured is in `gpu.json`; `gpu.md` is a page of it. `tuned.json` has
the block sizes that were fastest (GSR_TUNED=out/gpu/tuned.json uses them).
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import cost, document, schema, splat
from bench.cost import Shape
from bench.splat import Case, quantiles
from gsr.config import load_config
from gsr.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 600  # seconds
LEAST = {"torch": (2, 7), "triton": (3, 3)}
PACKAGES = "torch triton numpy pillow pydantic pyyaml einops safetensors tqdm pytest matplotlib"
FLUSH = 256 << 20  # bytes that are written before a kernel is timed, more than any L2
SANITIZED = [
    "odd", "K9", "C8 R3, the field", "two blocks of columns", "rows within a cell", "band",
    "at K9", "at ties", "at views", "values of a larger tensor",
]  # fmt: skip


@dataclass
class Job:
    """What a part is asked for.

    Attributes:
        device: where it runs.
        quick: small and short, to try that it runs.
        folder: where it may leave files.
    """

    device: torch.device
    quick: bool
    folder: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


class Skip(Exception):
    """A part cannot run here, and why; that is no failure."""


# ---- timing -------------------------------------------------------------------------------------


def times(run: Callable[[], Any], job: Job, rounds: int = 30) -> dict[str, float]:
    """Quantiles of the seconds of a call, after its caches have been filled with something else.

    On CUDA the call is captured as a graph, so that it is the GPU's time and not that of launches;
    what cannot be captured is called, and a line of output says so.
    """
    rounds = 3 if job.quick else rounds
    for _ in range(3):
        run()
    job.synchronize()
    if not job.cuda:
        return quantiles([_seconds(run, job) for _ in range(rounds)])
    try:
        replay = _capture(run, job)
    except RuntimeError as error:
        print(f"not a graph: {error}")
        torch.cuda.synchronize(job.device)
        replay = run
    flush = torch.empty(FLUSH, dtype=torch.int8, device=job.device)
    found = []
    for _ in range(rounds):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) * 1e-3)
    return quantiles(found)


def _capture(run: Callable[[], Any], job: Job) -> Callable[[], Any]:
    """A call of the same as a CUDA graph."""
    stream = torch.cuda.Stream(job.device)
    stream.wait_stream(torch.cuda.current_stream(job.device))
    with torch.cuda.stream(stream):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def _seconds(run: Callable[[], Any], job: Job) -> float:
    start = time.perf_counter()
    run()
    job.synchronize()
    return time.perf_counter() - start


# ---- parts --------------------------------------------------------------------------------------
# Each yields rows, and may raise Skip.


def environment(job: Job) -> Iterator[dict]:
    """Versions, the device, and whether they are what gsr needs."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    print(json.dumps(found))
    for name, least in LEAST.items():
        text = found[name] or ""
        if tuple(int(n) for n in re.findall(r"\d+", text)[:2]) < least:
            raise InputError(f"gsr needs {name} {'.'.join(map(str, least))} or newer, not {text}")
    missing = [name for name in PACKAGES.split() if not found[name]]
    if missing:
        print("not installed:", *missing)
    if job.cuda:
        torch.zeros(1, device=job.device)
        p = torch.cuda.get_device_properties(job.device)
        print(f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB")
    yield from ()


def cases(job: Job) -> Iterator[dict]:
    """The cases of the kernels, in tests/kernels."""
    _needs_cuda(job)
    out = _run([sys.executable, "tests/kernels/kernel_cases.py", "--device", "cuda", "--large"])
    failed = {n: c["failures"] for n, c in json.loads(out)["cases"].items() if c["failures"]}
    for script in ("packed_cases.py", "window_cases.py", "decode_cases.py"):
        out = _run([sys.executable, f"tests/kernels/{script}", "--cuda"])
        failed |= json.loads(out)["failures"]
    if failed:
        raise InputError(f"{len(failed)} cases of the kernels fail: {failed}")
    yield from ()


def tests(job: Job) -> Iterator[dict]:
    """The GPU tier of the tests."""
    _needs_cuda(job)
    if not _has("pytest"):
        raise Skip("pytest is not installed")
    print(_run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]))
    yield from ()


def models(job: Job) -> Iterator[dict]:
    """Every mode against the CPU, compiled, and its gradients."""
    from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig
    from gsr.models import GaussianSR

    errors, wrong = {}, []
    for mode in ("direct", "field", "official"):
        torch.manual_seed(0)
        small = DecoderConfig(hidden_dim=16, hidden_list=[16])
        encoder, bank = EncoderConfig(n_feats=16, n_blocks=2), BankConfig(points=9)
        model = GaussianSR(ModelConfig(mode, encoder=encoder, bank=bank, decoder=small)).eval()
        lr = torch.rand(1, 3, 30, 41)
        with torch.inference_mode():
            true = model(lr, scale=3.3)
            model.to(job.device)
            for tf32 in (False, True):
                with _tf32(tf32):
                    error = (model(lr.to(job.device), scale=3.3).cpu() - true).abs().max().item()
                errors[f"{mode}{' tf32' * tf32}"] = error
                if not error <= (1e-2 if tf32 else 1e-4):
                    wrong.append(f"{mode}{' tf32' * tf32} {error:.1e}")
        out = model.train()(lr.to(job.device), scale=2)
        out.square().mean().backward()
        if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
            wrong.append(f"{mode}: gradients are not finite")
    print(json.dumps(errors))
    if wrong:
        raise InputError("too far from the CPU: " + ", ".join(wrong))
    yield from ()


def commands(job: Job) -> Iterator[dict]:
    """An image from the command line, and a training."""
    device = job.device.type
    _run([
        sys.executable, "-m", "gsr", "upscale", "assets/demo.png", "--scale", "2.5", "--device",
        device, "-o", str(job.folder / "demo.png"),
    ])  # fmt: skip
    runs = job.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    _run([
        sys.executable, "train.py", "--config", "configs/smoke.yaml", f"train.device={device}",
        "train.steps=4", "train.log_every=2", "train.val_every=4", f"output={runs}",
    ])  # fmt: skip
    yield from ()


def devices(job: Job) -> Iterator[dict]:
    """A training step in a process group of one, and the second device, where there is one."""
    import torch.distributed as dist

    import train
    from gsr.config import TrainConfig
    from gsr.data.patches import Batch
    from gsr.inference.strips import run
    from gsr.models import GaussianSR

    torch.manual_seed(0)
    batch = Batch(
        torch.rand(2, 3, 16, 16), torch.rand(2, 64, 2) * 2 - 1, torch.rand(2, 64, 3), (40, 40), 2.5
    )
    store = job.folder / "group"
    store.unlink(missing_ok=True)
    dist.init_process_group(
        "nccl" if job.cuda else "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    weights = []
    for wrap in (lambda loss: loss, torch.nn.parallel.DistributedDataParallel):
        torch.manual_seed(1)
        model = GaussianSR().train().to(job.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train.training_step(
            wrap(train.Loss(model, "fp32")), optimizer, [batch], config=TrainConfig(), step=1
        )
        weights.append([p.detach().clone() for p in model.parameters()])
    dist.destroy_process_group()
    apart = max((a - b).abs().max().item() for a, b in zip(*weights, strict=True))
    print(f"a step in a group of one is {apart:.1e} from one without")
    if not apart <= 1e-4:
        raise InputError(f"a step in a group of one is {apart:.1e} from one without")
    if torch.cuda.device_count() > 1 and job.cuda:
        lr, model = torch.rand(1, 3, 30, 41), GaussianSR().eval()
        true = run(model, lr, (99, 130))
        error = (run(model.to("cuda:1"), lr, (99, 130)) - true).abs().max().item()
        print(f"cuda:1 is {error:.1e} from the CPU")
        if not error <= 1e-4:
            raise InputError(f"cuda:1 is {error:.1e} from the CPU")
    else:
        print("there is no second device")
    yield from ()


def sanitizer(job: Job) -> Iterator[dict]:
    """Out-of-bounds accesses and races, by NVIDIA's checker."""
    _needs_cuda(job)
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skip("there is no compute-sanitizer")
    script = [sys.executable, "tests/kernels/kernel_cases.py", "--device", "cuda", *SANITIZED]
    for check in ("memcheck", "racecheck"):
        _run(
            [tool, "--tool", check, "--error-exitcode", "9", *script],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        print(check, "finds nothing")
    yield from ()


def rates(job: Job) -> Iterator[dict]:
    """What the device can do: copies, matrix products, exponentials."""
    n, d = (256 if job.quick else 8192), job.device
    source = torch.rand(FLUSH // (64 if job.quick else 1), device=d)
    target = torch.empty_like(source)
    seconds = times(lambda: target.copy_(source), job)
    yield schema.row("copy", "torch", {}, seconds=seconds, bytes=2 * source.nbytes)
    for name, dtype, tf32 in (
        ("bf16 product", torch.bfloat16, False),
        ("tf32 product", torch.float32, True),
        ("fp32 product", torch.float32, False),
    ):
        a, b = torch.rand(2, n, n, device=d).to(dtype)
        with _tf32(tf32):
            seconds = times(lambda a=a, b=b: torch.mm(a, b), job, 10)
        yield schema.row(name, "torch", {"n": n}, seconds=seconds, operations=2 * n**3)
    if job.cuda:
        from bench import exponentials

        seconds, count = times(exponentials.run(d), job), exponentials.COUNT
        yield schema.row("exponential", "triton", {}, seconds=seconds, operations=count)


def autotune(job: Job) -> Iterator[dict]:
    """Block sizes, timed."""
    from bench import autotune

    _needs_cuda(job)
    path = job.folder / "tuned.json"
    jobs = str(max(1, (os.cpu_count() or 2) - 1))
    autotune.main(["--use", "lite", "field", "--output", str(path), "--jobs", jobs])
    yield from schema.load(path)["rows"]


def kernel_cases(quick: bool) -> list[Case]:
    """720p x4 of the bundled model, scales that are no whole number, `field`, and training."""

    def shape(k, c, r, h, w, scale, **more):
        size = round(h * scale), round(w * scale)
        return Shape(k, c, r, h, w, *size, offset=c == 3, **more)

    h, w = (18, 32) if quick else (720, 1280)
    found = [Case(f"lite x{s:g}", shape(9, 3, 1, h, w, s)) for s in (4, 4.1, 2.5)]
    found.append(Case("field x4", shape(1, 8, 3, h, w, 4)))
    found.append(Case("lite points", shape(9, 3, 1, 48, 48, 4, b=2 if quick else 16, points=2304)))
    bf16 = Case("lite x4 bf16", replace(found[0].shape, itemsize=2), torch.bfloat16)
    return [*found, bf16]


def kernels(job: Job) -> Iterator[dict]:
    """The splat, forward, and forward and backward."""
    for case in kernel_cases(job.quick):
        yield from _splat_rows(case, job, {"splat": splat._operator(case)})


def decoder(job: Job) -> Iterator[dict]:
    """The decoder of `official` and `field` as published, on a strip of 720p by 4."""
    from gsr.config import DecoderConfig
    from gsr.models.heads import decode_gpu
    from gsr.models.heads.decoder import FourierDecoder
    from gsr.ops.decode import Strip, decode

    h, w, rows = (18, 32, 8) if job.quick else (720, 1280, 400)
    size, d = (4 * h, 4 * w), job.device
    fourier = FourierDecoder(64, DecoderConfig()).to(d)
    strip = Strip(size, (0, rows), (0, h))
    features = torch.rand(1, 64, h, w, device=d).contiguous(memory_format=torch.channels_last)
    splatted, lr = torch.rand(1, 8, rows + 1, size[1], device=d), torch.rand(1, 3, h, w, device=d)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with torch.inference_mode():
            weights = decode_gpu.lay_out(fourier, lr_size=(h, w), size=size, dtype=dtype)
            run = functools.partial(decode, features, splatted, lr, weights, strip)
            yield schema.row(
                f"decoder {name}", "decode", {"LR": [h, w], "HR": list(size), "rows": rows},
                seconds=times(run, job), operations=2 * 557_824 * rows * size[1],
            )  # fmt: skip


def baselines(job: Job) -> Iterator[dict]:
    """A kernel by tiles, and the reference, as it is and compiled, where it fits."""
    for case in kernel_cases(job.quick):
        limit = 0.3 * torch.cuda.mem_get_info(job.device)[0] if job.cuda else 2**30
        found = splat.providers(case, job.device, limit)
        plain = {n: f for n, f in found.items() if "reference" in n and callable(f)}
        if job.quick:
            plain.pop("compiled reference", None)
        shape = case.shape
        if job.cuda and shape.C == 3 and not shape.points and case.dtype == torch.float32:
            from bench import tile

            plain["tile kernel"] = tile.splat
        for name, reason in found.items():
            if not callable(reason):
                print(f"{case.name}, {name}: {reason}")
        yield from _splat_rows(case, job, plain, DIRECTIONS[:1])


DIRECTIONS = splat.DIRECTIONS


def _splat_rows(case: Case, job: Job, providers: dict, directions=DIRECTIONS) -> Iterator[dict]:
    s = case.shape
    for direction in directions:
        arguments = splat.inputs(case, job.device, grad=direction != "forward")
        moved, operations = cost.forward_bytes(s), cost.forward_operations(s)
        if direction != "forward":
            moved += cost.backward_bytes(s)
            operations += cost.backward_operations(s)
        for name, function in providers.items():
            yield schema.row(
                case.name, name, {"K": s.K, "C": s.C, "R": s.R, "LR": [s.h, s.w], "HR": [s.H, s.W]},
                seconds=times(splat.step(function, arguments, direction), job),
                direction=direction, bytes=moved, operations=operations,
            )  # fmt: skip


def pipeline(job: Job) -> Iterator[dict]:
    """A 720p PNG by 4 with the bundled model, from the file's bytes to the result's."""
    import numpy as np
    from PIL import Image

    import gsr
    from gsr.inference import gpu
    from gsr.inference.strips import inference
    from gsr.models.fused import fast_encoder

    h, w = (36, 64) if job.quick else (720, 1280)
    y, x = np.mgrid[0:h, 0:w]
    waves = [127 + 90 * np.sin(x / (5 + k)) * np.cos(y / (7 + k)) for k in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(file, "PNG")
    model = gsr.load().to(job.device)
    size, sizes = (4 * h, 4 * w), {"LR": [h, w], "HR": [4 * h, 4 * w]}
    state: dict[str, Any] = {}
    copies = gpu.HostCopies(job.device) if job.cuda else None

    def decode():
        state["image"] = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))

    def upload():
        lr = torch.from_numpy(state["image"].copy()).permute(2, 0, 1)[None].float() / 255
        state["lr"] = lr.to(job.device)

    def encoder():
        fast = fast_encoder(model.encoder, state["dtype"])
        state["encoded"] = model.head.encode(fast(state["lr"]), state["lr"])

    def render():
        state["hr"] = model.render(state["encoded"], size, 4)

    def copy():
        hr = state["hr"].clamp(0, 1).mul(255).round().to(torch.uint8)
        hr = hr[0].permute(1, 2, 0).contiguous()
        state["out"] = (copies.start(hr)() if copies else hr).numpy()

    def encode():
        Image.fromarray(state["out"]).save(io.BytesIO(), "PNG", compress_level=1)

    rounds = 2 if job.quick else 5
    for precision in ("fp32", "bf16"):
        steps = {f.__name__: f for f in (decode, upload, encoder, render, copy, encode)}
        found: dict[str, list[float]] = {name: [] for name in [*steps, "gsr.upscale"]}
        bf16 = precision == "bf16"
        state["dtype"] = torch.bfloat16 if bf16 else torch.float32
        for _ in range(rounds + 1):
            with inference(model), torch.autocast(job.device.type, torch.bfloat16, bf16):
                for name, run in steps.items():
                    found[name].append(_seconds(run, job))
            image = Image.fromarray(state["image"])
            whole = lambda: gsr.upscale(image, 4, model=model, precision=precision)  # noqa: B023, E731
            found["gsr.upscale"].append(_seconds(whole, job))
        for name, seconds in found.items():
            # The first round starts what starts late.
            yield schema.row(f"720p x4: {name}", precision, sizes, seconds=quantiles(seconds[1:]))


def training(job: Job) -> Iterator[dict]:
    """A training step of the bundled model's config, its batch at hand."""
    import train
    from gsr.data.patches import PatchDataset, load_batches, split_images
    from gsr.graphs import GraphedLoss
    from gsr.models import GaussianSR
    from gsr.optim import make_optimizer

    own = ["data.train=tests/data/photos", "data.val_count=2", "data.workers=0", "data.cache=none"]
    small = ["data.batch=2", "data.patch=24", "data.queries=576"] if job.quick else []
    config = load_config(ROOT / "configs" / "gsr-lite.yaml", [*own, *small])
    dataset = PatchDataset(split_images(config.data)[0], config.data)
    batch = next(load_batches(dataset, 1, 0, 1, accumulate=1, pin=job.cuda))
    kinds = [("fp32", False), ("bf16", False)] + [("fp32", True), ("bf16", True)] * job.cuda
    for precision, graph in kinds:
        torch.manual_seed(1)
        model = GaussianSR(config.model).train().to(job.device)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optimizer = make_optimizer(model, config.train)
        loss_of: Any = train.Loss(model, precision)
        loss_of = GraphedLoss(loss_of) if graph else loss_of

        def take(step, loss_of=loss_of, optimizer=optimizer):
            train.training_step(loss_of, optimizer, batch, config=config.train, step=step)

        steps = range(1, 5 if job.quick else 31)
        taken = [_seconds(lambda step=step: take(step), job) for step in steps]
        yield schema.row(
            "training step", f"{precision} graph" if graph else precision,
            {"batch": config.data.batch, "patch": config.data.patch},
            seconds=quantiles(taken[len(taken) // 3 :]),
        )  # fmt: skip


# Name: (function, most seconds). In this order: what matters most comes before time is short.
PARTS: dict[str, tuple[Callable[[Job], Iterator[dict]], int]] = {
    "environment": (environment, 60),
    "cases": (cases, 150),
    "rates": (rates, 60),
    "kernels": (kernels, 90),
    "decoder": (decoder, 60),
    "models": (models, 90),
    "pipeline": (pipeline, 90),
    "commands": (commands, 90),
    "devices": (devices, 60),
    "training": (training, 90),
    "autotune": (autotune, 240),
    "baselines": (baselines, 90),
    "tests": (tests, 150),
    "sanitizer": (sanitizer, 120),
}


def _needs_cuda(job: Job) -> None:
    if not job.cuda:
        raise Skip("it needs a GPU")


def _has(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _run(command: list[str], **environment: str) -> str:
    """What a command prints. Raises InputError with its last words if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stdout + done.stderr)[-1500:]
        raise InputError(f"{' '.join(command[1:4])} ends with {done.returncode}: {last}")
    return done.stdout


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Whether matrix products and convolutions of float32 may lose 13 bits."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [b.allow_tf32 for b in backends]
    try:
        for b in backends:
            b.allow_tf32 = on  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for b, was in zip(backends, before, strict=True):
            b.allow_tf32 = was  # pyright: ignore[reportAttributeAccessIssue]


# ---- one part, in its own process ---------------------------------------------------------------


def run_part(name: str, job: Job, result: Path) -> None:
    """Run a part and write its state, note and rows; what it has measured before it fails stays."""
    rows: list[dict] = []
    state, note = "done", None
    try:
        for row in PARTS[name][0](job):
            rows.append({**row, "part": name})
            result.write_text(json.dumps({"state": "stopped", "note": None, "rows": rows}))
    except Skip as reason:
        state, note = "skipped", str(reason)
    except Exception as error:  # whatever it is, it is what the report has to say
        state, note = "failed", f"{type(error).__name__}: {error}"
    result.write_text(json.dumps({"state": state, "note": note, "rows": rows}))


def start_part(name: str, args: argparse.Namespace, folder: Path, limit: float) -> dict[str, Any]:
    """State, note, rows, seconds and last output of a part, which gets so many seconds."""
    result, log = folder / f"{name}.part.json", folder / f"{name}.log"
    command = [sys.executable, "-m", "bench", "gpu", "--one", name, "--output", str(folder)]
    command += ["--device", args.device] + ["--quick"] * args.quick
    start = time.monotonic()
    with open(log, "w") as output:
        # A session of its own, so that what the part has started can be stopped with it.
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    found = {"state": "failed", "note": None, "rows": []}
    if result.exists():
        found = json.loads(result.read_text())
        result.unlink()
    if code is None:
        found |= {"state": "failed", "note": f"stopped after {limit:.0f} s"}
    elif code or found["state"] == "stopped":
        found |= {"state": "failed", "note": f"its process ended with {code}"}
    found["seconds"] = time.monotonic() - start
    found["output"] = log.read_text(errors="replace")[-4000:]
    return found


# ---- report -------------------------------------------------------------------------------------


def headlines(report: dict) -> list[str]:
    """At most ten lines: what failed, and what matters of what was measured."""
    parts, rows = report["protocol"]["parts"], report["rows"]
    states = {n: [k for k, p in parts.items() if p["state"] == n] for n in ("done", "skipped")}
    lines = [f"{report['device']}: {len(states['done'])} of {len(parts)} parts done"]
    failed = [n for n, p in parts.items() if p["state"] == "failed"]
    lines.append("failed: " + (", ".join(failed) or "nothing"))
    if states["skipped"]:
        lines.append("skipped: " + ", ".join(states["skipped"]))

    def p50(part: str, case: str, **more: str) -> float:
        return next(
            (
                r["seconds"]["p50"]
                for r in rows
                if (r["part"], r["case"]) == (part, case)
                and all(r.get(k) == v for k, v in more.items())
            ),
            math.nan,
        )

    rate = rates_of(rows)
    if rate:
        lines.append(
            f"copy {rate.get('copy', math.nan) / 1e9:.0f} GB/s, "
            f"bf16 {rate.get('bf16 product', math.nan) / 1e12:.0f} Top/s, "
            f"tf32 {rate.get('tf32 product', math.nan) / 1e12:.0f} Top/s"
        )
    for case in ("lite x4", "lite x4.1"):
        t = [p50("kernels", case, direction=d) * 1e3 for d in DIRECTIONS]
        if not math.isnan(t[0]):
            lines.append(f"splat {case}: {t[0]:.3f} ms, with backward {t[1]:.3f} ms")
    for precision in ("fp32", "bf16"):
        t = [p50("pipeline", f"720p x4: {n}", provider=precision) for n in (*STEPS, "gsr.upscale")]
        if not math.isnan(t[0]):
            shares = ", ".join(
                f"{n} {s * 1e3:.1f}" for n, s in zip((*STEPS, "gsr.upscale"), t, strict=True)
            )
            lines.append(f"720p x4 {precision}, ms: {shares}")
    kinds = "fp32", "bf16", "fp32 graph", "bf16 graph"
    steps = {k: p50("training", "training step", provider=k) for k in kinds}
    steps = [f"{k} {s * 1e3:.1f} ms" for k, s in steps.items() if not math.isnan(s)]
    if steps:
        lines.append("training step: " + ", ".join(steps))
    return lines[:10]


STEPS = ("decode", "upload", "encoder", "render", "copy", "encode")


def rates_of(rows: list[dict]) -> dict[str, float]:
    """Bytes or operations a second of the part `rates`."""
    return {
        r["case"]: (r["bytes"] or r["operations"]) / r["seconds"]["p50"]
        for r in rows
        if r["part"] == "rates"
    }


def page(report: dict, plots: list[str]) -> str:
    """The report as Markdown."""
    rows, rate = report["rows"], rates_of(report["rows"])
    lines = [f"# gsr on {report['device']}", "", *(f"* {line}" for line in headlines(report)), ""]
    lines += [f"{report['date']}, {report['versions']}, commit {report['commit']}", ""]
    parts = report["protocol"]["parts"].items()
    table = [[n, p["state"], f"{p['seconds']:.0f}", _cell(p["note"] or "")] for n, p in parts]
    lines += [document.table(["part", "state", "s", "note"], table), ""]
    measured = []
    for r in rows:
        t = [f"{r['seconds'][p] * 1e3:.3f}" for p in ("p20", "p50", "p80")]
        moved, share = r["bytes"], ""
        if moved and rate.get("copy"):
            share = f"{moved / r['seconds']['p50'] / rate['copy']:.1%}"
        measured.append([r["part"], r["case"], r["provider"], r.get("direction", ""), *t, share])
    head = ["part", "case", "by", "direction", "p20 ms", "p50 ms", "p80 ms", "of copy bandwidth"]
    lines += [document.table(head, measured), "", *(f"![{p}]({p})" for p in plots), ""]
    failed = [(n, p) for n, p in parts if p["state"] == "failed"]
    for name, part in failed:
        lines += [f"## {name}", "", "```", part["output"].replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split())[:300]


def draw(report: dict, folder: Path) -> list[str]:
    """Names of the plots in `folder`; none without matplotlib or anything to draw."""
    from bench import plot

    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for r in report["rows"]:
        if r["part"] in ("kernels", "baselines"):
            t = tuple(r["seconds"][p] * 1e3 for p in ("p20", "p50", "p80"))
            group = groups.setdefault(f"{r['case']}, {r['direction']}", {})
            group[r["provider"]] = t  # pyright: ignore[reportArgumentType]
    if not groups:
        return []
    try:
        figure = plot.dots(groups, f"The splat on {report['device']}", "ms")
        figure.savefig(folder / "splat.png")
    except InputError as error:
        print(error)
        return []
    return ["splat.png"]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="FOLDER")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="only try that it runs")
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"in all ({BUDGET})")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if args.one:
        job = Job(device, args.quick, folder)
        return run_part(args.one, job, folder / f"{args.one}.part.json")

    end, rows, parts = time.monotonic() + args.seconds, [], {}
    for name in args.part:
        left = end - time.monotonic()
        if left < 5:
            found = {"state": "skipped", "note": "no time was left", "rows": [], "seconds": 0.0}
        else:
            found = start_part(name, args, folder, min(left, PARTS[name][1]))
        rows += found.pop("rows")
        parts[name] = {"output": "", **found}
        print(f"{name}: {found['state']}, {found['seconds']:.0f} s. {_cell(found['note'] or '')}",
              flush=True)  # fmt: skip
        if name == "environment" and args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("there is no GPU here; --device cpu --quick rehearses without one")
    protocol = {
        "parts": parts, "quick": args.quick,
        "timer": f"CUDA graphs, {FLUSH >> 20} MiB written before each; steps by the clock",
    }  # fmt: skip
    here = device if torch.cuda.is_available() else torch.device("cpu")
    report = schema.report("gpu", here, protocol, rows, rates_of(rows) or None)
    schema.save(report, folder / "gpu.json")
    (folder / "gpu.md").write_text(page(report, draw(report, folder)), encoding="utf-8")
    print("", *headlines(report), f"{folder / 'gpu.md'}", sep="\n")
    if failed := [n for n, p in parts.items() if p["state"] == "failed"]:
        raise InputError(f"{', '.join(failed)} failed: see {folder / 'gpu.md'}")
