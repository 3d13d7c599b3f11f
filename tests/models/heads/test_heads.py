"""The heads that others published, `liif` and `lte`, and `bicubic`: their formulas, and one image
whatever is asked of it."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gsr
import train
from gsr.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    LIIFConfig,
    LTEConfig,
    ModelConfig,
    from_dict,
    load_config,
)
from gsr.data.patches import pixel_coords
from gsr.errors import InputError
from gsr.inference import strips as infer
from gsr.models import GaussianSR
from gsr.models.checkpoint import save_model
from gsr.models.heads import fourier, liif
from gsr.ops.resize import bicubic as resize

MODES = ["bicubic", "liif", "lte"]
ROOT = Path(__file__).parents[3]


def make(mode, seed=0):
    """A small model whose encoder and decoder both matter."""
    torch.manual_seed(seed)
    config = ModelConfig(
        mode,
        EncoderConfig(n_feats=6, n_blocks=1),
        decoder=DecoderConfig(hidden_dim=16, hidden_list=[16, 16]),
        liif=LIIFConfig(hidden_list=[12, 10]),
        lte=LTEConfig(hidden_dim=8, hidden_list=[10, 12]),
    )
    model = GaussianSR(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("head"):
                p.mul_(2)
    return model


def image(h=9, w=11, b=1, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def every(size, b=1):
    return pixel_coords(torch.arange(size[0] * size[1]), size).expand(b, -1, -1)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- the papers' formulas -----------------------------------------------------------------------


def relu_mlp(weights, x):
    """Linear, ReLU, ..., Linear of a state dict's layers.N."""
    names = sorted({int(name.split(".")[1]) for name in weights if name.startswith("layers")})
    for n in names:
        x = weights[f"layers.{n}.weight"] @ x + weights[f"layers.{n}.bias"]
        x = x if n == names[-1] else np.maximum(x, 0)
    return x


def ensemble(answer, coord, h, w):
    """Equation 4 of LIIF: `answer(i, j, away)` of the codes nearest to four shifted points, each
    by the area between the point and the code diagonally opposite. coord is (y, x) in [-1, 1]."""
    centres = [(2 * np.arange(n) + 1) / n - 1 for n in (h, w)]
    answers, areas = {}, {}
    for sides in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        code, away = [], []
        for q, side, c, n in zip(coord, sides, centres, (h, w), strict=True):
            shifted = np.clip(q + side / n + 1e-6, -1 + 1e-6, 1 - 1e-6)
            code.append(int(np.abs(c - shifted).argmin()))
            away.append((q - c[code[-1]]) * n)
        answers[sides] = answer(*code, np.array(away))
        areas[sides] = abs(away[0] * away[1]) + 1e-9
    total = sum(areas.values())
    return sum(answers[y, x] * areas[-y, -x] / total for y, x in answers)


def liif_by_loops(features, lr, weights, coord, size):
    """Section 3 of LIIF: unfolded features, relative position and cell to a colour."""
    c, h, w = features.shape
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1)))
    cell = np.array([2 / size[0] * h, 2 / size[1] * w])

    def answer(i, j, away):
        unfolded = [padded[k, i + y, j + x] for k in range(c) for y in range(3) for x in range(3)]
        return relu_mlp(weights, np.concatenate([unfolded, away, cell]))

    return 0.5 + 0.5 * ensemble(answer, coord, h, w)


