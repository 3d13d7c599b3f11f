"""Code of one's own by import path: what is taken, what is refused, and that halos are true."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gsr
import train
from gsr.config import (
    BankConfig,
    Config,
    CustomEncoder,
    DataConfig,
    DatasetConfig,
    DecoderConfig,
    DegradeConfig,
    DirectConfig,
    EncoderConfig,
    LIIFConfig,
    LossConfig,
    LTEConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from gsr.data import degradations
from gsr.data.patches import Item, PatchDataset, make_loader, read_item, split_images
from gsr.errors import InputError
from gsr.inference.strips import StripRenderer, make_tiles
from gsr.losses import WeightedSum
from gsr.models import GaussianSR
from gsr.models import registry as registered
from gsr.models.checkpoint import save_model
from gsr.optim import make_optimizer, make_schedule
from gsr.runs import validation_pairs

OWN = "tests.own_parts"


def own(name, n_feats=6, **keys):
    return ModelConfig(encoder=CustomEncoder(f"{OWN}.{name}", n_feats, **keys))


# ---- configs ------------------------------------------------------------------------------------


def test_a_part_is_a_name_or_a_section_with_keys():
    mapping = {
        "model": {"encoder": f"{OWN}.Plain", "mode": "a.B", "head": {"width": 3}},
        "data": {
            "dataset": "a.b.C",
            "degrade": {"stages": ["jpeg", {"name": "a.b", "share": 0.5, "n": 1}]},
        },
        "train": {
            "loss": {"name": "charbonnier", "eps": 0.1},
            "optimizer": {"name": "a.B", "betas": [0.9, 0.99]},
            "schedule": "a.c",
        },
    }
    config = from_dict(Config, mapping)
    assert config.model.encoder == CustomEncoder(f"{OWN}.Plain", 64)
    assert config.train.loss == [LossConfig("charbonnier", eps=0.1)]
    assert config.train.optimizer.keys == {"betas": [0.9, 0.99]}
    assert config.data.dataset == DatasetConfig("a.b.C") and config.data.degrade.stages[1].keys == {
        "n": 1
    }
    assert from_dict(Config, to_dict(config)) == config
    both = from_dict(Config, {"train": {"loss": ["l1", {"name": "fft", "weight": 0.1}]}})
    assert [term.weight for term in both.train.loss] == [1.0, 0.1]


@pytest.mark.parametrize(
    "section, said",
    [
        ({"train": {"loss": "l2"}}, "train.loss[0].name must be one of l1, mse, charbonnier, fft"),
        ({"train": {"loss": []}}, "train.loss must be at least 1 long"),
        ({"train": {"loss": {"weight": 1}}}, "train.loss[0].name must be one of"),
        ({"train": {"optimizer": "adma"}}, "did you mean adam?"),
        ({"train": {"optimizer": 3}}, "train.optimizer must be a section of keys, not 3"),
        ({"train": {"schedule": "my module.Name"}}, "train.schedule.name must be one of step"),
        ({"train": {"optimizer": "adamw", "muon_lr": 0.1}}, "muon_lr must be null with another"),
        ({"model": {"encoder": {"name": "a.B", "n_feats": 0}}}, "n_feats must be at least 1"),
        ({"model": {"encoder": "edrs"}}, "model.encoder.name must be one of edsr"),
        ({"model": {"encoder": {"name": "edsr", "depth": 3}}}, "did you mean model.encoder.depths"),
        ({"data": {"degrade": {"stages": ["haze"]}}}, "stages[0].name must be one of blur"),
        (
            {"data": {"degrade": {"stages": [{"name": "blur", "share": 0.1}]}}},
            "data.degrade.stages[0] must be a name alone: the keys of blur are in its own section",
        ),
        ({"data": {"degrade": {"stages": [{"name": "jpeg", "quality": 3}]}}}, "a name alone"),
        ({"data": {"dataset": "images"}}, "data.dataset.name must be an import path such as"),
        ({"model": {"head": {"width": 3}}}, "model.head must be empty in a built-in mode"),
    ],
)
def test_names_and_keys_are_checked(section, said):
    with pytest.raises(InputError) as caught:
        from_dict(Config, section)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_of_a_part(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {optimizer: adamw}\n")
    load = gsr.config.load_config
    config = load(tmp_path / "a.yaml", ["train.optimizer.weight_decay=0.1", "train.loss=mse"])
    assert config.train.optimizer == OptimizerConfig("adamw", weight_decay=0.1)
    assert config.train.loss == [LossConfig("mse")]


def refused(make):
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: WeightedSum([LossConfig("no_such.Loss")]), "train.loss: no_such cannot be impor"),
        (lambda: WeightedSum([LossConfig(f"{OWN}.scale")]), "has no scale; did you mean scaled?"),
        (lambda: WeightedSum([LossConfig(f"{OWN}.scaled", bye=1)]), "'bye'"),
        (lambda: WeightedSum([LossConfig("torch.nn.HuberLoss", eps=1)]), "'eps'"),
        (
            lambda: WeightedSum([LossConfig("l1", eps=1)]),
            "train.loss: l1 cannot take its keys: got",
        ),
        (
            lambda: make_optimizer(
                torch.nn.Linear(1, 1), TrainConfig(optimizer=OptimizerConfig("adamw", deca=1))
            ),
            "train.optimizer: adamw",
        ),
        (
            lambda: make_optimizer(
                torch.nn.Linear(1, 1), TrainConfig(optimizer=OptimizerConfig("adam", lr=1))
            ),
            "train.optimizer.lr is not a key; set train.lr",
        ),
        (
            lambda: make_schedule(TrainConfig(schedule=ScheduleConfig("cosine", x=1)), 3, 1),
            "train.schedule: cosine",
        ),
        (
            lambda: make_optimizer(
                torch.nn.Linear(1, 1), TrainConfig(optimizer=OptimizerConfig(f"{OWN}.forgets"))
            ),
            f"{OWN}.forgets gives NoneType; it must return a torch.optim.Optimizer",
        ),
        (
            lambda: make_schedule(TrainConfig(schedule=ScheduleConfig("step", gamma=0.1)), 3, 1),
            "train.schedule: step cannot take its keys: gamma; set train.step_epochs and train.ga",
        ),
        (
            lambda: make_schedule(TrainConfig(schedule=ScheduleConfig(f"{OWN}.silent")), 3, 1),
            f"train.schedule: {OWN}.silent gives NoneType; it must give a number",
        ),
        (
            lambda: WeightedSum([LossConfig("torch.nn")]),
            "train.loss: torch.nn is module; it must be a class or a function",
        ),
        (
            lambda: WeightedSum([LossConfig(f"{OWN}.silent")])(torch.ones(1, 2, 3), None),
            f"train.loss: {OWN}.silent gives NoneType; it must give a tensor of one number",
        ),
        (
            lambda: WeightedSum([LossConfig("torch.nn.L1Loss", reduction="none")])(
                torch.ones(1, 2, 3), torch.ones(1, 2, 3)
            ),
            "torch.nn.L1Loss gives [1, 2, 3]; it must",
        ),
        (lambda: GaussianSR(own("Plain", dept=1)), "'dept'"),
        (lambda: GaussianSR(own("NoHalo")), f"{OWN}.NoHalo lacks halo"),
        (lambda: GaussianSR(own("function")), "is no class of torch.nn.Module"),
        (
            lambda: GaussianSR(ModelConfig(f"{OWN}.Plain", head={"depth": 1})),
            "lacks encode, render, query, rows_needed",
        ),
        (
            lambda: split_images(DataConfig(dataset=DatasetConfig(f"{OWN}.Images", sides=1))),
            "'sides'",
        ),
        (
            lambda: degradations.check_stages(DegradeConfig(stages=[StageConfig(f"{OWN}.no")])),
            "data.degrade.stages: tests.own_parts has no no",
        ),
        (
            lambda: degradations.check_stages(
                DegradeConfig(stages=[StageConfig(f"{OWN}.invert", level=1)])
            ),
            "'level'",
        ),
    ],
)
def test_what_is_not_there_or_takes_other_keys(make, said):
    assert said in refused(make)


# ---- losses, optimisers -------------------------------------------------------------------------


def test_losses():
    g = torch.Generator().manual_seed(0)
    out, target = (torch.rand(2, 3, 6, 8, generator=g) for _ in range(2))
    error = out - target
    queries = [x.flatten(2).mT for x in (out, target)]

    def loss(*terms, on=queries):
        return WeightedSum([LossConfig(**term) for term in terms])(*on)

    l1 = error.abs().mean()
    assert torch.equal(loss({"name": "l1"}), (queries[0] - queries[1]).abs().mean())
    assert torch.allclose(loss({"name": "mse"}), error.square().mean())
    smooth = (error.square() + 0.01).sqrt().mean()
    assert torch.allclose(loss({"name": "charbonnier", "eps": 0.1}), smooth)
    both = loss({"name": "l1", "weight": 2.0}, {"name": f"{OWN}.scaled", "by": 3, "weight": 0.5})
    assert torch.allclose(both, 3.5 * l1)
    # The transform is orthonormal: by Parseval, the mean square of all coefficients is the mse.
    full = torch.view_as_real(torch.fft.fft2(error, norm="ortho")).square().sum(-1).mean()
    assert torch.allclose(full, error.square().mean())
    spectrum = torch.view_as_real(torch.fft.rfft2(error, norm="ortho")).abs().mean()
    assert torch.allclose(loss({"name": "fft"}, on=(out, target)), spectrum)
    # In a sum with a dense one, the others get all pixels as queries.
    mixed = WeightedSum([LossConfig(f"{OWN}.colours"), LossConfig("fft", weight=0.5)])
    red = error[:, 0].abs().mean()
    assert mixed.dense and torch.allclose(mixed(out, target), red + 0.5 * spectrum)
    assert not WeightedSum([LossConfig("l1")]).dense
    assert WeightedSum([LossConfig("torch.nn.HuberLoss", dense=True)]).dense


def test_a_loss_has_no_part_in_the_training():
    measure = WeightedSum([LossConfig("torch.nn.Bilinear", in1_features=3, in2_features=3,
                                      out_features=1)])  # fmt: skip
    assert [p.requires_grad for p in measure.parameters()] == [False, False]


def test_optimisers_of_torch_take_parameters_and_keys():
    net = torch.nn.Linear(2, 2)
    c = TrainConfig(lr=1e-3, optimizer=OptimizerConfig("adamw", weight_decay=0.3))
    optimizer = make_optimizer(net, c)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.param_groups[0]["initial_lr"] == 1e-3
    c.optimizer = OptimizerConfig("torch.optim.SGD", momentum=0.5)
    assert type(make_optimizer(net, c)) is torch.optim.SGD


# ---- encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, halo", [(2, 1), (8, 7), (20, 19)])
def test_a_halo_that_is_too_small_is_refused(depth, halo):
    GaussianSR(own("Plain", depth=depth))
    said = refused(lambda: GaussianSR(own("Plain", depth=depth, halo=halo)))
    assert f"has halo {halo}, but its features depend on pixels {depth} rows away" in said


@pytest.mark.parametrize("halo", [1.5, "2", -1, True])
def test_a_halo_is_a_whole_number(halo):
    said = refused(lambda: GaussianSR(own("Plain", depth=1, halo=halo)))
    assert f"has halo {halo!r}, which must be a whole number from 0, or None" in said


def test_a_halo_holds_along_the_rows_too():
    GaussianSR(own("Wide"))
    said = refused(lambda: GaussianSR(own("Wide", halo=2)))
    assert "has halo 2, but its features depend on pixels 5 columns away" in said


def test_features_that_depend_on_their_place_are_refused():
    assert "None if they depend on the whole image, or on the place" in refused(
        lambda: GaussianSR(own("Pairs", depth=1, halo=2))
    )


def test_windows_are_counted_from_the_corner_in_tiles_too(monkeypatch):
    monkeypatch.setattr(gsr.inference.strips, "HALO_SHARE", 0.9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in ("Windowed", "Named"):
        model = GaussianSR(own(name)).eval()
        assert len(make_tiles(model, 203, 2)) == 2
        lr = torch.rand(1, 3, 17, 203, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert (strips(model, lr, (34, 406)) - model(lr, scale=2)).abs().max() < 1e-5
    assert "or on the place in it" in refused(lambda: GaussianSR(own("Windowed", alignment=1)))


def test_a_whole_image_is_looked_at_by_a_part_that_says_so():
    assert "or None if they depend on the whole image" in refused(
        lambda: GaussianSR(own("Attention"))
    )
    assert "must be [1, 6, 18, 16]" in refused(lambda: GaussianSR(own("Double")))
    assert GaussianSR(own("Single", halo=0)).encoder.halo == 0


def strips(model, lr, size):
    """The image in bands of 5 LR rows and strips of 7 HR rows."""
    work = StripRenderer(model, lambda a, b: lr[..., a:b, :], lr.shape, size, None, "fp32")
    work.band, work.strip = 5, 7
    with torch.no_grad():
        return torch.cat([strip for *_, strip in work.strips()], dim=2)


def test_an_encoder_with_global_operations_is_run_whole(monkeypatch):
    def distance(**keys):
        torch.manual_seed(0)
        model = GaussianSR(own("Attention", **keys)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)  # colours of about 1
        lr = torch.rand(1, 3, 40, 9, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return (strips(model, lr, (80, 18)) - model(lr, size=(80, 18))).abs().max()

    assert distance(whole=True) < 1e-5
    monkeypatch.setattr(registered, "check_halo", lambda *_: None)
    assert distance(halo=2) > 1e-4  # what is refused, and why


def test_an_encoder_is_tried_once_and_leaves_the_random_numbers_alone(monkeypatch):
    tried = []
    monkeypatch.setattr(registered, "_tried", set())
    real = registered.check_halo
    monkeypatch.setattr(registered, "check_halo", lambda *a: tried.append(a) or real(*a))
    GaussianSR(ModelConfig())
    assert not tried

    def weights():
        torch.manual_seed(0)
        return GaussianSR(own("Plain")).state_dict()

    first, second = weights(), weights()
    assert len(tried) == 1 and all(torch.equal(first[key], second[key]) for key in first)
    GaussianSR(own("Plain", depth=3))
    assert len(tried) == 2


# ---- model folders ------------------------------------------------------------------------------


def test_a_folder_never_imports_what_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    save_model(tmp_path / "model", GaussianSR(own("Plain")))
    model = gsr.load(tmp_path / "model")  # its module is imported
    assert type(model.encoder).__name__ == "Plain" and not model.training
    path = tmp_path / "model" / "config.json"
    whole = path.read_text()
    for change in (
        lambda m: m["encoder"].update(name="evil.Net"),
        lambda m: m.update(mode="evil.Head"),
    ):
        content = json.loads(whole)
        change(content["model"])
        path.write_text(json.dumps(content))
        said = refused(lambda: gsr.load(tmp_path / "model"))
        assert str(path) in said and "import evil before" in said and "evil" not in sys.modules
    for name in ("os.system", "subprocess.Popen", "builtins.exec"):
        content = json.loads(whole)
        content["model"]["encoder"] = {"name": name, "args": ["touch", "x"], "shell": True}
        path.write_text(json.dumps(content))
        assert "is no class of torch.nn.Module" in refused(lambda: gsr.load(tmp_path / "model"))


def test_folders_hold_whole_numbers_and_weights_of_two_names(tmp_path):
    model = GaussianSR(own("Counted"))
    model.encode(torch.rand(2, 3, 8, 8))  # BatchNorm counts it
    save_model(tmp_path, model)
    same = gsr.load(tmp_path)
    assert same.encoder.norm.num_batches_tracked == 1
    lr = torch.rand(1, 3, 8, 8)
    assert torch.equal(same(lr, scale=2), model.eval()(lr, scale=2))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.order"] = tensors["encoder.order"] / 2
    save_file(tensors, tmp_path / "model.safetensors")
    said = refused(lambda: gsr.load(tmp_path))
    assert "encoder.order is not a dense tensor of torch.int64" in said


def test_loading_draws_no_random_numbers(tmp_path):
    save_model(tmp_path, GaussianSR(own("Plain")))
    state = torch.get_rng_state()
    gsr.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# ---- data ---------------------------------------------------------------------------------------


def data(**keys):
    return DataConfig(
        **{"patch": 12, "queries": 64, "batch": 3, "repeat": 5, "workers": 0, "val_count": 1} | keys
    )


def batches(config, dense=False):
    return list(make_loader(PatchDataset(split_images(config)[0], config, dense), 1, 0, 4))


def test_a_dataset_gives_the_patches_of_its_files(tmp_path):
    from tests.own_parts import Images

    for i, image in enumerate(Images()[i] for i in range(4)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files, items = data(train=str(tmp_path)), data(dataset=DatasetConfig(f"{OWN}.Images"))
    degrade = DegradeConfig(clean=0.5)
    for extra in ({}, {"degrade": degrade}):
        pair = (batches(config.model_copy(update=extra)) for config in (files, items))
        for a, b in zip(*pair, strict=True):
            assert torch.equal(a.lr, b.lr) and torch.equal(a.target, b.target)
    val = [validation_pairs(split_images(config)[1]) for config in (files, items)]
    for (s, lr, hr), (t, lr2, hr2) in zip(*val, strict=True):
        assert s == t and torch.equal(lr, lr2) and torch.equal(hr, hr2)


def test_pairs_lie_over_each_other():
    config = data(
        dataset=DatasetConfig(f"{OWN}.Images", side=40, scale=2), scale_min=2.0, scale_max=2.0
    )
    for batch in batches(config, dense=True):
        hr = batch.target.mT.unflatten(2, batch.size)
        assert batch.size == (24, 24)
        assert torch.equal(hr[..., ::2, ::2], batch.lr) and torch.equal(
            hr[..., 1::2, 1::2], batch.lr
        )
    ((scale, lr, hr),) = validation_pairs(split_images(config)[1])
    assert scale == 2
    assert torch.equal(hr[..., ::2, ::2], lr) and torch.equal(hr[..., 1::2, 1::2], lr)
    config.scale_max = 3.0
    assert "is a pair of scale 2: set data.scale_min" in refused(lambda: batches(config))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"kind": "float32"}, "is float32 [70, 75, 3]; an image is uint8 [H, W, 3]"),
        ({"side": 20}, "is 25 x 20 pixels, smaller than the largest crop 48"),
        ({"count": 0}, "has no items: it must have __len__"),
    ],
)
def test_items_that_are_no_images(keys, said):
    assert said in refused(lambda: batches(data(dataset=DatasetConfig(f"{OWN}.Images", **keys))))


@pytest.mark.parametrize("count, kind", [(0, tuple), (1, list), (2, list), (3, tuple)])
def test_an_item_is_an_image_or_two(count, kind):
    images = kind(np.zeros((4, 4, 3), np.uint8) for _ in range(count))
    said = refused(lambda: read_item(Item([images], 0)))
    assert said == "data.dataset: item 0 is no image and no tuple of two, LR and HR"


def test_an_empty_pair_is_refused():
    empty = np.zeros((0, 4, 3), np.uint8)
    for pair in ((empty, empty), (empty, np.zeros((4, 4, 3), np.uint8))):
        assert "HR must be a whole number of times" in refused(
            lambda p=pair: read_item(Item([p], 0))
        )


def test_a_dense_batch_is_all_pixels_of_the_same_patches():
    config = data(dataset=DatasetConfig(f"{OWN}.Images"), scale_min=2.0)
    for whole, some in zip(batches(config, dense=True), batches(config), strict=True):
        assert torch.equal(whole.lr, some.lr)
        hr = whole.target.mT.unflatten(2, whole.size)
        pixel = ((some.coord + 1) / 2 * torch.tensor(whole.size)).long()
        for i in range(len(hr)):
            y, x = pixel[i].unbind(-1)
            assert torch.equal(hr[i, :, y, x].T, some.target[i])


@pytest.mark.parametrize("mode", ["direct", "field", "official", "bicubic", "liif", "lte"])
def test_whole_patches_have_the_gradients_of_all_their_pixels(mode):
    """In every mode a dense l1 is the sampled l1 of all pixels."""
    torch.manual_seed(0)
    model = GaussianSR(
        ModelConfig(
            mode, EncoderConfig(n_feats=12, n_blocks=1), DirectConfig(width=8),
            BankConfig(points=9, train_assignment="softmax"), DecoderConfig(16, [16]),
            LIIFConfig([16]), LTEConfig(16, [16]),
        )
    ).train()  # fmt: skip
    config = data(dataset=DatasetConfig(f"{OWN}.Images"), scale_min=2.0)
    batch = batches(config, dense=True)[0]

    def gradients(**keys):
        loss = train.Loss(model, "fp32", WeightedSum([LossConfig("l1", **keys)]))(batch)
        used = [p for p in model.parameters()]
        return loss, torch.autograd.grad(loss, used, allow_unused=True)

    (loss, dense), (same, sampled) = gradients(dense=True), gradients()
    assert torch.allclose(loss, same, atol=1e-6)
    for a, b in zip(dense, sampled, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_stages_in_their_order_and_by_their_shares():
    hr = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))

    def lr(*stages, seed=0):
        config = DegradeConfig(clean=0.0, kernels=["bicubic"], stages=[*stages])
        rng = np.random.default_rng(seed)
        return np.asarray(degradations.degrade(hr, 12, (24, 24, 48, 48), config, rng), int)

    plain = lr()
    assert np.array_equal(lr(StageConfig(f"{OWN}.invert")), 255 - plain)
    twice = lr(StageConfig(f"{OWN}.invert"), StageConfig(f"{OWN}.invert"))
    assert np.array_equal(twice, plain)
    seldom = [lr(StageConfig(f"{OWN}.invert", share=0.25), seed=n) for n in range(200)]
    assert 30 < sum(np.array_equal(x, 255 - plain) for x in seldom) < 70
    said = refused(lambda: lr(StageConfig(f"{OWN}.crop")))
    assert "crop makes an image of (5, 5) in RGB of one of" in said
    said = refused(lambda: lr(StageConfig(f"{OWN}.array")))
    assert "array returns ndarray; it must be a Pillow image" in said
