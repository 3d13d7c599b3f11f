"""The `field` head: a continuous field that depends on nothing it should not; the bank it uses."""

import pytest
import torch

from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig
from gsr.data.patches import pixel_coords
from gsr.errors import InputError
from gsr.models import GaussianSR
from gsr.models.heads import fourier
from gsr.models.heads.bank import BankEncoded, BoundedBank, GaussianBank, assign
from gsr.models.heads.decoder import FourierDecoder, bicubic_neighbours, gather_pixels
from gsr.ops.resize import bicubic


def make(mode="field", seed=0, **bank):
    """A small model whose Gaussians and decoder all matter."""
    torch.manual_seed(seed)
    config = ModelConfig(
        mode=mode,
        encoder=EncoderConfig(n_feats=12, n_blocks=1),
        bank=BankConfig(points=9, channels=4, **bank),
        decoder=DecoderConfig(hidden_dim=16, hidden_list=[16, 16]),
    )
    model = GaussianSR(config).eval()
    with torch.no_grad():
        model.encoder.body[-1].weight.mul_(3)
        model.head.classifier.weight.mul_(20)
        for p in model.head.bank.parameters():
            p.add_(torch.randn_like(p))
        for name, p in model.head.decoder.named_parameters():
            p.mul_(1.5 if "weight" in name else 1)
    return model


