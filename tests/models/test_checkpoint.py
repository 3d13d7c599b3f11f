"""Model folders: what was saved comes back exactly, and every damage is refused in one sentence."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import gsr
from gsr.config import to_dict
from gsr.errors import InputError
from gsr.models import checkpoint
from gsr.models.checkpoint import load, load_model, save_model


@pytest.fixture
def folder(tmp_path, tiny_model):
    save_model(tmp_path / "model", tiny_model)
    return tmp_path / "model"


def refused(path):
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip(folder, tiny_model):
    tiny_model.bf16_loss = 0.003
    save_model(folder, tiny_model)
    model = gsr.load(folder)
    assert isinstance(model, gsr.GaussianSR) and not model.training
    assert model.bf16_loss == 0.003
    assert model.config == tiny_model.config
    for (name, want), (other, have) in zip(
        tiny_model.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(want, have)
    lr = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        assert torch.equal(model(lr, scale=2), tiny_model(lr, scale=2))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((folder / "config.json").read_text()) == {
        "format": 4,
        "bf16_loss": 0.003,
        "model": to_dict(tiny_model.config),
    }


def test_saving_again(folder, tiny_model):
    with torch.no_grad():
        next(tiny_model.parameters()).fill_(3)
    tiny_model.to(memory_format=torch.channels_last)
    save_model(folder, tiny_model, "# The card\n")
    assert (next(load(folder).parameters()) == 3).all()
    assert (folder / "README.md").read_text() == "# The card\n"
    save_model(folder, tiny_model)  # without a card: the one that is there stays
    assert (folder / "README.md").read_text() == "# The card\n"
    assert len(list(folder.iterdir())) == 3


def test_saving_where_nothing_can_be(tmp_path, tiny_model):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be made"):
        save_model(tmp_path / "file", tiny_model)


def test_missing(tmp_path, folder):
    assert "there is no such model" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    assert "is no model" in refused(tmp_path / "notes.txt")
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(folder)


def test_configs_are_read_strictly(folder):
    original = (folder / "config.json").read_text()
    cases = [
        (lambda c: c.update(format=5), "reads formats up to 4"),
        (lambda c: c.pop("format"), "has format None"),
        (lambda c: c.pop("model"), "has no key model"),
        (lambda c: c["model"].update(mood=1), "model.mood is not a key; did you mean model.mode?"),
        (lambda c: c["model"]["direct"].update(radius=0), "model.direct.radius must be at least 1"),
        (lambda c: c.update(extra=1), "extra is not a key"),
    ]
    for change, sentence in cases:
        (folder / "config.json").write_text(original)
        edit(folder, change)
        assert sentence in refused(folder)
    for text in ("{", "", "[]", "[" * 100_000, '{"format": 1' + 5000 * "0" + "}"):
        (folder / "config.json").write_text(text)
        assert "config.json" in refused(folder)
    (folder / "config.json").write_bytes(b"\xff\xff")
    assert "is not readable JSON" in refused(folder)


def test_format_1_had_offsets_within_three_quarters(folder):
    edit(folder, lambda c: (c.update(format=1), c["model"]["direct"].pop("reach")))
    assert gsr.load(folder).head.reach == 0.75
    edit(folder, lambda c: c.update(format=2))
    assert gsr.load(folder).head.reach == 0.5


def test_format_2_had_relu(folder):
    edit(folder, lambda c: (c.update(format=2), c["model"]["direct"].pop("activation")))
    assert gsr.load(folder).config.direct.activation == "relu"
    edit(folder, lambda c: c.update(format=3))
    assert gsr.load(folder).config.direct.activation == "leaky_relu"


def test_damaged_tensors(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for content in (b"", b"x" * 100, data[:-7], data[: len(data) // 2]):
        path.write_bytes(content)
        assert "is damaged" in refused(folder)


def test_tensors_must_be_those_of_the_config(folder, tiny_model):
    name = "head.out.weight"
    data = (folder / "model.safetensors").read_bytes()
    cases = [
        (lambda t: t.pop(name), f"{name} is missing"),
        (lambda t: t.update(spare=torch.zeros(1)), "spare is unknown"),
        (lambda t: t.update({name: t[name][:-1].clone()}), f"{name} is [17, 8, 1, 1] instead of"),
        (lambda t: t.update({name: t[name].to(torch.int32)}), "is not a dense tensor"),
        (lambda t: t[name].view(-1)[3:4].fill_(float("nan")), "holds infinite"),
        (lambda t: t.clear(), "more"),
    ]
    for change, sentence in cases:
        (folder / "model.safetensors").write_bytes(data)
        edit_tensors(folder, change)
        assert sentence in refused(folder)
    (folder / "model.safetensors").write_bytes(data)
    edit(folder, lambda c: c["model"]["encoder"].update(n_blocks=2))
    assert "is missing" in refused(folder)


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_sizes_are_compared_before_anything_is_allocated(folder, mode):
    def enlarge(content):
        content["model"]["mode"] = mode
        content["model"]["encoder"].update(n_feats=256)
        content["model"]["bank"].update(points=10_000)

    edit(folder, enlarge)
    state = torch.get_rng_state()
    assert "more such faults" in refused(folder)
    assert torch.equal(torch.get_rng_state(), state)  # no weight was drawn
    edit(folder, lambda c: c["model"]["encoder"].update(n_feats=10**7))
    assert "model.encoder.n_feats must be at most 4096" in refused(folder)


def test_half_precision_weights_are_widened(folder):
    edit_tensors(folder, lambda t: [t.update({k: v.half()}) for k, v in list(t.items())])
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float32}


def test_published_files_go_to_their_reader(tmp_path, monkeypatch, tiny_model):
    seen = []
    module = types.ModuleType("gsr.models.published")
    module.load_published = lambda path: (seen.append(path), tiny_model)[1]
    monkeypatch.setitem(sys.modules, "gsr.models.published", module)
    path = tmp_path / "edsr-baseline.pth"
    path.write_bytes(b"x")
    assert load(path) is tiny_model and seen == [path]


def test_bundled_model(monkeypatch, tmp_path, folder):
    monkeypatch.setitem(checkpoint.BUNDLED, "lite", tmp_path / "none")
    with pytest.raises(InputError, match="has no bundled model"):
        load()
    monkeypatch.setitem(checkpoint.BUNDLED, "lite", folder)
    assert isinstance(load(), gsr.GaussianSR) and isinstance(load("lite"), gsr.GaussianSR)
    monkeypatch.setitem(checkpoint.BUNDLED, "photo", tmp_path / "none")
    with pytest.raises(InputError, match="has no bundled model photo"):
        load("photo")
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "photo")
    assert isinstance(load("./photo"), gsr.GaussianSR)
