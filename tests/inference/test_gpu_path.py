"""The path of an image through a GPU: counted with tensors of no device, rehearsed on the CPU.

A fake CUDA tensor has a shape, a type and a device, but no values: what asks for one fails, as what
waits for a GPU should. What needs a GPU runs where there is one.
"""

import collections
import contextlib
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gsr
from gsr.config import BankConfig, DecoderConfig, DirectConfig, EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.inference import gpu
from gsr.inference import strips as infer
from gsr.inference import upscale as upscaling
from gsr.models import GaussianSR, fused
from gsr.models.checkpoint import load

LR, HR = (720, 1280), (2880, 5120)

# ---- counting -----------------------------------------------------------------------------------


def size_of(tensor):
    """Bytes of memory that it takes, where it is expanded those of what it is expanded from."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class Counter(TorchDispatchMode):
    """Counts the operations of a device, the bytes they read and write, and synchronisations."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = collections.Counter(), collections.Counter()
        self.waits = []

    def count(self, name, *tensors):
        self.operations[name] += 1
        self.bytes[name] += sum(size_of(t) for t in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::")
        result = function(*args, **kwargs)
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(t)]
        made = [t for t in torch.utils._pytree.tree_leaves(result) if is_tensor(t)]
        if not any(t.is_cuda for t in (*given, *made)):
            return result
        if any(not t.is_cuda and t.ndim for t in (*given, *made)):
            # A copy from or to the CPU; all others have their numbers on one device.
            free = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            if not free:
                self.waits.append(f"{name} {[t.device.type for t in (*given, *made)]}")
        if name.startswith(("empty", "new_empty", "prim::", "sym_")):
            return result
        if function.is_view and made[0].untyped_storage() in [t.untyped_storage() for t in given]:
            return result  # `to` and `reshape` may copy, and may be views
        if name == "index_select":
            given = made  # it reads as much as it writes
        if name == "gsr::splat":  # a strip reads its own rows
            size, (start, stop) = args[5:7]
            self.bytes[name] -= sum(size_of(t) for t in given) * (1 - (stop - start) / size[0])
        if name.startswith("conv") and len(given) == 3 and given[2].ndim == 1:
            self.count("bias", made[0], made[0])  # in a pass of its own
        self.count(name, *given, *made)
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def getitem(tensor, index):
    """tensor[index]: PyTorch's own needs a build for CUDA, even of a fake tensor."""
    index = index if isinstance(index, tuple) else (index,)
    if ... in index:
        at, missing = index.index(...), tensor.ndim - sum(i not in (None, ...) for i in index)
        index = index[:at] + missing * (slice(None),) + index[at + 1 :]
    dim = 0
    for i in index:
        if i is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            start, stop, step = i.indices(tensor.shape[dim])
            whole = (start, stop, step) == (0, tensor.shape[dim], 1)
            tensor = tensor if whole else torch.ops.aten.slice(tensor, dim, start, stop, step)
            dim += 1
        elif isinstance(i, int):
            tensor = tensor.select(dim, i)
        else:
            assert i.dtype == torch.int64, "a mask as an index waits for the device"
            assert dim == 0 and len(index) == 1
            tensor = torch.ops.aten.index(tensor, [i])
    return tensor


def setitem(tensor, index, value):
    part = getitem(tensor, index)
    torch.ops.aten.copy_(part, value) if is_tensor(value) else part.fill_(value)


def copy(tensor, source, non_blocking=False):
    return torch.ops.aten.copy_(tensor, source, non_blocking)


def contiguous(tensor, memory_format=torch.contiguous_format):
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return tensor.clone(memory_format=memory_format)


class Stream:
    """Stands for CUDA's streams and events, of which a fake tensor has none."""

    def __init__(self, *_):
        pass

    wait_stream = record = synchronize = __init__


def without_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(gpu, "free_bytes", lambda _: 70 * 10**9)
    monkeypatch.setattr(gpu, "pinned_bytes", lambda n: torch.empty(n, dtype=torch.uint8))


