"""Encoders and heads by name.

An encoder is a module that turns LR [B, 3, h, w] in [0, 1] into features [B, n_feats, h, w]:

    class Plain(nn.Module):
        def __init__(self, config: EncoderConfig):
            super().__init__()
            self.body = nn.Conv2d(3, config.n_feats, 3, padding=1)
            self.halo = 1  # LR pixels around a pixel on which its features depend

        def forward(self, lr):
            return self.body(lr)

To add it, name it in `ENCODERS` and in `gsr.config.EncoderConfig`, which gets its keys too. Large
images are encoded by bands of rows with the halo around each; a deep encoder should have
`stream` (see `gsr.models.stream` and `gsr.models.encoders.rdn`), which computes no row twice, and
`floats`: how many numbers it holds for each pixel of a band and for each column of the image.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from gsr.config import EncoderConfig, ModelConfig

ENCODERS = {
    "edsr": "gsr.models.encoders.edsr:EDSR",
    "span": "gsr.models.encoders.span:SPAN",
    "rdn": "gsr.models.encoders.rdn:RDN",
    "swinir": "gsr.models.encoders.swinir:SwinIR",
}
HEADS = {
    "direct": "gsr.models.heads.direct:DirectHead",
    "field": "gsr.models.heads.field:FieldHead",
    "official": "gsr.models.heads.official:OfficialHead",
    "bicubic": "gsr.models.heads.bicubic:BicubicHead",
    "liif": "gsr.models.heads.liif:LIIFHead",
    "lte": "gsr.models.heads.lte:LTEHead",
}


def make_encoder(config: EncoderConfig) -> nn.Module:
    """The encoder that `config.name` names."""
    return _named(ENCODERS[config.name])(config)


def make_head(config: ModelConfig) -> nn.Module:
    """The head that `config.mode` names."""
    return _named(HEADS[config.mode])(config)


def _named(path: str) -> type[nn.Module]:
    """The class that "module:name" means; only what a model needs is ever imported."""
    module, name = path.split(":")
    return getattr(import_module(module), name)
