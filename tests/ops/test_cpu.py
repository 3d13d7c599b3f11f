"""The compiled CPU splat: outputs and gradients against the oracle, and what else it promises."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from gsr.ops import cpu, reference
from gsr.ops.arguments import Gaussians, Grid, Weighting

NAMES = Gaussians._fields


def field(b=1, k=2, c=3, h=4, w=5, sigma=(0.2, 0.8), rho=0.9, seed=0, dtype=torch.float32):
    """Gaussians with sigma evenly spread in its logarithm."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(b, k, *shape, h, w, generator=g, dtype=dtype)

    low, high = sigma
    return Gaussians(
        rand(c) * 2 - 1,
        low * (high / low) ** rand(2),
        (rand() * 2 - 1) * rho,
        rand(),
        rand(2) * 1.5 - 0.75,
    )


def whole(f, size, rows=None):
    return Grid(size, rows or (0, size[0]), (0, f.values.shape[-2]))


def forward(f, size, rows=None, radius=2):
    return cpu.forward(f, whole(f, size, rows), Weighting(radius, True, 1e-2))


def forward_at(f, points, radius=2):
    return cpu.forward_at(f, points, Weighting(radius, True, 1e-2))


def backward(grad, f, size, radius=1):
    return cpu.backward(grad, f, whole(f, size), Weighting(radius, True, 1e-2))


def rows_of(size, rows=None, radius=1, normalize=True, eps=1e-2):
    """Forward, backward and oracle of a grid, as functions of a field."""
    weighting = Weighting(radius, normalize, eps)
    return (
        lambda f: cpu.forward(f, whole(f, size, rows), weighting),
        lambda g, f: cpu.backward(g, f, whole(f, size, rows), weighting),
        lambda f: reference.splat(f, whole(f, size, rows), weighting),
    )


def points_of(points, radius=1, normalize=True, eps=1e-2):
    weighting = Weighting(radius, normalize, eps)
    return (
        lambda f: cpu.forward_at(f, points, weighting),
        lambda g, f: cpu.backward_at(g, f, points, weighting),
        lambda f: reference.splat_at(f, points, weighting),
    )


def by_oracle(oracle, f, dtype, grad=None):
    """Result, and gradients for `grad`, or for a drawn one that comes back as well."""
    leaves = f.map(lambda t: t.to(dtype, copy=True).requires_grad_())
    out = oracle(leaves)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad.to(dtype))
    return out.detach(), leaves.map(lambda t: t.grad), grad


def agree(functions, f, out=1e-5, gradients=1e-4):
    """Within bounds of the oracle in float64, or of twice its own error in float32 if that is more.

    The bounds are absolute for the result, relative to the largest entry for every gradient.
    """
    forward, backward, oracle = functions
    true_out, true_gradients, grad = by_oracle(oracle, f, torch.float64)
    near_out, near_gradients, _ = by_oracle(oracle, f, f[0].dtype, grad)

    def check(name, ours, true, near, bound):
        assert ours.shape == true.shape and ours.dtype == f[0].dtype, name
        error, floor = (ours - true).abs().max().item(), (near - true).abs().max().item()
        assert error <= max(bound, 2 * floor), f"{name}: {error:.2e}, float32 {floor:.2e}"

    check("out", forward(f), true_out, near_out, out)
    made = backward(grad.to(f[0].dtype), f)
    for name, ours, true, near in zip(NAMES, made, true_gradients, near_gradients, strict=True):
        if true is None:
            assert ours is None, name
        else:
            check(name, ours, true, near, gradients * true.abs().max().item())


@pytest.fixture(autouse=True)
def compiled(request):
    """Only the tests of the backend without Numba run where there is none."""
    if "no_numba" not in request.fixturenames and cpu._loops() is None:
        pytest.skip("Numba is not installed")


