"""The config loader: right files load exactly, and every mistake in a wrong one is named."""

import dataclasses
from pathlib import Path

import pytest

from gsr.config import CHECKS, Config, ModelConfig, check, from_dict, load_config, to_dict
from gsr.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write


def mistakes(path, overrides=()):
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_empty_file_is_all_defaults(write):
    assert load_config(write("# nothing\n")) == Config()
    assert load_config(write("train:\nmodel:\n")) == Config()


def test_values_of_every_type(write):
    config = load_config(
        write(
            "name: x\nmodel:\n  mode: field\n  decoder: {hidden_list: [8, 9]}\n"
            "  encoder: {res_scale: 1}\ntrain: {lr: 1e-4, steps: 30, clip: null}\n"
            "data: {cache: false, val: folder}\n"
        )
    )
    assert config.name == "x" and config.model.mode == "field"
    assert config.model.decoder.hidden_list == [8, 9]
    assert config.train.lr == 1e-4 and config.train.steps == 30 and config.train.clip is None
    assert config.data.cache is False and config.data.val == "folder"
    # An integer where a number belongs becomes one, so that equal configs print alike.
    assert type(config.model.encoder.res_scale) is float


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "+1e-04", "0.0001"])
def test_floats_are_floats(write, text):
    assert load_config(write(f"train: {{lr: {text}}}")).train.lr == 1e-4


def test_words_that_yaml_1_1_would_change_stay_text(write):
    for name in ("no", "on", "2024-01-01", "1:30"):
        assert load_config(write(f"name: {name}\n")).name == name


def test_to_dict_and_back(write):
    config = load_config(write("train: {lr: 3e-5}\nmodel: {direct: {radius: 2}}"))
    assert from_dict(Config, to_dict(config)) == config
    assert to_dict(config)["model"]["direct"]["radius"] == 2


def test_every_mistake_is_named_at_once(write):
    text = mistakes(
        write(
            "model:\n  mod: direct\n  encoder: {n_feats: 3.0, n_blocks: true}\n"
            "lr: 1e-4\ntrain: {stps: 3, clip: .nan, device: 1}\n"
            "data: {cache: yes, batch: 0, val: 1}\n"
        ),
        ["model.mode=feild", "nonsense", "train.lr=fast"],
    )
    lines = [line.strip() for line in text.splitlines()]
    assert "experiment.yaml: 13 mistakes" in lines[0]
    for expected in (
        "override 'nonsense' must read section.key=value",
        "model.mod is not a key; did you mean model.mode?",
        "model.mode must be one of direct, field, official, bicubic, liif, lte, not the text "
        "'feild'; did you mean field?",
        "model.encoder.n_feats must be a whole number, not 3.0; write 3",
        "model.encoder.n_blocks must be a whole number, not true",
        "lr is not a key; did you mean train.lr?",
        "train.stps is not a key; did you mean train.steps?",
        "train.clip must be a finite number, not nan",
        "train.device must be text, not 1; put it in quotes",
        "train.lr must be a number, not the text 'fast'",
        "data.cache must be one of memory, mmap, none, true, false, not the text 'yes'",
        "data.batch must be from 1 to 1000000, not 0",
        "data.val must be text or null, not 1; put it in quotes",
    ):
        assert expected in lines, expected
    assert len(lines) == 14


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("model.encoder.n_blocks=0", "from 1 to 1024"),
        ("model.encoder.res_scale=0", "above 0"),
        ("model.encoder.n_feats=10000000", "from 1 to 4096"),
        ("model.encoder.res_scale=1" + 400 * "0", "finite"),
        ("model.direct.gaussians=0", "from 1 to 256"),
        ("model.direct.radius=0", "from 1 to 16"),
        ("model.bank.points=99", "a square number"),
        ("model.bank.points=0", "a square number"),
        ("model.bank.points=1000000", "a square number"),
        ("model.bank.window=6", "odd"),
        ("model.bank.window=1", "odd and from 3"),
        ("model.bank.kernel_size=1", "from 2 to 99"),
        ("model.decoder.hidden_dim=7", "even"),
        ("model.decoder.hidden_list=[]", "1 to 64 widths"),
        ("model.decoder.hidden_list=[4, 0]", "each from 1 to 4096"),
        ("data.patch=7", "from 8 to 4096"),
        ("data.patch=1" + 400 * "0", "from 8 to 4096"),
        ("data.scale_min=0.5", "from 1 to 1000"),
        ("data.scale_min=1e308", "from 1 to 1000"),
        ("data.scale_max=1e308", "from 1 to 1000"),
        ("data.scale_max=0.9", "from 1 to 1000"),
        ("data.queries=2305", "at most round"),
        ("data.queries=1" + 400 * "0", "at most round"),
        ("data.batch=0", "from 1 to 1000000"),
        ("data.batch=1" + 400 * "0", "from 1 to 1000000"),
        ("data.repeat=10000000000000", "from 1 to 10000"),
        ("data.workers=-1", "from 0 to 1024"),
        ("data.train=''", "a folder"),
        ("data.val=' '", "a folder"),
        ("data.cache_dir=''", "a folder"),
        ("init=''", "a model folder"),
        ("output=''", "a folder"),
        ("data.cache=1", "one of memory, mmap, none, true, false"),
        ("data.cache_budget=lots", "such as 500MB"),
        ("train.accumulate=0", "from 1 to 1000000"),
        ("train.ema=1", "below 1"),
        ("train.keep=-1", "from 0 to"),
        ("train.lr=0", "above 0"),
        ("train.lr=.inf", "finite"),
        ("train.clip=0", "above 0"),
        ("train.steps=0", "from 1 to"),
        ("train.steps=" + 400 * "9", "from 1 to 1000000000"),
        ("train.epochs=" + 400 * "9", "from 1 to 1000000000"),
        ("train.warmup=" + 400 * "9", "from 0 to 1000000000"),
        ("train.gamma=1.5", "at most 1"),
        ("train.seed=-1", "2^32"),
        ("train.threads=0", "from 1 to 1024"),
        ("train.threads=1025", "from 1 to 1024"),
        ("train.device=GPU 1", "cuda:1"),
        ("train.device=meta", "cuda:1"),
        ("train.device=cpu:x", "cuda:1"),
        ("name=a/b", "without slashes"),
        ("name=..", "without slashes"),
    ],
)
def test_ranges(write, override, sentence):
    text = mistakes(write(""), [override])
    key = override.partition("=")[0]
    assert f"{key} must be " in text and sentence in text and "\n" not in text