def lte_by_loops(features, lr, weights, coord, size):
    """Section 3 of LTE: amplitudes times waves of learnt frequencies and phases, an MLP, and the
    LR image upsampled bilinearly; in [-1, 1], as it is trained."""
    c, h, w = features.shape
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1)))
    cell = np.array([2 / size[0] * h, 2 / size[1] * w])

    def conv(name, i, j):
        patch = padded[:, i : i + 3, j : j + 3]
        return (weights[f"{name}.weight"] * patch).sum((1, 2, 3)) + weights[f"{name}.bias"]

    def answer(i, j, away):
        pairs = conv("freq", i, j).reshape(-1, 2)
        phase = np.pi * (pairs @ away + weights["phase.weight"] @ cell)
        waves = conv("coef", i, j) * np.concatenate([np.cos(phase), np.sin(phase)])
        return relu_mlp(weights, waves)

    y, x = (np.clip(((q + 1) * n - 1) / 2, 0, n - 1) for q, n in zip(coord, (h, w), strict=True))
    i, j = min(int(y), h - 2), min(int(x), w - 2)
    y, x = y - i, x - j
    lr = 2 * lr - 1
    upper = lr[:, i, j] * (1 - x) + lr[:, i, j + 1] * x
    lower = lr[:, i + 1, j] * (1 - x) + lr[:, i + 1, j + 1] * x
    return 0.5 + 0.5 * (ensemble(answer, coord, h, w) + upper * (1 - y) + lower * y)