@pytest.fixture
def filled():
    """Fresh memory holds NaN, so that an entry nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- against the oracle --------------------------------------------------------------------------

GRIDS = {
    "x2": (dict(b=2, h=7, w=18), dict(size=(14, 36))),
    "x3.3 5x5": (dict(k=4, h=9, w=5), dict(size=(30, 16), radius=2)),
    "x4 uneven": (dict(k=4, h=5, w=33), dict(size=(20, 83), radius=1)),
    "x1": (dict(h=6, w=17), dict(size=(6, 17), radius=2, normalize=False)),
    "x0.6": (dict(h=11, w=35), dict(size=(7, 21), radius=1)),
    "x0.2": (dict(h=11, w=40), dict(size=(2, 8), radius=3)),
    "x30": (dict(k=1, h=2, w=3), dict(size=(60, 90), radius=1)),
    "up and down": (dict(h=3, w=40), dict(size=(50, 9), radius=2)),
    "one LR pixel": (dict(k=9, h=1, w=1), dict(size=(23, 9), radius=3)),
    "one HR pixel": (dict(h=5, w=4), dict(size=(1, 1), radius=2)),
    "1 to 1": (dict(h=1, w=1), dict(size=(1, 1), radius=0)),
    "radius 0": (dict(k=3, h=4, w=19), dict(size=(9, 50), radius=0, normalize=False)),
    "radius above the image": (dict(h=3, w=4), dict(size=(8, 9), radius=9)),
    "narrow": (dict(k=4, h=6, w=16, sigma=(0.02, 0.05)), dict(size=(24, 64), radius=1)),
    "wide": (dict(k=2, h=6, w=9, sigma=(4.0, 5.0)), dict(size=(13, 20), radius=3)),
    "every sigma": (dict(k=4, h=6, w=9, sigma=(0.02, 5.0)), dict(size=(25, 37), radius=2)),
    "slanted": (dict(k=4, h=6, w=9, sigma=(0.1, 2.0), rho=0.99), dict(size=(25, 37), radius=2)),
    "eps small": (dict(k=1, h=6, w=9), dict(size=(25, 37), radius=1, eps=1e-6)),
    "rows": (dict(b=2, k=1, h=6, w=9), dict(size=(25, 37), rows=(7, 19), radius=1)),
    "one row": (dict(h=6, w=9), dict(size=(25, 37), rows=(24, 25), radius=2)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid(name, filled):
    shape, arguments = GRIDS[name]
    agree(rows_of(**arguments), field(**shape))


def test_grid_without_offset():
    agree(rows_of((11, 40), radius=2), field(k=4, h=5, w=18)._replace(offset=None))


def test_eight_channels():
    agree(rows_of((13, 24), radius=3), field(k=1, c=8, h=5, w=7))


@pytest.mark.slow
@pytest.mark.parametrize("c", [1, 2, 5, 16, 20, 33])  # more than 16 are splatted in parts
def test_more_channels(c):
    agree(rows_of((13, 24), radius=1), field(k=2, c=c, h=5, w=7))
    agree(points_of(spread(1, 50, 5, 7)), field(k=2, c=c, h=5, w=7))


def spread(b, q, h, w, dtype=torch.float32):
    """Points in and around an image."""
    g = torch.Generator().manual_seed(2)
    return torch.rand(b, q, 2, generator=g, dtype=dtype) * torch.tensor([h + 4, w + 4]) - 2.5


POINTS = {
    "float32": (dict(b=2, k=4, h=9, w=21), spread(2, 300, 9, 21), dict(radius=1)),
    "float64": (dict(h=9, w=21), spread(1, 300, 9, 21, torch.float64), dict(radius=2)),
    "not normalised": (dict(h=4, w=5), spread(1, 77, 4, 5), dict(radius=3, normalize=False)),
    "one LR pixel": (dict(k=9, h=1, w=1), spread(1, 500, 1, 1), dict(radius=1)),
    "one point": (dict(h=8, w=19), torch.tensor([[[3.2, 17.9]]]), dict(radius=2)),
    "far away": (dict(h=4, w=5), torch.tensor([[[-1e9, 2.0], [3.0, 1e30]]]), dict(radius=1)),
}


@pytest.mark.parametrize("name", POINTS)
def test_points(name, filled):
    shape, points, arguments = POINTS[name]
    agree(points_of(points, **arguments), field(**shape))


def test_points_half_way_between_pixels():
    """There the nearest pixel, and with it the window, jumps: no rounding may decide it."""
    half = torch.arange(-2, 12) / 2
    points = torch.stack(torch.meshgrid(half, half, indexing="ij"), dim=-1).reshape(1, -1, 2)
    agree(points_of(points, radius=0), field(h=5, w=5, sigma=(0.5, 2.0)))
    agree(points_of(points, radius=1), field(h=5, w=5, sigma=(0.5, 2.0)))


@pytest.mark.parametrize("n", range(1, 40))
def test_grid_knows_the_nearest_pixel(n):
    for size in (1, 2, 3, 5, 16, 37, 64, 118, 997):
        nearest, away, start = cpu._axis(n, size)
        points = reference.grid_points(n, 1, (size, 1))[:, 0]
        expected = torch.floor(points + 0.5)
        assert nearest.tolist() == expected.tolist()
        torch.testing.assert_close(torch.from_numpy(away), points - expected, atol=1e-12, rtol=0)
        counts = torch.bincount(expected.long(), minlength=n)
        assert start[0] == 0 and (start[1:] - start[:-1]).tolist() == counts.tolist()


def test_points_of_the_grid_give_the_grid():
    f = field(b=2, k=4, h=5, w=18)
    points = reference.grid_points(5, 18, (12, 41)).expand(2, -1, -1)
    at, grid = forward_at(f, points), forward(f, (12, 41))
    torch.testing.assert_close(at.mT.reshape(grid.shape), grid, atol=0, rtol=0)


def test_float64():
    f = field(b=2, k=4, h=7, w=18, sigma=(0.05, 3.0), dtype=torch.float64)
    agree(rows_of((17, 50), radius=2), f, 1e-10, 1e-10)
    agree(points_of(spread(2, 200, 7, 18, torch.float64), radius=1), f, 1e-10, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f = field(k=4, h=5, w=7).map(lambda t: t.to(dtype))
    single = f.map(torch.Tensor.float)
    forward, backward, _ = rows_of((11, 20), radius=2)
    out, grad = forward(f), torch.randn(1, 3, 11, 20).to(dtype)
    assert torch.equal(out, forward(single).to(dtype))
    for ours, ours_single in zip(backward(grad, f), backward(grad, single), strict=True):
        assert torch.equal(ours, ours_single.to(dtype))
    mixed = single._replace(values=f.values)
    assert forward(mixed).dtype == torch.float32
    assert [t.dtype for t in backward(grad, mixed)] == [dtype] + [torch.float32] * 4


# ---- properties ----------------------------------------------------------------------------------


def test_strides_do_not_matter():
    one = torch.rand(1, 2, 9, 4, 18)  # parameters side by side, as a convolution leaves them
    values, sigma, offset, rho, opacity = one.split([3, 2, 2, 1, 1], dim=2)
    f = Gaussians(values, sigma + 0.1, rho[:, :, 0] * 0.9, opacity[:, :, 0], offset)
    views = Gaussians(
        f[0].expand(2, -1, -1, -1, -1),
        f[1].mT.contiguous().mT.expand(2, -1, -1, -1, -1),
        f[2][..., :1].expand(2, 2, 4, 18),
        f[3].expand(2, -1, -1, -1),
        f[4].expand(2, -1, -1, -1, -1),
    )
    forward, backward, _ = rows_of((9, 50))
    copies = views.map(torch.Tensor.contiguous)
    grad = torch.randn(1, 1, 1, 50).expand(2, 3, 9, 50)
    assert torch.equal(forward(views), forward(copies))
    for ours, expected in zip(
        backward(grad, views), backward(grad.contiguous(), copies), strict=True
    ):
        assert torch.equal(ours, expected)
    points = spread(2, 40, 4, 18).mT.contiguous().mT
    forward, _, _ = points_of(points)
    assert torch.equal(forward(views), points_of(points.contiguous())[0](copies))


def everything(f, h, w):
    """All results of all four functions, with more points in some pixels than others."""
    b = f.values.shape[0]
    crowd = torch.cat([spread(b, 200, h, w), spread(b, 300, 1, 1)], dim=1)
    made = []
    for forward, backward, _ in (rows_of((3 * h, 2 * w), radius=2), points_of(crowd)):
        out = forward(f)
        made += [out, *backward(out.cos(), f)]
    return made


def test_results_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(cpu, "THREAD", 1)
    f = field(b=3, k=4, h=11, w=37)
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(everything(f, 11, 37))
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))


def test_results_do_not_depend_on_batch_or_rows():
    f = field(b=3, k=4, h=7, w=19)
    out = forward(f, (20, 50))
    assert torch.equal(forward(f.map(lambda t: t[1:2]), (20, 50)), out[1:2])
    for start, stop in ((0, 1), (3, 11), (19, 20)):
        assert torch.equal(forward(f, (20, 50), (start, stop)), out[:, :, start:stop])


def test_calls_from_several_threads(monkeypatch):
    monkeypatch.setattr(cpu, "THREAD", 1)
    fields = [field(b=2, k=4, h=8, w=21, seed=seed) for seed in range(4)]
    expected, made = [everything(f, 8, 21) for f in fields], {}

    def call(n):
        made[n] = [everything(fields[n], 8, 21) for _ in range(3)]

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        for results in made[n]:
            assert all(torch.equal(a, b) for a, b in zip(results, expected[n], strict=True))


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(cpu, "THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    caller = threading.get_ident()

    def task(image, start, stop):
        if threading.get_ident() != caller:
            raise MemoryError("no more")
        done.wait(10)

    done = threading.Event()
    threading.Timer(0.2, done.set).start()
    with pytest.raises(MemoryError):
        cpu._run(task, 1, (0, 100), weights=100)


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_stays_where_it_belongs(name):
    f = field(k=2, h=5, w=20, dtype=torch.float32)
    spoilt = f[NAMES.index(name)]
    spoilt[(0, 1) + (1,) * (spoilt.dim() - 4) + (2, 9)] = torch.nan
    for forward, backward, oracle in (
        rows_of((15, 60), radius=1),
        points_of(spread(1, 500, 5, 20), radius=1),
    ):
        expected, gradients, grad = by_oracle(oracle, f, torch.float32)
        out = forward(f)
        assert expected.isnan().any() and not expected.isnan().all()
        assert torch.equal(out.isnan(), expected.isnan())
        made = backward(grad, f)
        for ours, theirs in zip(made, gradients, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())


def test_not_a_number_far_from_all_points_reaches_no_other():
    """Lanes without a point are computed all the same; only the spoilt Gaussian may see it."""
    f = field(k=2, h=5, w=20)
    f[1][0, 1, 0, 2, 9] = torch.nan
    forward, backward, _ = points_of(torch.tensor([[[2.0, 1.0], [2.0, 6.0]]]))
    out = forward(f)
    assert not out.isnan().any()
    for gradient in backward(out, f):
        gradient[0, 1, ..., 2, 9] = 0
        assert not gradient.isnan().any()


def test_points_that_are_not_numbers():
    f, points = field(h=5, w=21), spread(1, 50, 5, 21)
    points[0, 7, 0], points[0, 9, 1] = torch.nan, torch.inf
    out, clean = forward_at(f, points, radius=1), points.nan_to_num(0, 0, 0)
    expected = forward_at(f, clean, radius=1)
    others = torch.ones(50, dtype=torch.bool)
    others[[7, 9]] = False
    assert out[0, 7].isnan().all()
    assert torch.equal(out[:, others], expected[:, others])


def test_nothing_to_do():
    f = field(b=2)
    assert forward(f, (8, 9), (3, 3)).shape == (2, 3, 0, 9)
    assert forward_at(f, torch.zeros(2, 0, 2)).shape == (2, 0, 3)
    weighting = Weighting(1, True, 1e-2)
    made = cpu.backward_at(torch.zeros(2, 0, 3), f, torch.zeros(2, 0, 2), weighting)
    for gradient, t in zip(made, f, strict=True):
        assert torch.equal(gradient, torch.zeros_like(t))


def test_inference_mode():
    f = field()
    expected = forward(f, (8, 9))
    with torch.inference_mode():
        assert torch.equal(forward(f.map(torch.clone), (8, 9)), expected)


def test_gradients_of_requiring_tensors():
    f = field().map(torch.Tensor.requires_grad_)
    out = forward(f, (8, 9), radius=1)
    assert not out.requires_grad
    backward(out, f, (8, 9))


def test_powers_of_two():
    """The exponential: 2^-x to the last place, 0 where normal float32 numbers end, NaN kept."""
    import numba

    from gsr.ops import cpu_loops

    load, decay, store, lanes = (
        cpu_loops.load, cpu_loops.decay, cpu_loops.store, cpu_loops.LANES,
    )  # fmt: skip

    @numba.njit
    def fill(out, x):
        for n in range(0, x.size, lanes):
            store(out, n, decay(load(x, n)))

    x = torch.cat([torch.linspace(0, 126, 1 << 16), torch.logspace(-30, 0, 1 << 10)])
    out = torch.empty_like(x)
    fill(out.numpy(), x.numpy())
    true = torch.exp2(-x.double())
    assert ((out - true) / true).abs().max() < 1e-7
    ends = torch.tensor([0.0, 127.0, 128.0, 1e30, torch.inf, torch.nan]).repeat(lanes)
    out = torch.empty_like(ends)
    fill(out.numpy(), ends.numpy())
    assert out[:5].tolist() == [1, 0, 0, 0, 0] and out[5].isnan()


# ---- without Numba -------------------------------------------------------------------------------


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "gsr.ops.cpu_loops", raising=False)
    import gsr

    monkeypatch.delattr(gsr.ops, "cpu_loops", raising=False)
    cpu._loops.cache_clear()
    yield
    cpu._loops.cache_clear()


@pytest.mark.parametrize("piece", [1, 1000, 1 << 18])
def test_without_numba(no_numba, monkeypatch, piece, capsys):
    monkeypatch.setattr(cpu, "PIECE", piece)
    f = field(b=2, k=2, h=4, w=5)
    agree(rows_of((9, 12), rows=(2, 8), radius=2), f)
    agree(points_of(spread(2, 33, 4, 5)), f)
    agree(rows_of((9, 12)), f._replace(offset=None))
    hint = capsys.readouterr().err
    assert hint.count("pip install 'gaussiansr[cpu]'") == 1 and hint.count("\n") == 1


def test_without_numba_where_autograd_does_not_record(no_numba):
    f = field()
    _, _, oracle = rows_of((8, 9))
    _, expected, grad = by_oracle(oracle, f, torch.float32)
    with torch.inference_mode():
        made = backward(grad.clone(), f.map(torch.clone), (8, 9))
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- processes -----------------------------------------------------------------------------------


def python(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numba_is_imported_only_when_it_is_needed():
    python("import sys; from gsr.ops import cpu; assert 'numba' not in sys.modules")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from Linux")
def test_memory():
    peak = python(
        """
        import torch
        from gsr.ops import cpu
        from gsr.ops.arguments import Gaussians, Grid, Weighting
        torch.set_num_threads(2)
        def field(n):
            f = [torch.rand(1, 4, *s, n, n) for s in [(3,), (2,), (), (), (2,)]]
            f[1] += 0.1
            return Gaussians(*f)
        def forward(f, n):
            grid = Grid((4 * n, 4 * n), (0, 4 * n), (0, n))
            return cpu.forward(f, grid, Weighting(1, True, 1e-2))
        def status(key):  # MB
            with open("/proc/self/status") as lines:
                return next(int(x.split()[1]) for x in lines if x.startswith(key)) / 1024
        forward(field(64), 64)  # compiles
        f = field(384)
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # forgets the peak so far
        before = status("VmRSS")
        out = forward(f, 384)
        print(status("VmHWM") - before - out.numel() * 4 / 2**20)
        """
    )
    assert -1 < float(peak) < 40


def test_other_devices_get_the_pieces_of_the_reference(monkeypatch):
    """No loop may follow an address that is not the CPU's; "meta" stands for such a device."""
    monkeypatch.setattr(cpu, "_loops", lambda: pytest.fail("loops for another device"))
    with torch.device("meta"):
        values, rest = torch.rand(1, 2, 3, 4, 5), torch.rand(1, 2, 2, 4, 5)
        f = Gaussians(values, rest, rest[:, :, 0], rest[:, :, 1])
    out = forward(f, (8, 10), radius=1)
    assert out.device.type == "meta" and out.shape == (1, 3, 8, 10)
    gradients = backward(out, f, (8, 10))
    for got, given in zip(gradients, f, strict=True):
        assert given is None or (got.device.type, got.shape) == ("meta", given.shape)