def test_ranges_across_sections(write):
    assert "model.bank.channels must be below encoder.n_feats, not 8" in mistakes(
        write("model: {mode: field, encoder: {n_feats: 8}}")
    )
    assert load_config(write("model: {encoder: {n_feats: 4}}")).model.encoder.n_feats == 4


def test_queries_limit_follows_the_scale(write):
    overrides = ["data.scale_min=1.5", "data.patch=9", "data.queries=196"]
    assert load_config(write(""), overrides).data.queries == round(13.5) ** 2
    assert "data.queries" in mistakes(write(""), [*overrides[:2], "data.queries=197"])


def test_every_section_has_limits():
    def sections(cls):
        yield cls
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.default_factory):
                yield from sections(field.default_factory)

    assert set(sections(Config)) <= set(CHECKS)


def test_devices_and_threads(write):
    for device in ("auto", "cpu", "cuda", "cuda:1", "mps", "xpu"):
        overrides = [f"train.device={device}", "train.threads=1024"]
        assert load_config(write(""), overrides).train.device == device


def test_check_is_for_configs_made_in_python():
    config = ModelConfig(mode="field")
    assert check(config) == config and check(config) is not config
    config.bank.window = 8
    with pytest.raises(InputError, match="^bank.window must be odd and from 3 to 99, not 8$"):
        check(config)


def test_overrides(write):
    path = write("train: {lr: 1e-3}\ndata: {val: x}\n")
    config = load_config(
        path,
        ["train.lr=5e-4", "data.val=null", "model.decoder.hidden_list=[1, 2]", "name=a=b"],
    )
    assert config.train.lr == 5e-4 and config.data.val is None
    assert config.model.decoder.hidden_list == [1, 2] and config.name == "a=b"
    assert "trian is not a key; did you mean train?" in mistakes(path, ["trian.lr=1"])
    assert "override 'train..lr=1' must read" in mistakes(path, ["train..lr=1"])
    assert "'name=[' is not valid YAML" in mistakes(path, ["name=["])
    assert "train must be a section of keys, not 3" in mistakes(path, ["train=3", "train.lr=1"])


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
    key = override.partition("=")[0]
    said = mistakes(write(text), [override])
    assert said.endswith(f"yaml: {key} is not a key; {section} is a value, not a section")


def test_scales_in_order(write):
    overrides = ["data.scale_min=2", "data.scale_max=1.5"]
    assert "data.scale_max must be at least scale_min, not 1.5" in mistakes(write(""), overrides)


def test_duplicate_keys_name_key_and_lines(write):
    text = mistakes(write("name: x\ntrain:\n  lr: 1\n  steps: 2\n  lr: 3\n"))
    assert "line 5: the key lr is there already, in line 3" in text


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("- a\n- b\n", "must hold keys and values, not a list"),
        ("just words", "must hold keys and values, not the text 'just words'"),
        ("name: [1\nother: 2", "is not valid YAML: line 2"),
        ("? [1]\n: 2\n", "a key must be a plain word"),
        ("name: !!python/name:os.system x", "is not valid YAML"),
        ("name: !!int foo", "is not valid YAML"),
        ("name: \x00", "is not valid YAML"),
        ("1: 2", "1 is not a key"),
        ("train: [1]", "train must be a section of keys, not a list"),
        ("data: {patch: x, queries: 9999}", "data.patch must be a whole number"),
    ],
)
def test_wrong_documents(write, text, sentence):
    message = mistakes(write(text))
    assert sentence in message and "\n" not in message


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no such config file" in mistakes(tmp_path / "none.yaml")
    assert "is a folder" in mistakes(tmp_path)
    assert "cannot be used" in mistakes(tmp_path / ("x" * 300))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\xff")
    assert "cannot be read as text" in mistakes(tmp_path / "binary.yaml")


def test_where_is_put_before_keys():
    with pytest.raises(InputError, match=r"^model\.encoder\.n_feats must be a whole number"):
        from_dict(ModelConfig, {"encoder": {"n_feats": "8"}}, "model")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_of_the_repository_load(path):
    assert load_config(path).name == path.stem