@torch.no_grad()
@pytest.mark.parametrize("mode, by_loops", [("liif", liif_by_loops), ("lte", lte_by_loops)])
@pytest.mark.parametrize("size", [(7, 9), (4, 5), (11, 16), (3, 20)])
def test_papers(mode, by_loops, size):
    model, lr = make(mode), image(4, 5, 2)
    if mode == "lte":
        model.head.decoder.least_cell = 0
    features = model.encoder(lr).double().numpy()
    weights = {n: t.double().numpy() for n, t in model.head.decoder.state_dict().items()}
    encoded = model.encode(lr)
    # Pixel centres, the corners and borders of the image, and anything between.
    some = torch.tensor([[-1.0, -1], [1, 1], [-1, 0.3], [0.9999, -0.2]])
    anywhere = torch.rand(20, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    coord = torch.cat([every(size)[0], some, anywhere])
    # On the centres of the last row or column all areas vanish, and the formula says nothing.
    position = ((coord.double() + 1) * torch.tensor([4, 5]) - 1) / 2
    coord = coord[((position - torch.tensor([3, 4])).abs() > 1e-5).all(1)]
    assert len(coord) >= 0.6 * (size[0] * size[1] + 24)
    got = model.query(encoded, size, coord.expand(2, -1, -1))
    for b in range(2):
        want = np.array([
            by_loops(features[b], lr[b].double().numpy(), weights, q, size)
            for q in coord.double().numpy()
        ])  # fmt: skip
        close(got[b].double(), torch.from_numpy(want))
        assert want.std() > 0.02


@torch.no_grad()
def test_parameters_of_the_papers():
    """LIIF's and LTE's decoders for 64 channels: 347.0 K and 494 K."""

    def count(mode):
        with torch.device("meta"):
            return sum(p.numel() for p in GaussianSR(ModelConfig(mode)).head.parameters())

    hidden, colour = 256 * 257, 3 * 257
    assert count("liif") == (9 * 64 + 2 + 2 + 1) * 256 + 3 * hidden + colour == 346_883
    waves = 2 * 256 * (64 * 9 + 1) + 2 * 128
    assert count("lte") == waves + 3 * hidden + colour == 493_827
    assert count("bicubic") == waves + 4 * hidden + colour


@torch.no_grad()
def test_liif_with_a_skip_connection_adds_bilinear_upsampling():
    plain, lr, size = make("liif"), image(b=2), (22, 28)
    config = plain.config.model_copy(update={"liif": LIIFConfig([12, 10], skip=True)})
    added = GaussianSR(config).eval()
    added.load_state_dict(plain.state_dict())
    base = F.interpolate(lr, size, mode="bilinear") - 0.5
    close(added(lr, size=size), plain(lr, size=size) + base)
    rows = added.render(added.encode(lr), size, rows=(5, 9))
    close(rows, added(lr, size=size)[:, :, 5:9])
    at = added(lr, size=size, coord=every(size, 2))
    close(at.mT.reshape(2, 3, *size), added(lr, size=size))


@torch.no_grad()
def test_the_cell_of_lte_ends_at_its_largest_scale():
    model, lr = make("lte"), image()
    encoded, coord = model.encode(lr), every((9, 11))

    def at(scale):
        return model.query(encoded, (9 * scale, 11 * scale), coord)

    close(at(8), at(4), atol=1e-6)
    assert (at(4) - at(2)).abs().max() > 1e-3
    model.head.decoder.least_cell = 2 / 8
    assert (at(8) - at(4)).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("size", [(9, 11), (20, 31), (13, 60)])
def test_bicubic_decodes_the_resized_features(size):
    """Pixel by pixel from the features resized as a whole."""
    model, lr = make("bicubic"), image(b=2)
    encoded, d = model.encode(lr), model.head.decoder
    close(encoded.features, model.encoder(lr))
    hr = resize(encoded.features, size)
    coef, freq = d.coef(hr), d.freq(hr).unflatten(1, (-1, 2))
    away = []
    for n, n_hr in zip((9, 11), size, strict=True):
        position = (torch.arange(n_hr).double() + 0.5) * n / n_hr - 0.5
        away.append(2 * (position - (position + 1e-7).round().clamp(0, n - 1)))
    y, x = away[0].float()[:, None], away[1].float()
    cell = torch.tensor([2 * n / n_hr for n, n_hr in zip((9, 11), size, strict=True)])
    turn = math.pi * (freq[:, :, 0] * y + freq[:, :, 1] * x + d.phase(cell)[:, None, None])
    waves = coef * torch.cat([turn.cos(), turn.sin()], 1)
    want = d.layers(waves.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 0.5 + 0.5
    got = model.render(encoded, size)
    # Halfway between two LR pixels, rounding may take either.
    same = (got - want).abs().amax(1) < 1e-4
    assert same.float().mean() > (0.99 if size != (13, 60) else 0.9)


# ---- one image, whatever is asked of it -------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(5, 8), (9, 11), (14, 17), (22, 28), (36, 44), (20, 60)])
def test_queries_are_pixels_of_the_image(mode, size, monkeypatch):
    model, lr = make(mode), image(b=2)
    whole = model(lr, size=size)
    assert whole.shape == (2, 3, *size) and whole.std() > 0.02
    at = model(lr, size=size, coord=every(size, 2))
    close(at.mT.reshape(whole.shape), whole)
    few = torch.randperm(size[0] * size[1])[:7]
    close(model(lr, size=size, coord=every(size, 2)[:, few]), at[:, few])
    for module in (liif, fourier):
        monkeypatch.setattr(module, "QUERIES", 17)
    close(model(lr, size=size, coord=every(size, 2)), at)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_queries_are_those_of_the_image(mode):
    model, lr, size = make(mode), image(b=2), (22, 28)
    few = torch.randperm(22 * 28)[:20]
    coord, weight, grads = every(size, 2)[:, few], torch.randn(2, 20, 3), []
    for values in (model(lr, size=size).flatten(2)[:, :, few].mT, model(lr, size, coord=coord)):
        model.zero_grad()
        (values * weight).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, want in grads[0].items():
        assert want.abs().max() > 0, name
        assert (grads[1][name] - want).norm() < 1e-4 * want.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [(0, 1), (0, 20), (13, 14), (17, 40), (39, 40)])
def test_rows_and_strips_are_those_of_the_image(mode, rows, monkeypatch):
    model, size = make(mode), (40, 33)
    encoded = model.encode(image(b=2))
    whole = model.render(encoded, size)
    close(model.render(encoded, size, rows=rows), whole[:, :, slice(*rows)])
    for pixels in (1, 10, 70):
        monkeypatch.setattr(liif, "PIXELS", pixels)
        monkeypatch.setattr(fourier, "STRIP", pixels)
        close(model.render(encoded, size, rows=rows), whole[:, :, slice(*rows)])


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_the_rows_needed_are_enough(mode, seed):
    draw = random.Random(seed)
    h, w = draw.randint(1, 30), draw.randint(1, 12)
    size = draw.randint(max(1, h // 2), 5 * h), draw.randint(1, 4 * w)
    model, lr = make(mode, seed), image(h, w, seed=seed)
    encoded = model.encode(lr)
    whole = model.render(encoded, size)
    for _ in range(4):
        first = draw.randrange(size[0])
        rows = first, draw.randint(first + 1, size[0])
        top, end = model.rows_needed(rows, (h, w), size)
        band = type(encoded)._make(t[:, :, top:end] for t in encoded)
        part = model.render(band, size, rows=rows, band=(top, h))
        close(part, whole[:, :, slice(*rows)])


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_one_image_does_not_see_the_other(mode):
    model, lr = make(mode), image(b=3)
    together = model(lr, scale=2.3)
    close(torch.cat([model(one[None], scale=2.3) for one in lr]), together, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size, scale", [((75, 60), None), ((52, 98), (1.52, 3.51))])
def test_run_equals_the_model(mode, size, scale, monkeypatch):
    model, lr = make(mode), image(34, 28, 2)
    want = model(lr, size=size, scale=scale)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 1200)
    for pixels in (1, 300, 1200, 10000):
        monkeypatch.setattr(infer, "BAND_PIXELS", pixels)
        close(infer.run(model, lr, size, scale), want)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_few_queries_of_a_huge_image(mode):
    model, size = make(mode), (10_000, 10_000)
    coord = pixel_coords(torch.tensor([0, 12_345_678, 99_999_999]), size)[None]
    assert model(image(), size=size, coord=coord).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["liif", "lte"])
def test_the_image_has_no_seams(mode):
    """Where the four codes change, and between HR pixels: steps shrink with the step's width."""
    model, size = make(mode), (36, 44)
    encoded = model.encode(image())
    seam = pixel_coords(torch.arange(99), (9, 11))  # on centres of LR pixels
    for axis in (0, 1):
        shift = torch.zeros(2)
        shift[axis] = 1e-5
        a, b = (model.query(encoded, size, (seam + s)[None]) for s in (shift, -shift))
        assert (a - b).abs().max() < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_half_precision(mode):
    """Encoders in bf16 leave HR in float32; matrices of the decoder may be bf16."""
    model, lr = make(mode), image()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            encoded = model.encode(lr)
        assert all(t.dtype == torch.float32 for t in encoded)
        want, out = model(lr, scale=2), model.render(encoded, (18, 22))
        assert out.dtype == torch.float32 and 0 < (out - want).abs().mean() < 0.05
    out = infer.run(model, lr, (18, 22), precision="bf16")
    assert out.dtype == torch.float32 and 0 < (out - want).abs().mean() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_memory_format_does_not_matter(mode):
    model, lr = make(mode), image(b=2)
    want = model(lr, scale=2.5)
    last = model.to(memory_format=torch.channels_last)
    close(last(lr.contiguous(memory_format=torch.channels_last), scale=2.5), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["rdn", "swinir"])
def test_saved_and_loaded_with_every_encoder(mode, name, tmp_path):
    encoder = EncoderConfig(
        name, n_feats=6, n_blocks=1, layers=2, growth=4, dim=8, depths=[2], heads=2, window=4
    )
    torch.manual_seed(0)
    model = GaussianSR(ModelConfig(mode, encoder)).eval()
    save_model(tmp_path, model)
    again = gsr.load(tmp_path)
    assert again.config == model.config
    lr = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    large = gsr.upscale(lr, 2.5, model=again)
    assert large.shape == (18, 22, 3) and large.dtype == np.uint8
    np.testing.assert_array_equal(large, gsr.upscale(lr, 2.5, model=model))


@pytest.mark.parametrize("mode, encoder", [("bicubic", "edsr"), ("liif", "rdn"), ("lte", "swinir")])
def test_training(mode, encoder, tmp_path):
    overrides = [
        f"output={tmp_path}", f"data.train={ROOT / 'tests' / 'data' / 'photos'}", "data.patch=12",
        "data.queries=64", "data.batch=2", "data.val_count=1", "train.threads=1", "train.steps=40",
        "train.lr=3e-3", "train.log_every=10", "train.warmup=0", "train.clip=null",
        f"model.mode={mode}",
        f"model.encoder.name={encoder}",
        "model.encoder.n_feats=8", "model.encoder.n_blocks=1", "model.encoder.layers=2",
        "model.encoder.growth=4", "model.encoder.dim=8", "model.encoder.depths=[2]",
        "model.encoder.heads=2", "model.encoder.window=4", "model.decoder.hidden_dim=16",
        "model.decoder.hidden_list=[16]", "model.liif.hidden_list=[16, 16]",
        "model.lte.hidden_dim=16", "model.lte.hidden_list=[16]",
    ]  # fmt: skip
    train.train(load_config(ROOT / "configs" / "smoke.yaml", overrides), progress=False)
    rows = [json.loads(line) for line in open(tmp_path / "smoke" / "log.jsonl")]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0] and all(row.get("psnr", 20) > 10 for row in rows)
    assert gsr.load(tmp_path / "smoke" / "model").config.mode == mode


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode):
    torch._dynamo.reset()
    eager, compiled = make(mode), make(mode).compile(backend="aot_eager")
    with torch.inference_mode():
        for h, w, scale in [(12, 13, 2), (20, 31, 3.3), (15, 15, 4), (33, 18, 2.5)]:
            lr = image(h, w)
            close(compiled(lr, scale=scale), eager(lr, scale=scale))


