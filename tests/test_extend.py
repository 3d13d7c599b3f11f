"""docs/extend.md: every file on the page trains, resumes and loads again, as its reader will do."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import gsr
import train
from gsr.config import load_config
from gsr.errors import InputError
from gsr.inference.strips import StripRenderer, run
from gsr.models.checkpoint import load_model
from tests.children import finish, start_ranks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```\w+ title="(.*?)"\n(.*?)```', PAGE, re.DOTALL))
CONFIGS = sorted(name.removesuffix(".yaml") for name in FILES if name.endswith(".yaml"))
PHOTOS = ROOT / "tests" / "data" / "photos"
TINY = [
    f"data.train={PHOTOS}", "data.patch=12", "data.queries=64", "data.batch=2", "data.val_count=1",
    "model.encoder.n_feats=8", "model.encoder.n_blocks=1", "model.direct.width=4",
    "train.threads=1", "train.log_every=1", "train.device=cpu", "train.save_every=2",
]  # fmt: skip


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The folder with all files of the page, and pairs of images; one starts in it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for photo in sorted(PHOTOS.glob("*.jpg"))[:3]:
        hr = Image.open(photo).crop((0, 0, 96, 120))
        for name, image in (("HR", hr), ("LR", hr.resize((24, 30), Image.Resampling.BICUBIC))):
            (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "pairs" / name / f"{photo.stem}.png")
    monkeypatch.chdir(tmp_path)
    before = {*sys.modules}
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in {*sys.modules} - before:
        if name.startswith(("my_", "adversarial")):
            del sys.modules[name]


def lines(name):
    """The lines of a config as overrides, one a key of a section."""
    sections = yaml.safe_load(FILES[f"{name}.yaml"])
    return [f"{s}.{k}={json.dumps(v)}" for s, keys in sections.items() for k, v in keys.items()]


def config(folder, name, *overrides):
    own = [line for line in TINY if "encoder" not in line or name != "my_encoder"]
    base = ROOT / "configs" / "smoke.yaml"
    return load_config(base, [*own, *lines(name), f"output={folder}", *overrides])


def weights(folder):
    return load_file(folder / "smoke" / "model" / "model.safetensors")


def test_the_page_has_all_six():
    kinds = ["my_data", "my_degradation", "my_encoder", "my_head", "my_loss", "my_optimizer"]
    assert kinds == CONFIGS and "adversarial.py" in FILES


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_trains_and_resumes_exactly(page, name):
    """Three steps at once, and three of which the last one is resumed."""
    steps = [] if name == "my_optimizer" else ["train.schedule=step"]
    train.train(config("whole", name, "train.steps=3", *steps), progress=False)
    if steps:
        train.train(config("parts", name, "train.steps=2", *steps), progress=False)
        train.train(config("parts", name, "train.steps=3", *steps), True, progress=False)
        one, two = weights(page / "whole"), weights(page / "parts")
        assert all(torch.equal(one[key], two[key]) for key in one)
    rows = [json.loads(row) for row in open(page / "whole" / "smoke" / "log.jsonl")]
    assert [r["kind"] for r in rows] == ["train"] * 3 + ["val"]
    assert all(np.isfinite(r["loss"]) for r in rows[:3]) and rows[3]["psnr"] > 5
    assert ({"x4"} if name == "my_data" else {"x2", "x3", "x4", "x6", "x8"}) <= rows[3].keys()
    model = load_model(page / "whole" / "smoke" / "best")
    assert model(torch.rand(1, 3, 12, 14), scale=2.5).shape == (1, 3, 30, 35)


def test_what_the_optimiser_and_schedule_of_the_page_do(page):
    from gsr.models import GaussianSR
    from gsr.optim import make_optimizer, make_schedule

    c = config("out", "my_optimizer", "train.lr=4e-3", "train.warmup=0")
    optimizer, rate = make_optimizer(GaussianSR(c.model), c.train), make_schedule(c.train, 8, 1)
    assert [g["initial_lr"] for g in optimizer.param_groups] == [1e-3, 4e-3]
    assert rate(0, 1.0) == rate(4, 1.0) == 1 and abs(rate(2, 1.0) - 0.5) < 1e-9


def test_the_head_of_the_page_in_strips_is_the_whole_image(page):
    """Also beyond the size of a band, where all rows are positions in part of LR."""
    import_page = config("out", "my_head").model
    torch.manual_seed(0)
    model = gsr.GaussianSR(import_page).eval()
    lr = torch.rand(1, 3, 40, 13)
    with torch.no_grad():
        whole = model(lr, size=(97, 30))
        coord = torch.rand(1, 50, 2) * 2 - 1
        y, x = ((coord[0] + 1) / 2 * torch.tensor([97, 30])).long().unbind(-1)
        centre = torch.stack([(2 * y + 1) / 97 - 1, (2 * x + 1) / 30 - 1], dim=-1)[None]
        points = model(lr, size=(97, 30), coord=centre)
        assert torch.allclose(points[0], whole[0, :, y, x].T, atol=1e-5)
        work = StripRenderer(model, lambda a, b: lr[..., a:b, :], lr.shape, (97, 30), None, "fp32")
        work.band, work.strip = 5, 7
        strips = torch.cat([strip for *_, strip in work.strips()], dim=2)
    assert torch.allclose(strips, whole, atol=1e-5)
    assert torch.allclose(run(model, lr, (97, 30)), whole, atol=1e-5)


def test_a_saved_model_loads_where_its_module_is_imported(page, capsys):
    train.train(config("out", "my_head", "train.steps=1"), progress=False)
    folder = page / "out" / "smoke" / "model"
    del sys.modules["my_head"]
    with pytest.raises(InputError) as caught:
        gsr.load(folder)
    assert "made with my_head.Bilinear" in str(caught.value) and "\n" not in str(caught.value)
    assert "--import my_head" in str(caught.value) and "my_head" not in sys.modules
    importlib.import_module("my_head")
    assert type(gsr.load(folder).head).__name__ == "Bilinear"
    del sys.modules["my_head"]
    photo, out = PHOTOS / "canyon-wren.jpg", page / "out.png"
    argv = ["upscale", photo, "-o", out, "--scale", "1.2", "--model", folder, "-q"]
    from gsr.cli import dispatch

    with pytest.raises(InputError, match="import my_head before"):
        dispatch([*map(str, argv)])
    dispatch(["--import", "my_head", *map(str, argv)])
    assert out.exists()
    with pytest.raises(InputError, match="--import: my_haed cannot be imported"):
        dispatch(["--import", "my_haed", *map(str, argv)])
    del sys.modules["my_head"]
    import evaluate

    argv = ["--checkpoint", folder, "--data", PHOTOS, "--limit", "1", "--scale", "4"]
    argv = [*map(str, argv), "--output", "r.json"]
    with pytest.raises(InputError, match="import my_head before"):
        evaluate.main(argv)
    evaluate.main([*argv, "--import", "my_head"])
    assert json.loads((page / "r.json").read_text())["models"]


def test_two_processes_train_with_parts_of_ones_own(page, monkeypatch):
    """With the head and the dense loss of the page, as one process does."""
    own = [*lines("my_head"), *lines("my_loss"), *TINY, "train.steps=3", "train.warmup=0"]
    train.train(load_config(ROOT / "configs" / "smoke.yaml", [*own, "output=one"]), progress=False)
    monkeypatch.chdir(ROOT)  # where the processes are forked from
    before = f"import os; os.chdir({str(page)!r})"
    children, outputs = start_ranks(
        page / "ranks", 2, *own, f"output={page / 'two'}", before=[(0, before), (1, before)]
    )
    assert finish(*children) == [0, 0], outputs[0].read_text() + outputs[1].read_text()
    one, two = weights(page / "one"), weights(page / "two")
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_the_adversarial_example_trains_and_resumes_exactly(page):
    sys.path.insert(0, str(page))
    adversarial = importlib.import_module("adversarial")
    argv = [str(ROOT / "configs" / "smoke.yaml"), *TINY, "train.schedule=step"]
    adversarial.main([*argv, "output=whole", "train.steps=4"])
    adversarial.main([*argv, "output=parts", "train.steps=2"])
    adversarial.main([*argv, "output=parts", "train.steps=4", "--resume"])
    one, two = weights(page / "whole"), weights(page / "parts")
    assert all(torch.equal(one[key], two[key]) for key in one)
    state = torch.load(page / "whole" / "smoke" / "state.pt", weights_only=True)
    assert {"critic", "critic_optimizer"} <= state.keys()
