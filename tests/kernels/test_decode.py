"""The decoder's kernel on Triton's interpreter, on CUDA where it is, and when the heads call it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig
from gsr.models import GaussianSR
from gsr.models.heads import decode_gpu, fourier
from gsr.ops import decode

SCRIPT = Path(__file__).parent / "decode_cases.py"
MODES = pytest.mark.parametrize("mode", ["field", "official", "bicubic"])


def cases():
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    spec = importlib.util.spec_from_file_location("decode_cases", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # A data class asks for its module.
    sys.modules["decode_cases"] = module
    spec.loader.exec_module(module)
    return module


def test_interpreted():
    count = len(cases().CASES) + 3  # the heads
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["failures"] == {} and len(found["errors"]) == count


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    module = cases()
    for name, case in (module.CASES | module.LARGE).items():
        assert module.failures(module.run_case(case, "cuda")) == [], name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_repeats_every_bit_on_cuda():
    module = cases()
    *tensors, weights, strip = module.draw(module.LARGE["published, skip"], "cuda")
    first = decode.decode(*tensors, weights, strip)
    for _ in range(5):
        assert torch.equal(decode.decode(*tensors, weights, strip), first)


# ---- the operator and the heads -----------------------------------------------------------------


def build(mode, **changes):
    torch.manual_seed(0)
    decoder = DecoderConfig(
        **{"hidden_dim": 22, "hidden_list": [40, 17], "skip": mode != "official", **changes}
    )
    config = ModelConfig(
        mode, encoder=EncoderConfig(n_feats=20, n_blocks=1), bank=BankConfig(points=9),
        decoder=decoder,
    )  # fmt: skip
    model = GaussianSR(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@MODES
@pytest.mark.parametrize("rows", [None, (0, 1), (12, 17), (30, 31)])
def test_layout_of_the_weights(mode, rows, monkeypatch):
    """The operator on the CPU gives what the head gives without it: any widths, strips, bands."""
    model, lr, size = build(mode), torch.rand(2, 3, 15, 13), (31, 43)
    with torch.inference_mode():
        encoded = model.encode(lr)
        more = {}
        if rows:
            start, stop = model.rows_needed(rows, (15, 13), size)
            if mode == "official":
                more["shared"] = model.head.shared(encoded.gaussians)
            part = type(encoded)(*(t[:, :, start:stop] for t in encoded))
            encoded, more["band"], more["rows"] = part, (start, 15), rows
        expected = model.render(encoded, size, **more)
        monkeypatch.setattr(decode_gpu, "takes", lambda *_: True)
        monkeypatch.setattr(decode_gpu, "STRIP", 600)
        found = model.render(encoded, size, **more)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_published_widths_need_no_padding():
    decoder = build("field", hidden_dim=256, hidden_list=[256] * 4).head.decoder
    weights = decode_gpu.lay_out(decoder, lr_size=(3, 4), size=(6, 9), dtype=torch.bfloat16)
    assert weights.conv.shape == (9, 4, 128, 32) and weights.weights.shape == (4, 256, 256)
    assert weights.last.shape == (3, 256)
    assert {n for n, t in weights._asdict().items() if t.dtype == torch.bfloat16} == {
        "conv", "weights",
    }  # fmt: skip


def test_operator():
    decoder = build("field").head.decoder
    with torch.no_grad():
        weights = decode_gpu.lay_out(decoder, lr_size=(3, 4), size=(6, 9), dtype=torch.float32)
    weights = decode.DecoderWeights(*(t.detach() for t in weights))  # some are parameters
    features, lr = torch.rand(2, 20, 3, 4), torch.rand(2, 3, 3, 4)
    splatted = torch.rand(2, 8, 4, 9)
    arguments = (features, splatted, lr, *weights, (6, 9), (1, 3), (0, 3))
    torch.library.opcheck(torch.ops.gsr.decode.default, arguments)
    strip = decode.Strip((6, 9), (1, 3), (0, 3))
    compiled = torch.compile(decode.decode, fullgraph=True, backend="aot_eager")
    found = compiled(features, splatted, lr, weights, strip)
    assert torch.equal(found, decode.decode(features, splatted, lr, weights, strip))


@MODES
@pytest.mark.parametrize("bf16", [False, True])
def test_heads_take_the_kernel(mode, bf16, monkeypatch):
    """Where there is one: strip by strip, and nothing else is decoded."""
    asked = []

    def decode_strip(*arguments):
        *_, weights, strip = arguments
        asked.append((weights.conv.dtype, strip.rows))
        return decode.decode(*arguments)

    def refuse(*_, **__):
        raise AssertionError("decoded by PyTorch")

    model = build(mode)
    monkeypatch.setattr(decode_gpu, "has_kernel", lambda _: True)
    monkeypatch.setattr(decode_gpu, "STRIP", 20_000)
    monkeypatch.setattr(fourier, "decode", decode_strip)
    monkeypatch.setattr(fourier, "StripDecoder", refuse)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.inference_mode(), autocast:
        assert model(torch.rand(1, 3, 60, 50), scale=4).shape == (1, 3, 240, 200)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert asked == [(dtype, rows) for rows in ((0, 80), (80, 160), (160, 240))]


def test_on_cuda_there_is_a_kernel():
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    with FakeTensorMode():
        features = torch.empty(1, 20, 6, 5, device="cuda")  # says so, and holds nothing
        assert decode.has_kernel(features)
        assert not decode.has_kernel(torch.empty(1, 20, 6, 5, device="cuda", dtype=torch.float64))
    assert not decode.has_kernel(torch.empty(1, 20, 6, 5))


def test_training_and_float64_keep_pytorch(monkeypatch):
    monkeypatch.setattr(decode_gpu, "has_kernel", lambda _: True)
    decoder, features = build("field").head.decoder, torch.rand(1, 20, 6, 5)
    assert not decode_gpu.takes(decoder, features)  # gradients are wanted
    with torch.no_grad():
        assert decode_gpu.takes(decoder, features)
        assert not decode_gpu.takes(decoder, features.double())
        assert not decode_gpu.takes(decoder.double(), features)