@torch.no_grad()
def test_liif_at_scale_one_of_a_constant_is_constant():
    """Weights of the ensemble sum to 1 everywhere, also where all four codes are one."""
    side = liif.beside(torch.tensor([-0.5, -0.2, 0.0, 0.3, 4.0, 4.4]).double(), 5)
    assert torch.equal(side.weight.sum(-1), torch.ones(6))
    assert side.index.tolist() == [[0, 0], [0, 0], [0, 1], [0, 1], [4, 4], [4, 4]]
    close(side.away[3], torch.tensor([0.6, -1.4]))
    lr = torch.full((1, 3, 5, 4), 0.3)
    base = F.interpolate(lr, (13, 9), mode="bilinear", align_corners=False)
    model = make("lte")
    for p in model.head.decoder.layers.parameters():
        p.zero_()
    close(model(lr, size=(13, 9)), base, atol=1e-6)
    lr = image()
    base = F.interpolate(lr, (31, 25), mode="bilinear", align_corners=False)
    close(model(lr, size=(31, 25)), base, atol=1e-6)


@pytest.mark.parametrize(
    "section, sentence",
    [
        ({"mode": "lite"}, "mode must be one of direct, field, official, bicubic, liif, lte"),
        ({"liif": {"hidden_list": []}}, "liif.hidden_list must be at least 1 long"),
        ({"lte": {"hidden_dim": 7}}, "lte.hidden_dim must be a multiple of 2"),
        ({"lte": {"hidden_list": [0]}}, r"lte.hidden_list\[0\] must be at least 1"),
        ({"lte": {"scale_max": 0}}, "lte.scale_max must be above 0"),
    ],
)
def test_configs_that_are_refused(section, sentence):
    with pytest.raises(InputError, match=sentence):
        from_dict(ModelConfig, section)


def test_lte_is_trained_no_further_than_its_phase_is_learnt():
    """Above its scale_max the phase stands still: a training there would be a handicap."""
    wrong = {"model": {"mode": "lte", "lte": {"scale_max": 3}}, "data": {"scale_max": 4}}
    sentence = "model.lte.scale_max must be at least data.scale_max in mode lte, not 3.0"
    with pytest.raises(InputError, match=sentence):
        from_dict(Config, wrong)
    from_dict(Config, {**wrong, "data": {"scale_max": 3}})
    from_dict(Config, {**wrong, "model": {"mode": "liif", "lte": {"scale_max": 3}}})


def test_banks_are_no_matter_where_there_is_none():
    for mode in MODES:
        assert from_dict(ModelConfig, {"mode": mode, "encoder": {"n_feats": 4}}).mode == mode
