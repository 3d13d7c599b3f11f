"""Published checkpoints: what is read, and the one sentence for each thing that is not."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from gsr.errors import InputError
from gsr.models.published import load_published

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "official.pth"


@pytest.fixture
def content():
    return torch.load(GOLDEN, weights_only=True)


def refused(path, pattern):
    with pytest.raises(InputError, match=pattern) as error:
        load_published(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 500
    return message


def saved(content, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    return path


def fabricated(blocks, feats, hidden, widths, points, **args):
    """A checkpoint of another size in the published format."""
    sd = OrderedDict(
        sigma_x=torch.rand(points) + 1,
        sigma_y=torch.rand(points) + 1,
        opacity=torch.rand(points, 1),
        rho=torch.zeros(points, 1),
    )

    def layer(name, *shape):
        sd[f"{name}.weight"], sd[f"{name}.bias"] = torch.randn(*shape) * 0.1, torch.zeros(shape[0])

    layer("encoder.edsr.head.0", feats, 3, 3, 3)
    for i in range(blocks):
        layer(f"encoder.edsr.body.{i}.body.0", feats, feats, 3, 3)
        layer(f"encoder.edsr.body.{i}.body.2", feats, feats, 3, 3)
    layer(f"encoder.edsr.body.{blocks}", feats, feats, 3, 3)
    layer("encoder.segmentation_head.0", points, feats, 3, 3)
    layer("coef", hidden, feats, 3, 3)
    layer("freq", hidden, feats, 3, 3)
    sd["phase.weight"] = torch.rand(hidden // 2, 2)
    sizes = [hidden, *widths, 3]
    for i in range(len(widths) + 1):
        layer(f"dec.layers.{2 * i}", sizes[i + 1], sizes[i])
    return {"model": {"name": "gaussian-splatter", "args": args, "sd": sd}}


def spec(name="edsr-baseline", widths=(12, 10, 14), **args):
    return {
        "kernel_size": 5,
        "encoder_spec": {"name": name, "args": {"no_upsampling": True, **args}},
        "dec_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": list(widths)}},
    }


def test_the_golden_checkpoint(content):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = load_published(str(GOLDEN))
    assert torch.equal(torch.get_rng_state(), before)
    config = model.config
    assert (config.mode, config.encoder.n_blocks, config.encoder.n_feats) == ("official", 1, 64)
    assert (config.bank.points, config.bank.window, config.bank.kernel_size) == (100, 7, 5)
    assert config.decoder.hidden_list == [256] * 4 and config.encoder.res_scale == 1.0
    assert not model.training
    state, sd = model.state_dict(), content["model"]["sd"]
    assert len(state) == len(sd) - 4
    assert sum(v.numel() for v in state.values()) == sum(
        v.numel() for k, v in sd.items() if "_mean" not in k
    )
    assert torch.equal(
        state["encoder.body.0.body.2.weight"], sd["encoder.edsr.body.0.body.2.weight"]
    )
    assert torch.equal(state["head.bank.sigma_y"], sd["sigma_y"])
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_the_published_size_has_the_published_number_of_parameters(tmp_path):
    checkpoint = fabricated(16, 64, 256, [256] * 4, 100, **spec(widths=[256] * 4))
    model = load_published(saved(checkpoint, tmp_path))
    # The published 1,838,159 less what its forward pass never uses: two mean shifts of 3 x 3 + 3.
    assert sum(p.numel() for p in model.parameters()) == 1_838_159 - 2 * 12


def test_other_sizes(tmp_path):
    args = spec("edsr", n_resblocks=2, n_feats=16)
    checkpoint = fabricated(2, 16, 24, [12, 10, 14], 9, **args | {"kernel_size": 3})
    model = load_published(saved(checkpoint, tmp_path))
    config = model.config
    assert (config.encoder.n_blocks, config.encoder.n_feats, config.encoder.res_scale) == (
        2,
        16,
        0.1,
    )
    assert (config.decoder.hidden_dim, config.decoder.hidden_list) == (24, [12, 10, 14])
    assert (config.bank.points, config.bank.kernel_size, config.bank.window) == (9, 3, 7)
    assert model(torch.rand(1, 3, 8, 9), scale=2).shape == (1, 3, 16, 18)


def test_named_arguments_are_followed(tmp_path):
    args = spec(n_resblocks=1, n_feats=12, res_scale=0.5)
    args |= {"unfold_row": 5, "unfold_column": 5, "hidden_dim": 8, "num_points": 4}
    model = load_published(saved(fabricated(1, 12, 8, [12, 10, 14], 4, **args), tmp_path))
    assert model.config.bank.window == 5 and model.config.encoder.res_scale == 0.5


def test_half_precision_and_the_old_file_format(content, tmp_path):
    content["model"]["sd"] = {k: v.half() for k, v in content["model"]["sd"].items()}
    path = tmp_path / "old.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert all(p.dtype == torch.float32 for p in load_published(path).parameters())


class _Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_not_run(content, tmp_path, new_format):
    content["optimizer"] = _Code(tmp_path / "ran")
    path = tmp_path / "code.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    refused(path, "holds Python code or objects")
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_with_code_is_not_run(tmp_path):
    path = tmp_path / "code.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(_Code(tmp_path / "ran"), protocol)
        path.write_bytes(data)
        refused(path, "holds Python code or objects")
        assert not (tmp_path / "ran").exists()
    path.write_bytes(data[:-1])
    refused(path, "truncated, damaged or not a PyTorch file")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_modules_and_torchscript_are_refused(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, "holds Python code or objects")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    refused(path, "holds Python code or objects")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0, 1e-6, 1e-4, 0.002, 0.5, 0.99999])
def test_truncated_files(content, tmp_path, new_format, share):
    path = tmp_path / "whole.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "truncated, damaged or not a PyTorch file")


def test_damage_in_the_middle(tmp_path):
    data = bytearray(GOLDEN.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "damaged.pth"
    path.write_bytes(data)
    refused(path, "truncated, damaged or not a PyTorch file")


def test_a_file_that_unpacks_to_many_times_its_size(content, tmp_path, monkeypatch):
    whole, small = saved(content, tmp_path), tmp_path / "small.pth"
    with zipfile.ZipFile(whole) as read, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as write:
        for name in read.namelist():
            write.writestr(name, read.read(name))
        write.writestr(f"{name.split('/')[0]}/data/9999", bytes(2**25))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    refused(small, "truncated, damaged or not a PyTorch file")


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" + bytes(range(256)), b"hello, world\n"])
def test_other_files(tmp_path, data):
    path = tmp_path / "other.pth"
    path.write_bytes(data)
    refused(path, "truncated, damaged or not a PyTorch file")


def test_unreadable_files(tmp_path):
    refused(tmp_path / "absent.pth", "No such file")
    refused(tmp_path, "Is a directory")


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3),
        [1, 2],
        None,
        {},
        {"model": [1, 2]},
        {"model": {"name": "gaussian-splatter"}},
        {"state_dict": {"a": torch.zeros(1)}},
    ],
    ids=str,
)
def test_other_contents(tmp_path, other):
    refused(saved(other, tmp_path), "not a published GaussianSR checkpoint")


@pytest.mark.parametrize(
    "key, value, pattern",
    [
        ("name", "liif", "holds the model 'liif'"),
        ("name", torch.zeros(2), "hold more than text"),
        ("args", {"kernel_size": torch.zeros(2)}, "hold more than text"),
        ("args", {1: 2}, "hold more than text"),
        ("args", [5], r"args = \[5\]"),
        ("args", {}, "kernel_size = None"),
        ("args", {"kernel_size": 5}, "encoder_spec = None"),
        ("sd", [torch.zeros(1)], "not a dictionary of tensors"),
        ("sd", {"coef.weight": 3}, "not a dictionary of tensors"),
        ("sd", {}, "encoder.edsr.head.0.weight is missing"),
    ],
)
def test_other_models(content, tmp_path, key, value, pattern):
    content["model"][key] = value
    refused(saved(content, tmp_path), pattern)


@pytest.mark.parametrize(
    "key, value",
    [
        ("kernel_size", None),
        ("kernel_size", "5"),
        ("kernel_size", True),
        ("unfold_row", 9),
        ("unfold_column", 8),
        ("hidden_dim", 128),
        ("num_points", 64),
        ("surprise", 1),
        ("encoder_spec", None),
        ("encoder_spec.name", "rdn"),
        ("encoder_spec.name", ["edsr"]),
        ("encoder_spec.surprise", 1),
        ("encoder_spec.args.n_resblocks", 2),
        ("encoder_spec.args.n_resblocks", True),
        ("encoder_spec.args.n_feats", 32),
        ("encoder_spec.args.res_scale", "one"),
        ("encoder_spec.args.no_upsampling", False),
        ("encoder_spec.args.surprise", 1),
        ("dec_spec.name", "kan"),
        ("dec_spec.args.out_dim", 1),
        ("dec_spec.args.in_dim", 5),
        ("dec_spec.args.hidden_list", [256, 256]),
        ("dec_spec.args.hidden_list", 256),
        ("dec_spec.args.act", "relu"),
    ],
)
def test_arguments_that_do_not_fit(content, tmp_path, key, value):
    *sections, last = key.split(".")
    args = content["model"]["args"]
    for section in sections:
        args = args[section]
    args[last] = value
    key = "unfold_column" if (key, value) == ("unfold_row", 9) else key
    message = refused(saved(content, tmp_path), re.escape(f"{key} = "))
    assert "only" in message


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"kernel_size": 1}, "bank.kernel_size must be at least 2, not 1"),
        ({"unfold_row": 8, "unfold_column": 8}, "bank.window must be odd and from 3 to 99, not 8"),
        ({"res_scale": 0}, "encoder.res_scale must be above 0, not 0"),
        ({"res_scale": -1.0}, "encoder.res_scale must be above 0, not -1.0"),
        ({"res_scale": float("nan")}, "encoder.res_scale must be a finite number, not nan"),
        ({"res_scale": 10**400}, "encoder.res_scale must be a finite number"),
    ],
    ids=str,
)
def test_limits_are_those_of_the_config(content, tmp_path, changes, sentence):
    args = content["model"]["args"]
    encoder = args["encoder_spec"]["args"]
    (encoder if "res_scale" in changes else args).update(changes)
    with pytest.raises(InputError) as error:
        load_published(saved(content, tmp_path))
    assert sentence in str(error.value) and "does not describe a valid model" in str(error.value)


def test_default_blocks_must_agree_with_the_tensors(content, tmp_path):
    del content["model"]["args"]["encoder_spec"]["args"]["n_resblocks"]
    refused(saved(content, tmp_path), "n_resblocks = 16, where only 1 can be loaded")


NAMES = [k for k in torch.load(GOLDEN, weights_only=True)["model"]["sd"] if "_mean" not in k]


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_misshaped_tensors(content, tmp_path, name):
    sd = content["model"]["sd"]
    tensor = sd.pop(name)
    # Without a block's first weight there is one block less, and args disagree.
    refused(saved(content, tmp_path), f"{re.escape(name)} is missing|n_resblocks|hidden_list")
    for other in (tensor[:-1], tensor[..., None], tensor[0]):
        sd[name] = other.clone()
        refused(saved(content, tmp_path), "misshaped| instead of |args say|square number")


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "encoder.edsr.tail.0.weight",
        "encoder.edsr.head.1.weight",
        "head.decoder.coef.extra",
        "head.bank.sigma_x",
        "sigma_x.extra",
        "dec.layers.1.bias",
    ],
)
def test_unknown_tensors(content, tmp_path, name):
    content["model"]["sd"][name] = torch.zeros(1)
    refused(saved(content, tmp_path), f"{re.escape(name)} is unknown")


def test_many_faults_are_counted(content, tmp_path):
    for i in range(10):
        content["model"]["sd"][f"extra.{i}"] = torch.zeros(1)
    refused(saved(content, tmp_path), "extra.2 is unknown, and 7 more such faults")


@pytest.mark.parametrize(
    "value, pattern",
    [
        (torch.full((100,), float("nan")), "infinite or undefined"),
        (torch.full((100,), float("inf")), "infinite or undefined"),
        (torch.ones(100, dtype=torch.long), "floating-point"),
        (torch.ones(100).to_sparse(), "dense"),
    ],
    ids=["nan", "inf", "int", "sparse"],
)
def test_values_that_cannot_be_weights(content, tmp_path, value, pattern):
    content["model"]["sd"]["sigma_x"] = value
    refused(saved(content, tmp_path), f"sigma_x .*{pattern}")


def test_weights_of_8_bits(content, tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        weights = {
            name: t.to(dtype) if t.is_floating_point() else t
            for name, t in content["model"]["sd"].items()
        }
        path = saved({"model": {**content["model"], "sd": weights}}, tmp_path)
        assert all(p.dtype == torch.float32 for p in load_published(path).parameters())


def test_points_that_are_no_grid(tmp_path):
    checkpoint = fabricated(1, 12, 8, [12, 10, 14], 5, **spec(n_resblocks=1, n_feats=12))
    refused(saved(checkpoint, tmp_path), "square number")
