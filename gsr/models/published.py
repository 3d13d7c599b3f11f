"""Reads checkpoints of the published GaussianSR code into `official` models.

Such a file is a pickle of tensors, numbers and strings. It is read without running any code in it,
and taken only if it is exactly what is expected: a model that loads renders the published image.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from os import PathLike
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig, check
from gsr.errors import InputError
from gsr.models import GaussianSR
from gsr.models.checkpoint import assemble

# Published name, or start of it, to the name here.
NAMES = {
    "encoder.edsr.": "encoder.",
    "encoder.segmentation_head.0.": "head.classifier.",
    "dec.layers.": "head.decoder.layers.",
    "coef.": "head.decoder.coef.",
    "freq.": "head.decoder.freq.",
    "phase.": "head.decoder.phase.",
    "sigma_x": "head.bank.sigma_x",
    "sigma_y": "head.bank.sigma_y",
    "opacity": "head.bank.opacity",
    "rho": "head.bank.rho",
}
# In the file, but no part of what the published model computes.
UNUSED = {f"encoder.edsr.{n}_mean.{p}" for n in ("sub", "add") for p in ("weight", "bias")}
# Defaults of the published code: residual blocks, channels, residual scale.
ENCODERS = {"edsr-baseline": (16, 64, 1.0), "edsr": (32, 256, 0.1)}


def load_published(path: str | PathLike) -> GaussianSR:
    """The model in a published checkpoint such as `epoch-last.pth`, in evaluation mode.

    The architecture follows from the file: from its `args` and from the shapes of its tensors,
    which must agree.

    Args:
        path: a `.pth` file {"model": {"name", "args", "sd"}, ...} as the published training
            writes it; tensors of other precisions become float32.

    Raises:
        InputError: the file is missing, unreadable or damaged, holds anything beyond plain data,
            another model, or a state dict with missing, unknown or misshaped tensors.
    """
    path = Path(path)
    content = _read(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not {"name", "args", "sd"} <= model.keys():
        raise InputError(
            f"{path} is a PyTorch file but not a published GaussianSR checkpoint (it has no model "
            "with name, args and sd): give a file like the published epoch-last.pth"
        )
    name, args, state = model["name"], model["args"], model["sd"]
    if not _plain(name) or not _plain(args):
        raise InputError(
            f"{path}: model.name and model.args hold more than text, numbers, lists and "
            "dictionaries: give a checkpoint of an unchanged published model"
        )
    if name != "gaussian-splatter":
        raise InputError(
            f"{path} holds the model {name!r}, and only 'gaussian-splatter' can be loaded"
        )
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise InputError(f"{path}: model.sd is not a dictionary of tensors: download it again")
    state = {k: v for k, v in state.items() if k not in UNUSED}
    config = _config(path, args, state)
    try:
        config = check(config)
    except InputError as error:
        raise InputError(
            f"{path} does not describe a valid model: {error}: give a checkpoint of an unchanged "
            "published model"
        ) from None
    tensors = {_rename(k): v for k, v in state.items()}
    refusal = f"{path} does not fit the published model"
    return assemble(config, tensors, refusal, named=_rename_back)


def _read(path: Path) -> object:
    """What the file holds, if that is plain data."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give a published .pth file"
        ) from None
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                # Weights hardly compress, and torch.save does not try: a small file would fill the
                # memory before anything in it could be looked at.
                if sum(m.file_size for m in archive.infolist()) > 4 * path.stat().st_size:
                    raise ValueError("it unpacks to many times its size")
                damaged = archive.testzip()  # torch.load does not compare the checksums
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        # A damaged file may look like a refused one, unless what is around it is known to be whole.
        whole = isinstance(error, pickle.UnpicklingError) and (is_zip or _is_pickle(path))
        if whole or "GLOBAL" in str(error) or "TorchScript" in str(error):
            raise InputError(
                f"{path} holds Python code or objects beyond plain data, which is never loaded: "
                "give a checkpoint that torch.load(..., weights_only=True) can read"
            ) from None
        raise InputError(
            f"{path} is truncated, damaged or not a PyTorch file: download or copy it again"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file is one pickle from beginning to end, whatever it holds; runs none of it."""
    with open(path, "rb") as file:
        try:
            for _ in pickletools.genops(file):
                pass
        except Exception:  # where it is no pickle, anything
            return False
        return not file.read(1)


def _config(path: Path, args: object, state: dict[str, Tensor]) -> ModelConfig:
    """The architecture that `args` and the shapes of the tensors describe."""

    def refuse(key: str, value: object, want: object) -> NoReturn:
        raise InputError(
            f"{path}: the checkpoint's args say {key} = {value!r}, where only {want!r} can be "
            "loaded: give a checkpoint of an unchanged published model"
        )

    def section(values: object, key: str, known: dict) -> dict:
        """`values`, complete; in `known` a value is the default, and a type allows any of it."""
        if not isinstance(values, dict):
            refuse(key, values, {})
        for k, v in values.items():
            if k not in known:
                refuse(f"{key}.{k}".removeprefix("args."), v, sorted(known))
        return {**known, **values}

    def agree(key: str, value: object, want: object):
        if type(value) is not type(want) or value != want:
            refuse(key, value, want)

    def length(name: str, axis: int = 0) -> int:
        tensor = state.get(name)
        if tensor is None or tensor.dim() <= axis or tensor.shape[axis] < 1:
            raise InputError(
                f"{path} does not fit the published model: {name} is missing or misshaped: give a "
                "checkpoint of an unchanged published model"
            )
        return tensor.shape[axis]

    feats, points = length("encoder.edsr.head.0.weight"), length("sigma_x")
    hidden = length("coef.weight")
    blocks = sum(bool(re.fullmatch(r"encoder\.edsr\.body\.\d+\.body\.0\.weight", k)) for k in state)
    names = [k for k in state if re.fullmatch(r"dec\.layers\.\d+\.weight", k)]
    names = sorted(names, key=lambda k: int(k.split(".")[2]))
    widths = [length(k) for k in names[:-1]]

    args = section(
        args,
        "args",
        {
            "encoder_spec": None,
            "dec_spec": None,
            "kernel_size": None,
            "hidden_dim": hidden,
            "num_points": points,
            "unfold_row": 7,
            "unfold_column": 7,
        },
    )
    agree("hidden_dim", args["hidden_dim"], hidden)
    agree("num_points", args["num_points"], points)
    kernel, window = args["kernel_size"], args["unfold_row"]
    for key, value in (("kernel_size", kernel), ("unfold_row", window)):
        if type(value) is not int:
            refuse(key, value, "a whole number")
    agree("unfold_column", args["unfold_column"], window)

    spec = section(args["encoder_spec"], "encoder_spec", {"name": None, "args": {}})
    if not isinstance(spec["name"], str) or spec["name"] not in ENCODERS:
        refuse("encoder_spec.name", spec["name"], sorted(ENCODERS))
    default_blocks, default_feats, default_res_scale = ENCODERS[spec["name"]]
    encoder = section(
        spec["args"],
        "encoder_spec.args",
        {
            "n_resblocks": default_blocks,
            "n_feats": default_feats,
            "res_scale": default_res_scale,
            "no_upsampling": True,
            "scale": None,  # of the upsampler that is left out
            "rgb_range": None,  # of the mean shift that is left out
        },
    )
    agree("encoder_spec.args.n_resblocks", encoder["n_resblocks"], blocks)
    agree("encoder_spec.args.n_feats", encoder["n_feats"], feats)
    agree("encoder_spec.args.no_upsampling", encoder["no_upsampling"], True)
    res_scale = encoder["res_scale"]
    if type(res_scale) not in (int, float):
        refuse("encoder_spec.args.res_scale", res_scale, "a number")

    spec = section(args["dec_spec"], "dec_spec", {"name": None, "args": {}})
    agree("dec_spec.name", spec["name"], "mlp")
    dec = section(
        spec["args"], "dec_spec.args", {"in_dim": hidden, "out_dim": 3, "hidden_list": widths}
    )
    agree("dec_spec.args.in_dim", dec["in_dim"], hidden)
    agree("dec_spec.args.out_dim", dec["out_dim"], 3)
    agree("dec_spec.args.hidden_list", dec["hidden_list"], widths)

    return ModelConfig(
        mode="official",
        encoder=EncoderConfig(n_feats=feats, n_blocks=blocks, res_scale=res_scale),
        bank=BankConfig(points=points, window=window, kernel_size=kernel),
        decoder=DecoderConfig(hidden_dim=hidden, hidden_list=widths),
    )


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool)


def _rename(name: str) -> str:
    for old, new in NAMES.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    return f"? {name}"  # no name of a model's


def _rename_back(name: str) -> str:
    for old, new in NAMES.items():
        if name.startswith(new):
            return old + name[len(new) :]
    return name.removeprefix("? ")
