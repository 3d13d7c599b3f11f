"""The config loader: right files load exactly, and every mistake in a wrong one is named."""

import copy
import pickle
from pathlib import Path
from typing import Literal

import pytest

from gsr import config as gsr_config
from gsr.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Section,
    Shares,
    check,
    from_dict,
    key,
    load_config,
    to_dict,
)
from gsr.errors import InputError

ROOT = Path(__file__).parent.parent
SECTIONS = [c for c in vars(gsr_config).values() if isinstance(c, type(Section)) and c != Section]
HUGE = "1" + 400 * "0"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write


def mistakes(path, overrides=()):
    """The sentences of the InputError, without what names the file and counts them."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    first, *others = str(caught.value).removeprefix(f"{path}: ").split("\n  ")
    assert not others or first == f"{len(others)} mistakes"
    return others or [first]


# ---- right files --------------------------------------------------------------------------------


def test_empty_file_is_all_defaults(write):
    assert load_config(write("# nothing\n")) == Config()
    assert load_config(write("train:\nmodel:\n")) == Config() != Config(name="other")


def test_values_of_every_type(write):
    config = load_config(
        write(
            "name: x\nmodel:\n  mode: field\n  decoder: {hidden_list: [8, 9]}\n"
            "  encoder: {res_scale: 1}\ntrain: {lr: 1e-4, steps: 30, clip: null}\n"
            "data: {cache: none, val: folder}\n"
        )
    )
    assert config.name == "x" and config.model.mode == "field"
    assert config.model.decoder.hidden_list == [8, 9]
    assert config.train.lr == 1e-4 and config.train.steps == 30 and config.train.clip is None
    assert config.data.cache == "none" and config.data.val == "folder"
    # An integer where a number belongs becomes one, so that equal configs print alike.
    assert type(config.model.encoder.res_scale) is float


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "+1e-04", "0.0001"])
def test_floats_are_floats(write, text):
    assert load_config(write(f"train: {{lr: {text}}}")).train.lr == 1e-4


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu"])
def test_devices(write, device):
    assert load_config(write(f"train: {{device: {device}}}")).train.device == device


def test_words_that_yaml_1_1_would_change_stay_text(write):
    for name in ("no", "on", "2024-01-01", "1:30"):
        assert load_config(write(f"name: {name}\n")).name == name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_configs_of_the_repository_load(path):
    assert load_config(path).name == path.stem


def test_overrides(write):
    path = write("train: {lr: 1e-3}\ndata: {val: x}\n")
    config = load_config(
        path,
        ["train.lr=5e-4", "data.val=null", "model.decoder.hidden_list=[1, 2]", "name=a=b"],
    )
    assert config.train.lr == 5e-4 and config.data.val is None
    assert config.model.decoder.hidden_list == [1, 2] and config.name == "a=b"
    assert mistakes(path, ["trian.lr=1"]) == ["trian is not a key; did you mean train?"]
    assert "override 'train..lr=1' must read" in mistakes(path, ["train..lr=1"])[0]
    assert "'name=[' is not valid YAML" in mistakes(path, ["name=["])[0]
    said = ["train must be a section of keys, not 3"]
    assert mistakes(path, ["train=3", "train.lr=1"]) == said


def test_every_key_is_described():
    assert {Config, EncoderConfig} < set(SECTIONS)
    for cls in SECTIONS:
        assert cls.__doc__ != Section.__doc__
        for name, field in cls.model_fields.items():
            assert field.description or field.annotation in SECTIONS, f"{cls.__name__}.{name}"


# ---- configs made in Python ---------------------------------------------------------------------


def test_sections_are_made_as_dataclasses_are():
    config = ModelConfig("field", EncoderConfig(n_feats=12), decoder=DecoderConfig(16, [8]))
    assert (config.mode, config.encoder.n_feats, config.encoder.n_blocks) == ("field", 12, 16)
    assert config.decoder == DecoderConfig(hidden_dim=16, hidden_list=[8])
    with pytest.raises(TypeError, match="'n_feat'"):
        EncoderConfig(n_feat=3)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_check_is_for_configs_made_in_python():
    config = ModelConfig(mode="field")
    assert check(config) == config and check(config) is not config
    config.bank.window = 8
    with pytest.raises(InputError, match="^bank.window must be odd and from 3 to 99, not 8$"):
        check(config)
    with pytest.raises(InputError, match="^heads must be a divisor of dim, such as 1, not 6$"):
        check(EncoderConfig("swinir", dim=7))
    with pytest.raises(InputError, match="^2 mistakes\n  encoder must be a section.*\n  bank.poi"):
        check(ModelConfig(encoder=3, bank={"points": 10}))


def test_configs_share_nothing():
    for make in (Config, lambda: from_dict(Config, {}), lambda: check(Config())):
        config = make()
        config.model.encoder.depths.append(1)
        config.model.direct.radius = 2
        assert make() == Config() != config
    copied = check(config)
    copied.model.encoder.depths.append(2)
    assert copied.model.encoder.depths[:-1] == config.model.encoder.depths


def test_to_dict_and_back(write):
    config = load_config(write("train: {lr: 3e-5}\nmodel: {direct: {radius: 2}}"))
    assert from_dict(Config, to_dict(config)) == config
    assert to_dict(config)["model"]["direct"]["radius"] == 2


# ---- mistakes -----------------------------------------------------------------------------------


def test_every_mistake_is_named_at_once(write):
    said = mistakes(
        write(
            "model:\n  mod: direct\n  liif: {zzz: 1}\n"
            "  encoder: {n_feats: 3.0, n_blocks: true, dim: 7}\n"
            "lr: 1e-4\ntrain: {stps: 3, clip: .nan, device: 1}\n1: 2\n"
            "data: {cache: yes, batch: 0, val: 1, patch: x, queries: 9999, scale_min: 5}\n"
        ),
        ["model.mode=feild", "nonsense", "train.lr=fast"],
    )
    assert sorted(said) == sorted(
        [
            "override 'nonsense' must read section.key=value",
            "1 is not a key; the top level knows name, output, init, model, data, train",
            "lr is not a key; did you mean train.lr?",
            "model.mod is not a key; did you mean model.mode?",
            "model.mode must be one of direct, field, official, bicubic, liif, lte or an import "
            "path such as my_module.Name, not the text 'feild'; did you mean field?",
            "model.encoder.n_feats must be a whole number, not 3.0",
            "model.encoder.n_blocks must be a whole number, not true",
            "model.encoder.heads must be a divisor of dim, such as 1, not 6",
            "train.stps is not a key; did you mean train.steps?",
            "train.clip must be a finite number, not nan",
            "train.device must be text, not 1; put it in quotes",
            "train.lr must be a finite number, not the text 'fast'",
            "data.cache must be one of memory, mmap or none, not the text 'yes'",
            "data.batch must be at least 1, not 0",
            "data.val must be text, not 1; put it in quotes",
            "model.liif.zzz is not a key; model.liif knows hidden_list, skip",
            "data.patch must be a whole number, not the text 'x'",  # and none about queries
            "data.scale_max must be at least scale_min, not 4.0",
        ]
    )


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("model.encoder.n_blocks=0", "at least 1, not 0"),
        ("model.encoder.res_scale=0", "above 0"),
        ("model.encoder.n_feats=10000000", "at most 4096"),
        ("model.encoder.res_scale=" + HUGE, "finite"),
        ("model.encoder.depths=[6, 33]", "at most 32, not 33"),
        ("model.encoder.heads=7", "a divisor of dim"),
        ("model.encoder.window=7", "a multiple of 2"),
        ("model.direct.gaussians=257", "at most 256"),
        ("model.direct.radius=0", "at least 1"),
        ("model.direct.reach=0.4", "at least 0.5, not 0.4"),
        ("model.direct.reach=1.5", "at most radius, not 1.5"),
        ("model.bank.points=99", "a square number"),
        ("model.bank.points=1000000", "at most 10000"),
        ("model.bank.window=1", "odd and from 3"),
        ("model.bank.kernel_size=1", "at least 2"),
        ("model.decoder.hidden_dim=7", "a multiple of 2"),
        ("model.decoder.hidden_list=[]", "at least 1 long, not an empty list"),
        ("model.decoder.hidden_list=[4, 0]", "at least 1, not 0"),
        ("model.decoder.hidden_list=4", "a list, not 4"),
        ("data.patch=7", "at least 8"),
        ("data.patch=" + HUGE, "at most 4096"),
        ("data.scale_min=0.5", "at least 1, not 0.5"),
        ("data.scale_min=1e308", "at most 1000, not 1e+308"),
        ("data.queries=2305", "at most round"),
        ("data.batch=1000001", "at most 1000000, not 1000001"),
        ("data.workers=-1", "at least 0"),
        ("data.train=''", "a path"),
        ("init=''", "a path"),
        ("data.cache=1", "one of memory, mmap or none, not 1"),
        ("data.cache_budget=lots", "such as 500MB"),
        ("train.ema=1", "below 1"),
        ("train.lr=.inf", "finite"),
        ("train.lr=true", "a finite number, not true"),
        ("train.clip=0", "above 0"),
        ("train.steps=" + HUGE, "at most 1000000000"),
        ("train.gamma=1.5", "at most 1"),
        ("train.seed=-1", "at least 0"),
        ("train.seed=4294967296", "below 4294967296"),
        ("train.threads=1025", "at most 1024"),
        ("train.device=GPU 1", "cuda:1"),
        ("train.device=cpu:x", "cuda:1"),
        ("name=a/b", "without slashes"),
        ("name=..", "without slashes"),
        ("name=null", "text, not null"),
    ],
)
def test_limits(write, override, sentence):
    (said,) = mistakes(write(""), [override])
    name, _, text = override.partition("=")
    if text.startswith("[") and text != "[]":
        name += "[1]"
    assert said.startswith(f"{name} must be ") and sentence in said


def test_limits_across_sections(write):
    for mode in ("field", "official"):
        text = f"model: {{mode: {mode}, encoder: {{n_feats: 8}}}}"
        said = ["model.bank.channels must be below encoder.n_feats, not 8"]
        assert mistakes(write(text)) == said
    assert load_config(write("model: {encoder: {n_feats: 4}}")).model.encoder.n_feats == 4
    assert mistakes(write("model: {mode: official, decoder: {skip: true}}")) == [
        "model.decoder.skip must be false in mode official, which is as published, not true"
    ]
    lte = ["model.mode=lte", "model.lte.scale_max=3"]
    said = "model.lte.scale_max must be at least data.scale_max in mode lte, not 3.0"
    assert mistakes(write("train: {lr: 0}"), lte)[0] == said
    # Whatever else is wrong in the sections that a limit reads may have caused it.
    (said,) = mistakes(write("model: {mode: official, encoder: {n_feats: 8, n_blocks: 0}}"))
    assert "n_blocks" in said


def test_queries_limit_follows_the_scale(write):
    overrides = ["data.scale_min=1.5", "data.patch=9", "data.queries=196"]
    assert load_config(write(""), overrides).data.queries == round(13.5) ** 2
    assert "data.queries" in mistakes(write(""), [*overrides[:2], "data.queries=197"])[0]


@pytest.mark.parametrize("text", ["", "data: {train: x}\ntrain: {lr: 1e-3}\nmodel: {mode: field}"])
@pytest.mark.parametrize(
    "override, section",
    [
        ("train.lr.x=3", "train.lr"),
        ("model.mode.name=field", "model.mode"),
        ("data.train.path=/none", "data.train"),
        ("name.x.y=1", "name"),
        ("model.decoder.hidden_list.0=1", "model.decoder.hidden_list"),
    ],
)
def test_overrides_below_a_value(write, text, override, section):
    name = override.partition("=")[0]
    said = [f"{name} is not a key; {section} is a value, not a section"]
    assert mistakes(write(text), [override]) == said


def test_duplicate_keys_name_key_and_lines(write):
    (said,) = mistakes(write("name: x\ntrain:\n  lr: 1\n  steps: 2\n  lr: 3\n"))
    assert "line 5: the key lr is there already, in line 3" in said


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("- a\n- b\n", "the config must be a section of keys, not a list"),
        ("just words", "the config must be a section of keys, not the text 'just words'"),
        ("name: [1\nother: 2", "is not valid YAML: line 2"),
        ("? [1]\n: 2\n", "a key must be a plain word"),
        ("name: !!python/name:os.system x", "is not valid YAML"),
        ("name: !!int foo", "is not valid YAML"),
        ("name: \x00", "is not valid YAML"),
        ("train: [1]", "train must be a section of keys, not a list"),
    ],
)
def test_wrong_documents(write, text, sentence):
    (said,) = mistakes(write(text))
    assert sentence in said
    assert sentence in mistakes(write(text), ["train.steps=1"])[0]


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read (No such file" in mistakes(tmp_path / "none.yaml")[0]
    assert "cannot be read (Is a directory" in mistakes(tmp_path)[0]
    assert "cannot be used" in mistakes(tmp_path / ("x" * 300))[0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\xff")
    assert "is no text in UTF-8" in mistakes(tmp_path / "binary.yaml")[0]


def test_where_is_put_before_keys():
    wrong = {"encoder": {"n_feats": "8"}, "depth": 2}
    with pytest.raises(InputError) as caught:
        from_dict(ModelConfig, wrong, "model")
    assert str(caught.value).splitlines()[1:] == [
        "  model.encoder.n_feats must be a whole number, not the text '8'",
        "  model.depth is not a key; did you mean model.encoder.depths?",
    ]


class Mixed(Section):
    """Kinds of keys that a section may have besides those of Config."""

    folders: Shares = key("x", "one or several with shares")
    kinds: list[Literal["a", "b"]] = key(["a"], "some")
    section: EncoderConfig | None = key(None, "off or on")


@pytest.mark.parametrize(
    "mapping, said",
    [
        ({"folders": 3}, "folders must be a path, or a section of paths with their shares, not 3"),
        ({"folders": {"a.b/c": 0}}, "folders.a.b/c must be above 0, not 0"),
        ({"folders": {"a": "x"}}, "folders.a must be a finite number, not the text 'x'"),
        ({"folders": {2024: 1.0}}, "folders[2024] must be text, not 2024; put it in quotes"),
        ({"folders": {}}, "folders must be at least 1 long, not an empty section"),
        ({"kinds": ["a", "bb"]}, "kinds[1] must be one of a or b, not the text 'bb'"),
        ({"section": 3}, "section must be a section of keys, not 3"),
        ({"section": {"dims": 0}}, "section.dims is not a key; did you mean section.dim?"),
        ({"section": {"dim": 0}}, "section.dim must be at least 1, not 0"),
        ({"dim": 0}, "dim is not a key; did you mean section.dim?"),
    ],
)
def test_optional_sections_and_values_of_several_types(mapping, said):
    with pytest.raises(InputError) as caught:
        from_dict(Mixed, mapping)
    assert str(caught.value).startswith(said)
    right = {"folders": {"a": 1, "b": 0.5}, "kinds": ["b"], "section": {"dim": 6}}
    assert from_dict(Mixed, right).section.dim == 6
    assert to_dict(from_dict(Mixed, to_dict(Mixed())))["section"] is None


def test_degradations_and_folders_with_shares(write):
    text = "data:\n  train: {photos: 0.9, drawings: 0.1}\n  degrade: {clean: 0, jpeg: {twice: 1}}\n"
    config = load_config(write(text))
    assert config.data.train == {"photos": 0.9, "drawings": 0.1}
    assert config.data.degrade.clean == 0 and config.data.degrade.jpeg.quality == [25, 95]
    assert load_config(write(text), ["data.degrade=null", "data.train=x"]).data.degrade is None
    assert from_dict(Config, to_dict(config)) == config
    for override, part in [
        ("data.degrade.jpeg.quality=[95, 25]", "data.degrade.jpeg.quality must be two numbers"),
        ("data.degrade.jpeg.qality=3", "did you mean data.degrade.jpeg.quality?"),
        ("data.degrade.blur.share=2", "data.degrade.blur.share must be"),
        ("data.degrade.kernels=[nearest]", "data.degrade.kernels[0] must be one of bicubic"),
        ("data.train={photos: 0}", "data.train"),
        ("data.train={}", "data.train"),
        ("model.encoder={name: span, n_blocks: 1}", "n_blocks must be at least 2 in span"),
    ]:
        (said,) = mistakes(write(text), [override])
        assert part in said, said