def image(h=9, w=11, b=1, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def splat(model, encoded, size):
    """The splatted channels of a whole image."""
    return model.head.splat_rows(model.head.prepare(encoded, None), (0, size[0]), size=size)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("size", [(5, 8), (9, 11), (14, 17), (22, 28), (36, 44), (20, 60)])
@pytest.mark.parametrize("window", [3, 7])
def test_queries_are_pixels_of_the_image(size, window):
    model, lr = make(window=window), image(b=2)
    with torch.no_grad():
        whole = model(lr, size=size)
        assert whole.std() > 0.02
        coord = pixel_coords(torch.arange(size[0] * size[1]), size).expand(2, -1, -1)
        at = model(lr, size=size, coord=coord)
        close(at.mT.reshape(whole.shape), whole)
        few = torch.randperm(size[0] * size[1])[: size[0] * size[1] // 9 - 1]
        close(model(lr, size=size, coord=coord[:, few]), at[:, few])


def test_gradients_of_queries_are_those_of_the_image():
    model, lr, size = make(), image(b=2), (22, 28)
    few = torch.randperm(22 * 28)[:20]
    coord = pixel_coords(few, size).expand(2, -1, -1)
    weight = torch.randn(2, 20, 3)
    grads = []
    for values in (model(lr, size=size).flatten(2)[:, :, few].mT, model(lr, size, coord=coord)):
        model.zero_grad()
        (values * weight).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 10 and grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        assert (grads[1][name] - want).norm() < 1e-4 * want.norm(), name


def test_few_queries_of_a_huge_image():
    """100 million HR pixels would neither fit nor finish."""
    model, size = make(), (10_000, 10_000)
    coord = pixel_coords(torch.tensor([0, 12_345_678, 99_999_999]), size)[None]
    assert model(image(), size=size, coord=coord).isfinite().all()


@pytest.mark.parametrize("rows", [(0, 1), (0, 20), (13, 14), (17, 40), (39, 40)])
def test_rows_are_rows_of_the_image(rows, monkeypatch):
    model, size = make(), (40, 33)
    encoded = model.encode(image(b=2))
    whole = model.render(encoded, size)
    close(model.render(encoded, size, rows=rows), whole[:, :, slice(*rows)])
    monkeypatch.setattr(fourier, "STRIP", 140)
    close(model.render(encoded, size, rows=rows), whole[:, :, slice(*rows)])


def test_rows_cost_no_more_than_themselves(monkeypatch):
    model, asked = make(), []
    inner = model.head.splat_rows

    def splat_rows(splat, rows, **options):
        asked.append(rows)
        return inner(splat, rows, **options)

    monkeypatch.setattr(model.head, "splat_rows", splat_rows)
    model.render(model.encode(image()), (40, 33), rows=(10, 14))
    assert asked == [(9, 15)]


def test_unequal_scales_are_those_of_the_size():
    model, lr = make(), image()
    close(model(lr, scale=(2, 3.5)), model(lr, size=(18, 38)), atol=0)
    assert model(lr, scale=(2, 3.5)).shape == (1, 3, 18, 38)


def test_one_image_does_not_see_the_other():
    model, lr = make(), image(b=3)
    together = model(lr, scale=2.3)
    close(torch.cat([model(one[None], scale=2.3) for one in lr]), together)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_moves_with_the_image(scale):
    """One LR pixel down is `scale` HR pixels down, away from the borders."""
    size, margin = 25, 10  # LR pixels: encoder 4, classifier 1, window 3, resizing 2, decoder 1
    lr = image(size + 1, size, seed=3)

    def moved(model):
        above, below = model(lr[:, :, :-1], scale=scale), model(lr[:, :, 1:], scale=scale)
        inner = slice(margin * scale, (size - margin) * scale)
        return (above[:, :, scale:][:, :, inner] - below[:, :, inner])[..., inner].abs().max()

    assert moved(make()) < 1e-5
    if scale > 1:
        assert moved(make("official")) > 1e-3  # whose windows stand still


@pytest.mark.parametrize("size", [(9, 11), (40, 33), (18, 22), (27, 100)])
@pytest.mark.parametrize("extreme", [0, 1, 30])
def test_constant_features_stay_constant(size, extreme):
    """No holes, whatever the bank has learnt."""
    model, g = make(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.head.bank.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * extreme)
        model.head.bank.opacity.clamp_(-8, 8)
    chosen = torch.randint(9, (1, 1, 9, 11), generator=g)
    one_hot = torch.zeros(1, 9, 9, 11).scatter_(1, chosen, 1)
    constant = torch.tensor([0.0, 1.0, -3.0, 17.0])[None, :, None, None]
    features = torch.cat([constant.expand(1, 4, 9, 11), torch.zeros(1, 8, 9, 11)], dim=1)
    encoded = BankEncoded(features, model.head.bank(one_hot), features[:, :0])
    splatted = splat(model, encoded, size)
    torch.testing.assert_close(splatted, constant.expand_as(splatted), atol=0, rtol=1e-5)


def test_the_least_total_weight():
    """BoundedBank's claim about holes, at its worst: all bounds reached, midway between pixels."""
    bank = BoundedBank(9, radius=3)
    with torch.no_grad():
        bank.sigma_x.fill_(-50), bank.sigma_y.fill_(-50), bank.rho.fill_(50)
    sigma, rho = bank.table()[0, 0], bank.table()[0, 3]
    d = 0.5 / sigma
    weight = torch.exp(-0.5 * (2 * d**2 + 2 * rho * d**2) / (1 - rho**2))  # at (0.5, -0.5)
    assert 1e-7 < weight < 1e-6


def test_sigma_and_position_have_rows_first():
    """One lit LR pixel: where its Gaussian, long down the rows, puts it at HR."""
    model, s = make(), 9
    gaussians = torch.tensor([0.3, 0.3, 0.5, 0.0])[None, :, None, None].repeat(1, 1, 9, 11)
    gaussians[:, 0, 4, 6] = 0.8
    features = torch.zeros(1, 12, 9, 11)
    features[:, :4, 4, 6] = 1
    encoded = BankEncoded(features, gaussians, features[:, :0])
    splatted = splat(model, encoded, (9 * s, 11 * s))
    assert splatted[0, 0].argmax() == (4 * s + s // 2) * 11 * s + 6 * s + s // 2
    y, x = 4 * s + s // 2, 6 * s + s // 2
    assert splatted[0, 0, y + s, x] > 3 * splatted[0, 0, y, x + s]
    close(splatted[0, 0, y + s, x], splatted[0, 0, y - s, x])


def test_bounds():
    bank = BoundedBank(100, radius=3)
    start = bank.table().detach()
    assert start[:, :2].min() > 0.25 and start[:, :2].max() < 0.875
    assert len(start[:, :2].unique(dim=0)) == 100
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn_like(p) * 100)
    sigma, opacity, rho = bank.table().split([2, 1, 1], dim=1)
    assert sigma.min() >= 0.25 and sigma.max() <= 0.875
    assert opacity.min() >= 0 and opacity.max() <= 1
    assert rho.abs().max() <= 0.75


def test_bank_starts_as_the_published_grid():
    table = GaussianBank(100).table().detach()
    grid = torch.linspace(0.2, 3, 10)
    assert {tuple(row) for row in table[:, :2].tolist()} == {
        (a, b) for a in grid.tolist() for b in grid.tolist()
    }
    assert (table[:, 2] - torch.sigmoid(torch.tensor(1.0))).abs().max() < 1e-6
    assert (table[:, 3] == 0).all()


def test_assignment():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    one_hot = assign(logits, "argmax")
    assert torch.equal(one_hot.argmax(1), logits.argmax(1))
    assert one_hot.unique().tolist() == [0, 1]
    close(assign(logits, "softmax"), logits.exp() / logits.exp().sum(1, keepdim=True))
    soft, hard = assign(logits, "gumbel"), assign(logits, "gumbel", hard=True)
    for weights in (one_hot, soft, hard):
        close(weights.sum(1), torch.ones(2, 3, 4))
    assert ((soft > 0.01) & (soft < 0.99)).any()
    assert ((hard < 1e-6) | (hard > 1 - 1e-6)).all()
    # Temperature 1: the noise adds to the logits, and nothing divides them.
    torch.manual_seed(4)
    soft = assign(logits, "gumbel")
    torch.manual_seed(4)
    sharper = assign(3 * logits, "gumbel")
    shift = sharper.log() - soft.log() - 2 * logits
    close(shift, shift[:, :1].expand_as(shift), atol=1e-4)
    # A hard sample picks each class as often as softmax says.
    many = assign(logits[:1, :, :1, :1].expand(20_000, -1, -1, -1), "gumbel", hard=True)
    close(many.mean(0), logits[0, :, :1, :1].softmax(0), atol=0.02)


def test_other_assignments_are_refused():
    with pytest.raises(InputError, match="argmax, softmax or gumbel, not 'hard'"):
        assign(torch.zeros(1, 4, 2, 2), "hard")


@pytest.mark.parametrize("mode", ["field", "official"])
def test_few_pixels_are_decoded_at_a_time(mode, monkeypatch):
    """However large HR is, but for the width of a row."""
    model, pixels, rgb = make(mode), [], FourierDecoder.rgb

    def counted(self, waves, *rest, **options):
        pixels.append(waves[..., 0].numel())
        return rgb(self, waves, *rest, **options)

    monkeypatch.setattr(FourierDecoder, "rgb", counted)
    size, most = (130, 301), fourier.STRIP
    with torch.inference_mode():
        encoded = model.encode(image(13, 14, b=2))
        model.render(encoded, size)
        assert max(pixels) <= most and sum(pixels) == 2 * 130 * 301
        pixels.clear()
        model.query(encoded, size, torch.zeros(2, 20_000, 2))
        assert max(pixels) <= fourier.QUERIES and sum(pixels) == 2 * 20_000


@torch.no_grad()
def test_autocast_is_for_the_decoder_alone(monkeypatch):
    """Not for the splat, nor for the layers that stay float32."""
    model, size = make(), (18, 22)
    encoded = model.encode(image())
    with torch.autocast("cpu", torch.bfloat16):
        got = model.render(encoded, size)
    float32 = model.render(encoded, size)
    monkeypatch.setattr(fourier, "autocast_dtype", lambda device: torch.bfloat16)
    assert torch.equal(got, model.render(encoded, size)) and not torch.equal(got, float32)


def test_each_pixel_has_its_own_mean_gaussian():
    bank, weights = GaussianBank(4), torch.rand(2, 4, 3, 5)
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn_like(p))
    for channel, p in enumerate((bank.sigma_x, bank.sigma_y, bank.opacity, bank.rho)):
        want = (weights * p.view(1, 4, 1, 1)).sum(1)
        close(bank(weights)[:, channel], want)


def test_training_draws_noise_and_evaluation_does_not():
    model, lr = make(), image()
    assert torch.equal(model.encode(lr).gaussians, model.encode(lr).gaussians)

    def from_the_bank():  # share of the pixels whose Gaussian is one of the bank, not a mixture
        gaussians = model.encode(lr).gaussians.flatten(2).mT  # [1, h w, 4]
        distance = (gaussians[:, :, None] - model.head.bank.table()).abs().amax(3)
        return (distance.amin(2) < 1e-5).float().mean()

    assert from_the_bank() == 1
    model.train()
    assert not torch.equal(model.encode(lr).gaussians, model.encode(lr).gaussians)
    assert from_the_bank() < 0.5
    first, again, other = (model.encode(lr, seeds=[seed]).gaussians for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.head.config.train_assignment = "softmax"
    assert torch.equal(model.encode(lr).gaussians, model.encode(lr).gaussians)
    model.eval().head.config.assignment = "gumbel"
    model.head.classifier.weight.data.zero_()
    assert not torch.equal(model.encode(lr).gaussians, model.encode(lr).gaussians)
    assert from_the_bank() == 1


def test_gradients_reach_every_parameter():
    model = make().train()
    coord = pixel_coords(torch.arange(0, 600, 7), (27, 33)).expand(2, -1, -1)
    model(image(b=2), size=(27, 33), coord=coord).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_half_precision_encoders_leave_hr_in_float32():
    model, lr = make(), image()
    model.head.config.assignment = "softmax"  # argmax may flip
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encode(lr)
    assert all(t.dtype == torch.float32 for t in encoded)
    out = model.render(encoded, (18, 22))
    assert out.dtype == torch.float32
    assert 0 < (out - model(lr, scale=2)).abs().mean() < 0.1


def test_memory_format_does_not_matter():
    model, lr = make(), image(b=2)
    want = model(lr, scale=2.5)
    last = model.to(memory_format=torch.channels_last)
    close(last(lr.contiguous(memory_format=torch.channels_last), scale=2.5), want)


@pytest.mark.parametrize("size", [(4, 30), (9, 11), (13, 17), (18, 44), (60, 35)])
def test_neighbours_are_pixels_of_the_resized_image(size):
    x = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(bicubic(x, size, (0, size[0])), (1, 1, 1, 1))
    index = torch.arange(size[0] * size[1])
    y, x_hr = (index // size[1]).expand(2, -1), (index % size[1]).expand(2, -1)
    got = bicubic_neighbours(x, y, x_hr, size=size)
    for n in range(9):
        want = gather_pixels(padded, y + n // 3, x_hr + n % 3)
        inside = (want != 0).any(dim=-1)
        assert inside.sum() >= 2 * (size[0] - 1) * (size[1] - 1)
        close(got[:, :, n][inside], want[inside])


@pytest.mark.parametrize("window", [0, 1, 4, -3])
def test_impossible_windows_are_refused(window):
    with pytest.raises(InputError, match="bank.window must be odd"):
        make(window=window)


@pytest.mark.parametrize("window", [3, 5, 7])
def test_a_gaussian_ends_with_its_window(window):
    """One lit LR pixel lights what is within window / 2 LR pixels of it, and fades before."""
    model = make(window=window)
    features = torch.zeros(1, 12, 11, 11)
    features[:, :4, 5, 5] = 1
    gaussians = torch.tensor([model.head.bank.high] * 2 + [0.5, 0.0])[None, :, None, None]
    encoded = BankEncoded(features, gaussians.expand(1, 4, 11, 11), features[:, :0])
    lit = splat(model, encoded, (44, 44))[0, 0]
    first, last = (lit.amax(1) > 0).nonzero()[[0, -1], 0].tolist()
    assert (first, last) == (22 - 2 * window, 21 + 2 * window)
    assert lit[first].max() < 2e-3 * lit.max()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["field", "bicubic"])
def test_a_skip_connection_adds_bicubic_upsampling(mode):
    plain = make(window=3)
    config = plain.config.model_copy(update={"mode": mode}, deep=True)
    without = GaussianSR(config).eval()
    config.decoder.skip = True
    added = GaussianSR(config).eval()
    for model in (without, added):
        model.load_state_dict(plain.state_dict(), strict=mode == "field")
    lr, size = image(b=2), (31, 25)
    base = bicubic(lr, size) - 0.5
    close(added(lr, size=size), without(lr, size=size) + base)
    encoded = added.encode(lr)
    close(added.render(encoded, size, rows=(9, 20)), added(lr, size=size)[:, :, 9:20])
    first, last = added.rows_needed((9, 20), (9, 11), size)
    assert last - first < 9
    band = type(encoded)._make(t[:, :, first:last] for t in encoded)
    close(
        added.render(band, size, rows=(9, 20), band=(first, 9)),
        added(lr, size=size)[:, :, 9:20],
    )
    coord = pixel_coords(torch.arange(31 * 25), size).expand(2, -1, -1)
    close(added(lr, size=size, coord=coord).mT.view(2, 3, *size), added(lr, size=size))


def test_official_has_no_skip_connection():
    config = ModelConfig(mode="official", decoder=DecoderConfig(skip=True))
    with pytest.raises(InputError, match="decoder.skip must be false in mode official"):
        GaussianSR(config)
