"""What a user installs: light to import, complete in every form, and honest about what it needs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gsr

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "gsr").rglob("*.py"))


def python(code, *arguments, path="", cwd=None):
    """What `code` prints in a fresh interpreter that finds packages at `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment, cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports(path):
    """Top-level names that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def project():
    tomllib = pytest.importorskip("tomllib", reason="in Python from 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements):
    return {re.match(r"[\w-]+", requirement).group().lower() for requirement in requirements}


# ---- importing ----------------------------------------------------------------------------------


def test_import_is_light():
    code = "import gsr, sys; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code, path=ROOT, cwd="/").split()}
    heavy = {"torch", "numpy", "PIL", "yaml", "pydantic", "triton", "tqdm", "einops", "matplotlib"}
    assert "gsr" in loaded and not loaded & heavy


def test_using_tensors_needs_no_pillow_and_no_triton():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['PIL', 'triton', 'matplotlib']))\n"
        "import gsr, torch; from gsr.config import EncoderConfig, ModelConfig\n"
        "model = gsr.GaussianSR(ModelConfig(encoder=EncoderConfig(n_feats=4, n_blocks=1)))\n"
        "print(*gsr.upscale(torch.rand(3, 8, 8), 2, model=model).shape)"
    )
    assert python(code, path=ROOT) == "3 16 16"


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_upscaling_does_not_load_the_compiler(mode):
    """Which would take longer than a small image."""
    code = (
        "import gsr, sys, torch; from gsr.config import EncoderConfig, ModelConfig\n"
        f"model = gsr.GaussianSR(ModelConfig({mode!r}, EncoderConfig(n_feats=16, n_blocks=1)))\n"
        "gsr.upscale(torch.rand(3, 8, 8), 2, model=model)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert python(code, path=ROOT) == "False"


def test_public_names():
    assert gsr.upscale.__module__ == "gsr.inference.upscale"
    assert gsr.load.__module__ == "gsr.models.checkpoint"
    assert issubclass(gsr.InputError, ValueError) and gsr.GaussianSR.__name__ == "GaussianSR"
    assert set(gsr.__all__) <= set(dir(gsr))
    with pytest.raises(AttributeError, match="no attribute 'upscail'"):
        _ = gsr.upscail


def test_version_is_that_of_the_command():
    assert re.fullmatch(r"\d+\.\d+\.\d+", gsr.__version__)


def test_triton_is_imported_only_by_kernels():
    assert SOURCES and not [path.name for path in SOURCES if "triton" in imports(path)]


def test_kernels_are_imported_only_by_ops():
    users = [p.name for p in SOURCES if re.search(r"(from|import) gsr\.kernels", p.read_text())]
    assert set(users) <= {"operators.py"}


def test_every_import_is_a_declared_dependency():
    distribution = {"PIL": "pillow", "yaml": "pyyaml"}
    always = names(project()["project"]["dependencies"])
    extra = names(project()["project"]["optional-dependencies"]["cpu"])
    for path in SOURCES:
        # What imports the loops does without them where the extra is missing.
        loops = path.name in ("cpu_loops.py", "decode_cpu.py")
        declared = always | extra if loops else always
        third_party = set(imports(path)) - set(sys.stdlib_module_names) - {"gsr"}
        missing = {distribution.get(name, name) for name in third_party} - declared
        assert not missing, f"{path.name} imports {missing}"


def test_constraints_pin_what_is_declared():
    table = project()["project"]
    extras = table["optional-dependencies"]
    declared = names(table["dependencies"]).union(*map(names, extras.values()))
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert names(pinned) <= declared and "torch==2.13.0" in pinned
    assert all("==" in line for line in pinned)


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.parent.name
    } | {"gsr.kernels"}
    assert found == set(project()["tool"]["setuptools"]["packages"])


# ---- gsr.kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["kernels", "gsr/kernels"], ids=["checkout", "wheel"])
def test_kernels_folder_is_found(tmp_path, home):
    """In either layout, with an unrelated package called kernels on the path as well."""
    for folder in ("gsr", home, "other/kernels"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "kernels.py"):
        shutil.copy(ROOT / "gsr" / name, tmp_path / "gsr")
    (tmp_path / home / "probe.py").write_text("where = 'ours'")
    (tmp_path / "other/kernels/__init__.py").write_text("where = 'theirs'")
    code = "import gsr.kernels.probe as a, kernels as b; print(a.where, b.where)"
    path = os.pathsep.join([str(tmp_path / "other"), str(tmp_path)])
    assert python(code, path=path, cwd=tmp_path / "other") == "ours theirs"


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "README.md").is_file()  # a wheel needs a file to make the folder


# ---- building -----------------------------------------------------------------------------------

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(*sys.argv[2:]))
"""


def build(source, form, target):
    """The archive that the build backend makes of `source`, offline, as pip would ask it to."""
    target.mkdir(exist_ok=True)
    return target / python(BUILD, form, target, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what belongs to the distribution, with a kernel and a bundled model in it."""
    source = tmp_path_factory.mktemp("source") / "repository"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("gsr", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    (source / "kernels" / "probe.py").write_text("where = 'ours'")
    folder = source / "gsr" / "weights" / "probe"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text("x")
    return source


PROBE = """
import sys, site
if sys.argv[2:]:
    # The environment may have an editable install of its own, whose finder, of the same name, would
    # come first.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
    for name in [name for name in sys.modules if "editable" in name]: del sys.modules[name]
    sys.path.insert(0, sys.argv[2])
    site.addsitedir(sys.argv[2])  # an editable install works through a .pth file
import gsr, gsr.kernels.probe, gsr.models, gsr.cli
print(gsr.__file__, gsr.kernels.probe.__file__)
"""


def check_wheel(wheel, source, tmp_path):
    files = zipfile.ZipFile(wheel).namelist()
    for path in source.glob("gsr/**/*"):
        if path.is_file():
            assert path.relative_to(source).as_posix() in files
    for name in ("gsr/kernels/probe.py", "gsr/kernels/README.md"):
        assert name in files
    assert {name.partition("/")[0] for name in files} == {
        "gsr",
        f"gaussiansr-{gsr.__version__}.dist-info",
    }
    info = f"gaussiansr-{gsr.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in files
    read = zipfile.ZipFile(wheel).read
    assert b"gsr = gsr.cli:command" in read(f"{info}/entry_points.txt")
    metadata = read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: Apache-2.0" in metadata
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    where = python(PROBE, "wheel", path=site, cwd=tmp_path).split()
    assert where == [str(site / "gsr/__init__.py"), str(site / "gsr/kernels/probe.py")]


@pytest.mark.slow
def test_wheel(source, tmp_path):
    check_wheel(build(source, "build_wheel", tmp_path / "dist"), source, tmp_path)


@pytest.mark.slow
def test_wheel_from_sdist(source, tmp_path):
    archive = build(source, "build_sdist", tmp_path / "dist")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    check_wheel(build(unpacked, "build_wheel", tmp_path / "dist"), source, tmp_path)


@pytest.mark.slow
def test_editable(source, tmp_path):
    wheel = build(source, "build_editable", tmp_path / "dist")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    where = python(PROBE, "editable", tmp_path / "site", cwd=tmp_path).split()
    assert where == [str(source / "gsr/__init__.py"), str(source / "kernels/probe.py")]
