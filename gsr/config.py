"""The configuration of a model and of a training: what may stand in a YAML file of configs/.

A section of the file is a class here and a key is a field: its type, limits, default and meaning
stand together. `from_dict` and `load_config` raise one InputError for all mistakes in a file.
Sections made in Python are as free as dataclasses until `check` validates them.

A `Part` names code: a built-in one, or `module.Name` of a module of one's own (docs/extend.md).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WrapValidator, model_validator

from gsr.errors import InputError
from gsr.io.paths import check_path
from gsr.io.yaml import parse_yaml
from gsr.schema import Part, Section, build, is_import_path, key, must, one_of, override
from gsr.schema import check as check
from gsr.schema import from_dict as from_dict
from gsr.schema import to_dict as to_dict

DEVICES = r"auto|cpu|cuda(:[0-9]+)?|mps|xpu"
MAX_THREADS = 1024
BYTES = r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B"  # an amount of memory


# Upper limits are far above any use: they keep a damaged file from building modules without end,
# and a typing error from ending in an overflow.
Width = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PathName = Annotated[str, must("a path", lambda s, _: s.strip())]  # "" would be the current folder


def _folders(value: Any, inner: Callable[[Any], Any]) -> Any:
    """One folder stays text; several are a section."""
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, dict):
        raise ValueError("a path, or a section of paths with their shares", "", value)
    return inner(value)


Shares = Annotated[dict[PathName, Positive], Field(min_length=1), WrapValidator(_folders)]


def between(low: float, high: float) -> AfterValidator:
    """A pair [least, most] within limits."""
    text = f"two numbers [least, most] from {low} to {high}"
    return must(text, lambda pair, _: len(pair) == 2 and low <= pair[0] <= pair[1] <= high)


class EncoderConfig(Section):
    """Feature extractor at LR: [B, 3, h, w] in [0, 1] to [B, n_feats, h, w].

    Where `name` is an import path, the section is a `CustomEncoder`.
    """

    name: Annotated[str, one_of("edsr", "span", "rdn", "swinir")] = key("edsr", "architecture")
    n_feats: Width = key(64, "channels; EDSR-baseline, RDN, SwinIR 64; EDSR 256; SPAN 48")
    n_blocks: Annotated[
        int, must("at least 2 in span", lambda n, c: c["name"] != "span" or n > 1)
    ] = key(16, "edsr, span, rdn: blocks; EDSR 32, SPAN 6, others 16", ge=1, le=1024)
    res_scale: Positive = key(1.0, "edsr: factor on each residual branch; EDSR 0.1")
    layers: int = key(8, "rdn: convolutions of a block, each reads all before it", ge=1, le=32)
    growth: Width = key(64, "rdn: channels that each of these convolutions adds")
    dim: Width = key(180, "swinir: channels inside")
    depths: Annotated[
        list[Annotated[int, Field(ge=1, le=32)]], Field(min_length=1, max_length=32)
    ] = key([6] * 6, "swinir: blocks of each group")
    heads: Annotated[
        int, must("a divisor of dim, such as 1", lambda n, c: n > 0 and c["dim"] % n == 0)
    ] = key(6, "swinir: attention heads; a divisor of dim")
    window: int = key(8, "swinir: side of a window, LR pixels", ge=2, le=64, multiple_of=2)

    @model_validator(mode="wrap")
    @classmethod
    def _custom(cls, value: Any, inner: Callable[[Any], Any]) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        custom = isinstance(value, dict) and is_import_path(str(value.get("name")))
        return CustomEncoder.model_validate(value) if custom else inner(value)


class CustomEncoder(Part):
    """An encoder from outside gsr, called with n_feats and its own keys."""

    n_feats: Width = key(64, "channels of its features")


class DirectConfig(Section):
    """Head of `direct`: every LR pixel emits coloured Gaussians."""

    gaussians: int = key(4, "K, Gaussians per LR pixel", ge=1, le=256)
    radius: int = key(1, "r: an HR pixel sums over the (2r + 1)^2 nearest LR pixels", ge=1, le=16)
    reach: Annotated[float, must("at most radius", lambda x, c: x <= c["radius"])] = key(
        0.5, "farthest offset from the LR pixel, LR pixels; the rest is left to sigma", ge=0.5
    )
    normalize: bool = key(True, "divide by the total weight")
    width: Width = key(64, "hidden channels of the head")
    # Under relu all of them can die, and the residual with them.
    activation: Literal["leaky_relu", "relu"] = key("leaky_relu", "of the hidden channels")


class BankConfig(Section):
    """Gaussian bank and selective assignment of `official` and `field`."""

    points: Annotated[
        int, must("a square number, such as 100", lambda n, _: math.isqrt(n) ** 2 == n)
    ] = key(100, "N, Gaussians in the bank", ge=1, le=10_000)
    channels: Width = key(8, "feature channels that are splatted; the rest is resized bicubically")
    window: Annotated[int, must("odd and from 3 to 99", lambda n, _: n in range(3, 100, 2))] = key(
        7, "side in LR pixels (official: disjoint windows; field: nearest pixels)"
    )
    kernel_size: int = key(5, "official: taps a side", ge=2, le=99)
    assignment: Literal["argmax", "softmax", "gumbel"] = key("argmax", "in evaluation")
    train_assignment: Literal["gumbel", "softmax"] = key("gumbel", "in training")


class DecoderConfig(Section):
    """Fourier decoder at HR of `official`, `field` and `bicubic`."""

    hidden_dim: Width = key(256, "channels of coef and freq", multiple_of=2)
    hidden_list: Widths = key([256] * 4, "MLP widths")
    skip: bool = key(False, "decode the residual of bicubic upsampling; never in official")


class LIIFConfig(Section):
    """Head of `liif`."""

    hidden_list: Widths = key([256] * 4, "MLP widths")
    skip: bool = key(False, "decode the residual of bilinear upsampling, as lte; not as published")


class LTEConfig(Section):
    """Head of `lte`."""

    hidden_dim: Width = key(256, "channels of coef and freq", multiple_of=2)
    hidden_list: Widths = key([256] * 3, "MLP widths")
    scale_max: Positive = key(4.0, "largest scale of the training; above, the phase is that of it")


class ModelConfig(Section):
    """The encoder, and the head that `mode` names."""

    mode: Annotated[str, one_of("direct", "field", "official", "bicubic", "liif", "lte")] = key(
        "direct", "head; its keys are in the section of its name"
    )
    encoder: EncoderConfig = EncoderConfig()
    direct: DirectConfig = DirectConfig()
    bank: Annotated[
        BankConfig,
        must(
            "below encoder.n_feats",
            lambda bank, c: (
                c["mode"] not in ("field", "official") or bank.channels < c["encoder"].n_feats
            ),
            blame="bank.channels",
        ),
    ] = BankConfig()
    decoder: Annotated[
        DecoderConfig,
        must(
            "false in mode official, which is as published",
            lambda decoder, c: c["mode"] != "official" or not decoder.skip,
            blame="decoder.skip",
        ),
    ] = DecoderConfig()
    liif: LIIFConfig = LIIFConfig()
    lte: LTEConfig = LTEConfig()
    head: Annotated[
        dict[str, Any],
        must("empty in a built-in mode", lambda keys, c: not keys or is_import_path(c["mode"])),
    ] = key({}, "keys of a head from outside gsr, whose import path is the mode")


class BlurConfig(Section):
    """Gaussian blur of an LR image."""

    share: Share = key(0.3, "of the degraded patches")
    sigma: Annotated[list[float], between(0, 100)] = key([0.2, 0.8], "[least, most], LR pixels")


class NoiseConfig(Section):
    """Gaussian and Poisson (shot) noise on an LR image: standard deviations in levels of 255."""

    share: Share = key(0.3, "of the degraded patches")
    sigma: Annotated[list[float], between(0, 255)] = key([0.0, 6.0], "[least, most] of Gaussian")
    shot: Annotated[list[float], between(0, 255)] = key(
        [0.0, 6.0], "[least, most] of Poisson, where the image is white"
    )
    grey: Share = key(0.3, "share with the same noise in all channels")


class JpegConfig(Section):
    """An LR image saved as JPEG."""

    share: Share = key(0.85, "of the degraded patches")
    quality: Annotated[list[int], between(1, 100)] = key([25, 95], "[least, most]")
    chroma_420: Share = key(0.8, "share at 4:2:0; the rest is at 4:4:4")
    twice: Share = key(0.1, "share that is saved a second time, on a shifted grid of blocks")


STAGES = ("blur", "noise", "jpeg")


class StageConfig(Part):
    """A step of the degradation."""

    name: Annotated[str, one_of(*STAGES)] = key("", "built-in, or module.name")
    share: Share = key(1.0, "of the degraded patches")

    @model_validator(mode="after")
    def _no_keys(self) -> StageConfig:
        if not is_import_path(self.name) and (self.share != 1 or self.keys):
            said = f"a name alone: the keys of {self.name} are in its own section"
            raise ValueError(said, "", to_dict(self))
        return self


class DegradeConfig(Section):
    """Mixture of degradations that LR patches are made with, see `gsr.data.degradations`."""

    clean: Share = key(0.2, "share of patches that are plain bicubic")
    kernels: list[Literal["bicubic", "bilinear", "lanczos", "area"]] = key(
        ["bicubic", "bilinear", "lanczos", "area"],
        "resampling of the other patches, each drawn equally often",
        min_length=1,
    )
    blur: BlurConfig = BlurConfig()
    noise: NoiseConfig = NoiseConfig()
    jpeg: JpegConfig = JpegConfig()
    stages: list[StageConfig] = key(
        [StageConfig(name) for name in STAGES], "what is done to LR, in order"
    )


class DatasetConfig(Part):
    """A dataset of HR images, or of pairs (LR, HR)."""

    name: Annotated[str, one_of()] = key("", "module.Name")


class DataConfig(Section):
    """Training and validation images, and the patches that are cut out of them."""

    train: Shares = key(
        "data/train", "folder of HR images, searched recursively; or several with their shares"
    )
    dataset: DatasetConfig | None = key(None, "takes the place of `train`; null: none does")
    val: PathName | None = key(None, "folder of HR images; null: val_count of train, set aside")
    val_count: Count = key(10, "images used for validation")
    patch: int = key(48, "LR patch side, pixels", ge=8, le=4096)
    scale_min: float = key(1.0, "smallest scale; a batch has one scale, uniform", ge=1, le=1000)
    scale_max: Annotated[float, must("at least scale_min", lambda x, c: x >= c["scale_min"])] = key(
        4.0, "largest scale", ge=1, le=1000
    )
    queries: Annotated[
        int,
        must(
            "at most round(patch * scale_min)^2, the HR pixels of the smallest patch",
            lambda n, c: n <= round(c["patch"] * c["scale_min"]) ** 2,
        ),
    ] = key(2304, "HR pixels sampled per patch, without replacement", ge=1)
    batch: Count = key(16, "patches of an optimiser step, over all processes and micro-batches")
    repeat: int = key(20, "times each image is visited per epoch, on average", ge=1, le=10_000)
    degrade: DegradeConfig | None = key(None, "how LR is made of HR; null: Pillow's bicubic")
    workers: int = key(2, "loader processes of a training process; 0: itself", ge=0, le=1024)
    # With memory, each training process keeps its own images, up to the whole budget.
    cache: Literal["memory", "mmap", "none"] = key("memory", "where decoded images are kept")
    cache_budget: (
        Annotated[
            str,
            must("an amount such as 500MB, 4GB or 2GiB", lambda s, _: re.fullmatch(BYTES, s)),
        ]
        | None
    ) = key(None, "such as 4GB; what is beyond is decoded every time")
    cache_dir: PathName | None = key(None, "of mmap; null: .gsr-cache in the folder of train")


class LossConfig(Part):
    """A loss, or a term of a sum of losses."""

    name: Annotated[str, one_of("l1", "mse", "charbonnier", "fft")] = key("", "built-in, or a path")
    weight: Positive = key(1.0, "factor on it")
    dense: bool | None = key(None, "whole HR patches, not sampled queries; null: as the loss says")


class OptimizerConfig(Part):
    """The optimiser; train.lr is its learning rate."""

    name: Annotated[str, one_of("adam", "adamw")] = key("adam", "built-in, or a path")


class ScheduleConfig(Part):
    """How the learning rate falls."""

    name: Annotated[str, one_of("step", "cosine")] = key("step", "built-in, or a path")


class TrainConfig(Section):
    """Optimisation, and what a run writes."""

    loss: Annotated[
        list[LossConfig],
        Field(min_length=1),
        BeforeValidator(lambda terms: terms if isinstance(terms, list) else [terms]),
    ] = key([LossConfig("l1")], "one, or a list whose weighted sum it is")
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: Steps | None = key(None, "optimiser steps in total; null: epochs * steps per epoch")
    epochs: Steps = key(2000, "used where steps is null")
    lr: Positive = key(1e-4, "learning rate")
    muon_lr: Annotated[
        Positive | None,
        must(
            "null with another optimizer than adam",
            lambda lr, c: lr is None or c["optimizer"].name == "adam",
        ),
    ] = key(None, "of Muon for the encoder, like 0.01; null: one optimiser for all")
    schedule: ScheduleConfig = ScheduleConfig()
    step_epochs: Steps = key(200, "step: multiply lr by gamma every so many epochs")
    gamma: Positive = key(0.5, "step: factor on lr", le=1)
    warmup: int = key(100, "steps of linear warm-up", ge=0, le=1_000_000_000)
    clip: Positive | None = key(0.5, "largest gradient norm; null: any")
    accumulate: Count = key(1, "micro-batches of a step, in turn: less memory, same result")
    ema: float | None = key(None, "decay of the mean weights, like 0.999; null: off", gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = key("fp32", "of the encoder; the splat is always fp32")
    seed: int = key(0, "of weights and patches", ge=0, lt=2**32)
    device: Annotated[
        str,
        must(
            "auto, cpu, cuda, cuda:1 or the like, mps or xpu", lambda s, _: re.fullmatch(DEVICES, s)
        ),
    ] = key("auto", "auto: CUDA where there is one, else cpu")
    cuda_graph: bool = key(False, "a step's gradients as one CUDA graph: a GPU, mode direct")
    threads: int | None = key(None, "CPU threads; null: PyTorch's choice", ge=1, le=MAX_THREADS)
    log_every: Steps = key(50, "steps")
    val_every: Steps = key(1000, "steps")
    save_every: Steps = key(1000, "steps")
    keep: int = key(0, "older states that stay, as state-STEP.pt", ge=0, le=1_000_000_000)


class Config(Section):
    """One experiment."""

    name: Annotated[
        str,
        must(
            "a folder name without slashes",
            lambda name, _: name.strip(". ") and not set(name) & set("/\\"),
        ),
    ] = key("unnamed", "of the run")
    output: PathName = key("runs", "the run lives in output/name")
    init: PathName | None = key(None, "model folder or published .pth whose weights to start from")
    model: ModelConfig = ModelConfig()
    data: Annotated[
        DataConfig,
        must(
            "at least data.scale_max in mode lte",
            lambda data, c: c["model"].mode != "lte" or c["model"].lte.scale_max >= data.scale_max,
            blame="model.lte.scale_max",
        ),
    ] = DataConfig()
    train: TrainConfig = TrainConfig()


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into a Config, with overrides such as "train.lr=2e-4" on top.

    The right-hand side of an override is YAML too ("null", "[64, 64]"). Raises one InputError
    that lists every mistake in file and overrides, each with its full key.
    """
    path = check_path(path)
    try:
        mapping = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8; name a YAML file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a YAML file") from None
    mapping = {} if mapping is None else mapping  # an empty file
    mistakes = [found for text in overrides if (found := override(Config, mapping, text))]
    return build(Config, mapping, "", mistakes, f"{path}: ")