@pytest.fixture
def counter(monkeypatch):
    """Counts what a model does whose parameters are fake and on cuda."""
    without_streams(monkeypatch)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)
    monkeypatch.setattr(torch.Tensor, "__setitem__", setitem)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    counter = Counter()

    def relu_convolution(x, weight, bias):
        out = uncounted(torch.nn.functional.conv2d, x, weight, padding=weight.shape[-1] // 2)
        counter.count("cudnn_convolution_relu", x, weight, bias, out)
        return out

    def add_residual(y, bias, x, scale=1):
        assert y.shape == x.shape and y.stride() == x.stride() and bias.dtype == x.dtype == y.dtype
        counter.count("residual", y, x, y)
        return y

    def uncounted(function, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes() as modes:
            fake = next(m for m in modes if isinstance(m, FakeTensorMode))
            with fake:
                return function(*args, **kwargs)

    def new_tensor(like, data, **_):
        counter.waits.append("new_tensor")
        return like.new_empty(np.shape(data))

    monkeypatch.setattr(fused, "_has_fused", lambda *_: True)
    monkeypatch.setattr(fused, "relu_convolution", relu_convolution)
    monkeypatch.setattr(fused, "add_residual", add_residual)
    monkeypatch.setattr(torch.Tensor, "new_tensor", new_tensor)
    return counter


def to_fake(model):
    """Put fake parameters on cuda into a model; `to` needs the device itself."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"))


def upscale_720p(counter, config, precision="bf16"):
    """Upscale a fake uint8 image by 4 with a fake model."""
    model = GaussianSR(config).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(model)
        lr = torch.empty(*LR, 3, dtype=torch.uint8).permute(2, 0, 1)
        planes = upscaling._plain(lr)
        with counter:
            upscaling._render(
                model, None, precision, None, planes, HR, (4, 4), lambda *_: None, 0,
                to=torch.device("cpu"), interleaved=True,
            )  # fmt: skip
    return model


# The goals are 80 operations and 8 GB for `direct`, 400 and 12 GB for `official`. Of what is above,
# about 1 GB of `direct` is clamping and rounding what the splat could write as bytes itself.
EXPECTED = {"direct": (80, 12.0e9, 0), "official": (515, 39.5e9, 4)}


@pytest.mark.parametrize("mode", EXPECTED)
def test_operations_bytes_and_synchronisations(mode, counter):
    config = load().config if mode == "direct" else ModelConfig(mode=mode)
    upscale_720p(counter, config)
    operations, moved, waits = EXPECTED[mode]
    assert 0.9 * operations <= sum(counter.operations.values()) <= operations, counter.operations
    assert 0.9 * moved <= sum(counter.bytes.values()) <= moved, counter.bytes
    assert len(counter.waits) == waits, counter.waits
    assert counter.operations["copy_"] >= 4  # the results, in strips


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: x.cpu(), lambda x: x.new_tensor([1.0]),
    lambda x: torch.ones(3).to(x.device), lambda x: x.tolist(),
])  # fmt: skip
def test_what_waits_is_noticed(wait, counter):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), counter:
        x = torch.empty(3, device="cuda")
        try:
            wait(x)
        except Exception:
            return
    assert counter.waits


def test_a_wait_in_the_path_fails(counter, monkeypatch):
    clamp = torch.Tensor.clamp_
    monkeypatch.setattr(torch.Tensor, "clamp_", lambda x, *a: clamp(x, *a) * x.max().item())
    with pytest.raises(Exception, match="local_scalar_dense"):
        upscale_720p(counter, load().config)


# ---- bands and strips ---------------------------------------------------------------------------


def test_one_band_where_it_fits():
    model = GaussianSR(load().config)
    assert gpu.rows_that_fit(70e9, model, 1, LR, HR) == (720, 2**22 // 5120)
    rows = gpu.rows_that_fit(8e9, model, 1, (2160, 3840), (8640, 15360))
    assert 200 < rows.band < 2160 and rows.strip == 2**22 // 15360
    assert gpu.rows_that_fit(1e5, model, 1, (2160, 3840), (8640, 15360)) == (1, 1)


@pytest.mark.parametrize("mode", ["direct", "field", "official", "liif"])
@pytest.mark.parametrize("free", [10**8, 10**9, 10**10, 10**11])
def test_rows_take_no_more_than_their_share(mode, free):
    model = GaussianSR(ModelConfig(mode=mode))
    lr_size, size = (1000, 1500), (3300, 4000)
    for batch in (1, 2):
        band, strip = gpu.rows_that_fit(free, model, batch, lr_size, size)
        assert 1 <= band <= 1000 and 1 <= strip <= 3300
        rows = band if band == 1000 else band + 2 * model.halo
        taken = batch * (1500 * rows * gpu.lr_bytes(model) + 4000 * strip * gpu.HR_BYTES)
        assert taken <= gpu.SHARE * free or band == 1


# ---- rehearsed on the CPU -----------------------------------------------------------------------


@pytest.fixture
def rehearsed(monkeypatch):
    """Have everything take the path of a GPU; returns the bands that are encoded."""
    without_streams(monkeypatch)
    monkeypatch.setattr(gpu, "release", lambda _: None)
    monkeypatch.setattr(gpu, "STRIP_PIXELS", 400)
    bands = []

    class Noted(gpu.GpuRenderer):
        def _encode_rows(self, start, stop):
            bands.append((start, stop))
            super()._encode_rows(start, stop)

    make = lambda *a, **k: Noted(*a, **k)  # noqa: E731
    monkeypatch.setattr(infer, "make_renderer", make)
    monkeypatch.setattr(upscaling, "make_renderer", make)
    return bands


def drawn(mode, **encoder):
    torch.manual_seed(0)
    small = DecoderConfig(hidden_dim=8, hidden_list=[8])
    model = GaussianSR(ModelConfig(
        mode=mode, encoder=EncoderConfig(**{"n_feats": 8, "n_blocks": 2, **encoder}),
        decoder=small, bank=BankConfig(points=9, channels=4), direct=DirectConfig(radius=2),
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("mode, encoder", [
    ("direct", {}), ("direct", {"res_scale": 0.3}), ("field", {}), ("official", {}),
    ("direct", {"name": "span"}),
    ("direct", {"name": "swinir", "dim": 8, "depths": [2], "heads": 2, "window": 4}),
])  # fmt: skip
@pytest.mark.parametrize("bands", [1, 4])
def test_equals_the_model(mode, encoder, bands, rehearsed, monkeypatch):
    model, lr, size = drawn(mode, **encoder), torch.rand(2, 3, 61, 23), (150, 70)
    rows = gpu.Rows(61 if bands == 1 else 17, 9)
    monkeypatch.setattr(gpu, "rows_that_fit", lambda *_: rows)
    with torch.no_grad():
        expected = model(lr, size=size)
    out = infer.run(model, lr, size)
    assert (out - expected).abs().max() < 1e-5
    assert len(rehearsed) == 1 if bands == 1 else len(rehearsed) >= bands


class Far(torch.nn.Module):
    """Features that are LR three rows above and below."""

    halo = 3

    def forward(self, lr):
        tall = torch.nn.functional.pad(lr, (0, 0, 3, 3))
        return torch.cat([lr, tall[:, :, :-6], tall[:, :, 6:]], dim=1)[:, :8]


def test_a_band_has_the_whole_halo(rehearsed, monkeypatch):
    model, lr = drawn("direct"), torch.rand(1, 3, 61, 23)
    model.encoder = Far()
    model.head.hidden.weight.data *= 30  # what is at the rim of the halo counts
    monkeypatch.setattr(gpu, "rows_that_fit", lambda *_: gpu.Rows(17, 9))
    with torch.no_grad():
        expected = model(lr, scale=2)
    assert (infer.run(model, lr, (122, 46)) - expected).abs().max() < 1e-5 and len(rehearsed) > 3


def test_every_kind_of_image_comes_back(rehearsed, image, tiny_model):
    rgba = np.concatenate([image, 10 * image[..., :1]], axis=-1)
    opaque = np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)
    images = [image, image[..., 0], rgba, opaque, image / np.float32(255), image.astype("uint16")]
    images.append(torch.from_numpy(image).permute(2, 0, 1))
    found = [gsr.upscale(x, 2.5, model=tiny_model) for x in images]
    assert rehearsed
    with pytest.MonkeyPatch.context() as plain:
        for module in (infer, upscaling):
            plain.setattr(module, "make_renderer", lambda *a, to, interleaved=False, **k:
                          infer.StripRenderer(*a, **k))  # fmt: skip
        for x, ours in zip(images, found, strict=True):
            true = gsr.upscale(x, 2.5, model=tiny_model)
            assert ours.shape == true.shape and ours.dtype == true.dtype
            assert np.abs(np.float64(ours) - np.float64(true)).max() <= (
                1e-5 if np.asarray(x).dtype.kind == "f" else 1
            )


def test_a_strip_stays_while_it_is_written(rehearsed, tiny_model, monkeypatch, image):
    """The caller still writes one strip from page-locked memory as the next but one is copied."""
    held, start = [], gpu.HostCopies.start

    def noted(self, strip):
        wait = start(self, strip)
        for before, values in held[-2:]:
            assert torch.equal(before, values)
        held.append((wait(), strip.clone()))
        return wait

    monkeypatch.setattr(gpu.HostCopies, "start", noted)
    gsr.upscale(image, 4, model=tiny_model)
    assert len(held) > 3


def test_out_of_memory_halves_and_goes_on(rehearsed, tiny_model, monkeypatch):
    lr, render, fails = torch.rand(1, 3, 40, 20), GaussianSR.render, [3, 4, 9]
    with torch.no_grad():
        expected = tiny_model(lr, scale=3)
    calls = []

    def sometimes(self, *a):
        calls.append(a)
        if len(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return render(self, *a)

    monkeypatch.setattr(GaussianSR, "render", sometimes)
    out = infer.run(tiny_model, lr, (120, 60))
    assert (out - expected).abs().max() < 1e-5 and len(rehearsed) >= 4
    fails[:] = range(1000)
    with pytest.raises(InputError, match="not enough memory to encode and render even single rows"):
        infer.run(tiny_model, lr, (120, 60))


def test_max_memory_is_of_the_cpu(rehearsed, tiny_model, image, monkeypatch):
    monkeypatch.setattr(infer, "_resident", lambda: 10**9)
    with pytest.raises(InputError, match="this image takes about 1060 MB, more than max_memory"):
        gsr.upscale(image, 2, model=tiny_model, max_memory=10**9)
    gsr.upscale(image, 2, model=tiny_model, max_memory=2 * 10**9)


def test_progress_ends_at_its_total(rehearsed, tiny_model, monkeypatch, image):
    ends = []

    class Bar:
        total = n = 0
        refresh = lambda self: None  # noqa: E731

        def update(self, n):
            self.n += n
            ends.append((self.n, self.total))

    monkeypatch.setattr(
        upscaling, "progress_bar", lambda p: contextlib.nullcontext(Bar() if p else None)
    )
    gsr.upscale(image, 4, model=tiny_model, progress=True)
    assert ends[-1][0] == pytest.approx(ends[-1][1]) and len(ends) > 3


# ---- EDSR in fewer passes -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_fused_edsr(dtype, allowed):
    model, lr = drawn("direct", res_scale=0.3), torch.rand(2, 3, 19, 30)
    with torch.inference_mode():
        true, ours = model.encoder(lr), fused.FusedEDSR(model.encoder, dtype)(lr)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=fused.FusedEDSR(model.encoder, dtype).format)
    assert (ours - true).abs().max() <= allowed * true.abs().max()


def test_a_layer_with_relu(monkeypatch):
    conv, x = torch.nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 5, 6)
    true = conv(x).relu()
    assert torch.equal(fused.relu_layer(conv, x), true) and fused.relu_layer(conv, x).requires_grad
    # Only where a GPU has it; what is called then is tried here without one.
    calls, plain = [], lambda x, w, b: torch.nn.functional.conv2d(x, w, b, padding=1).relu()
    monkeypatch.setattr(fused, "_has_fused", lambda *_: True)
    monkeypatch.setattr(fused, "relu_convolution", lambda *a: calls.append(a) or plain(*a))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fused.relu_layer(conv, x), true)
    assert calls[0][1].is_contiguous(memory_format=torch.channels_last)


def test_other_encoders_stay_as_they_are():
    span = drawn("direct", name="span").encoder
    assert fused.fast_encoder(span, torch.float32) is span
    lr = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(fused.fast_encoder(span, torch.bfloat16)(lr), span(lr))


# ---- TF32 ---------------------------------------------------------------------------------------


def settings():
    return [get() for get, _ in gpu._tf32_settings()]


def test_float32_is_exact_and_settings_return():
    before = settings()
    (_, put), *_ = gpu._tf32_settings()
    try:
        put(True if isinstance(before[0], bool) else "tf32")
        outside = settings()
        inside, left = [], []
        go, done = threading.Event(), threading.Event()

        def other():
            with gpu.exact_float32():
                go.set()
                done.wait(10)
                inside.append(settings())

        thread = threading.Thread(target=other)
        with pytest.raises(ValueError, match="mine"), gpu.exact_float32():
            thread.start()
            go.wait(10)
            inside.append(settings())
            raise ValueError("mine")
        left.append(settings())  # the other call is still at work
        done.set()
        thread.join()
        assert settings() == outside
        assert all(s[0] in (False, "ieee") for s in inside + left)
    finally:
        put(before[0])


def test_only_a_gpu_changes_settings(tiny_model, monkeypatch):
    monkeypatch.setattr(gpu, "exact_float32", lambda: pytest.fail("this is the CPU"))
    gsr.upscale(torch.rand(3, 4, 4), 2, model=tiny_model)


# ---- on a GPU -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("mode", ["direct", "field", "official"])
@pytest.mark.parametrize("bands", [1, 4])
def test_a_gpu_gives_what_the_cpu_does(mode, bands, monkeypatch):
    model, lr, size = drawn(mode), torch.rand(2, 3, 61, 23), (150, 70)
    expected, tf32 = infer.run(model, lr, size), settings()
    if bands > 1:
        monkeypatch.setattr(gpu, "rows_that_fit", lambda *_: gpu.Rows(17, 9))
    out = infer.run(model.to("cuda"), lr, size)
    assert (out - expected).abs().max() < 1e-4 and settings() == tf32
    there = infer.run(model, lr.to("cuda"), size)
    assert there.is_cuda and torch.equal(there.cpu(), out)
    bf16 = infer.run(model, lr, size, precision="bf16")
    assert (bf16 - expected).abs().max() < 0.1


@pytest.mark.cuda
@needs_gpu
def test_arrays_on_a_gpu(image, tiny_model):
    image = np.tile(image, (20, 30, 1))
    true = gsr.upscale(image, 4, model=tiny_model).astype(int)
    ours = gsr.upscale(image, 4, model=tiny_model.to("cuda"))
    assert np.abs(ours - true).max() <= 1


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_edsr_on_a_gpu(dtype):
    model, lr = drawn("direct").to("cuda"), torch.rand(2, 3, 19, 30, device="cuda")
    with torch.inference_mode(), gpu.exact_float32():
        true, ours = model.encoder(lr), fused.FusedEDSR(model.encoder, dtype)(lr)
    assert (ours - true).abs().max() <= (
        1e-5 if dtype == torch.float32 else 2e-2
    ) * true.abs().max()


@pytest.mark.cuda
@needs_gpu
def test_nothing_waits_but_for_results(tiny_model):
    model, image = tiny_model.to("cuda"), torch.zeros(3, 40, 50, dtype=torch.uint8, device="cuda")
    gsr.upscale(image, 3, model=model)  # what starts late
    torch.cuda.set_sync_debug_mode("error")
    try:
        gsr.upscale(image, 3, model=model)
        gsr.upscale(image.cpu(), 3, model=model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
