"""How the project hangs together: who imports whom, what is installed, and what comes with each config."""

import ast
import configparser
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from gpt_jax import config as configs
from gpt_jax.config import FinetuneConfig, PretrainConfig, RunConfig
from gpt_jax.config.load import config_folder, load_config
from gpt_jax.model import dropout

ROOT = Path(__file__).parents[1]

# Top to bottom; a module imports from its own line and from lower ones only.
LAYERS = (
    {"__main__", "cli"},
    {"experiments"},
    {"launch", "plan"},
    {"interop"},
    {"tasks"},
    {"train"},
    {"model"},
    {"data"},
    {"runtime"},
    {"config"},
    {"errors"},
    {"__init__"},
)
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Imports that cost seconds, or that a machine which only trains may lack.
HEAVY = {
    *("ftfy", "onnx", "onnxruntime", "safetensors", "sentencepiece", "spacy", "tensorflow", "tensorflow_datasets", "tokenizers"),
    *("torch", "transformers"),
}
# To make batches, and to write a SavedModel.
TENSORFLOW = {"gpt_jax/data/pipeline.py", "gpt_jax/interop/graphs.py"}

FILES = sorted([*(ROOT / "gpt_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.stem != "__init__")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Import(NamedTuple):
    module: str
    """Dotted, absolute, with the imported name at its end where there is one: it may be a module too."""
    line: int
    eager: bool
    """Runs when the module is imported, not only when a function is called or types are checked."""


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Every import in a module's source, wherever it stands. `package`: the dotted package that relative imports start from."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in ast.iter_child_nodes(node):
                yield from visit(child, False)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, eager and not inside)

    return visit(ast.parse(source), True)


def imports_of(path: Path) -> list[Import]:
    return list(imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)))


def layer_of(part: str) -> int:
    for number, layer in enumerate(LAYERS):
        if part in layer:
            return number
    pytest.fail(f"gpt_jax.{part} has no line in LAYERS: decide who may import it")


def part_of(module: str) -> str | None:
    """The part of gpt_jax that a dotted module belongs to; None for other libraries."""
    top, _, rest = module.partition(".")
    if top != "gpt_jax":
        return None
    part = rest.partition(".")[0]
    if part == "launch":  # mapped into the package
        return part
    return part if (ROOT / "gpt_jax" / part).is_dir() or (ROOT / "gpt_jax" / f"{part}.py").is_file() else "__init__"


def test_every_form_of_import_is_seen() -> None:
    source = """
import jax.numpy as jnp
from gpt_jax import data, __version__
from ..model.loss import loss
from . import store
if TYPE_CHECKING:
    import flax
def f():
    import tensorflow as tf
try:
    import spacy
except ImportError:
    pass
"""
    seen = {(each.module, each.eager) for each in imports(source, "gpt_jax.data")}
    assert seen == {
        ("jax.numpy", True),
        ("gpt_jax.data", True),
        ("gpt_jax.__version__", True),
        ("gpt_jax.model.loss.loss", True),
        ("gpt_jax.data.store", True),
        ("flax", False),
        ("tensorflow", False),
        ("spacy", True),
    }
    assert [part_of(module) for module in ("jax.numpy", "gpt_jax.data", "gpt_jax.__version__")] == [None, "data", "__init__"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_from_a_higher_layer(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    own = layer_of("launch" if parts[0] == "launch" else parts[1].removesuffix(".py"))
    for each in imports_of(path):
        part = part_of(each.module)
        if part is not None:
            assert layer_of(part) >= own, f"{name_of(path)}:{each.line} imports {each.module}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    for each in imports_of(path):
        library = each.module.partition(".")[0]
        where = f"{name_of(path)}:{each.line} imports {each.module}"
        assert library not in HEAVY or not each.eager, f"{where} outside of a function"
        assert library != "tensorflow" or name_of(path) in TENSORFLOW, f"{where}; only {' and '.join(sorted(TENSORFLOW))} may"
        assert library not in ACCELERATED or not name_of(path).startswith("gpt_jax/data/"), f"{where}; arrays in data are NumPy's"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs_import_only_the_config_classes(path: Path) -> None:
    assert {part_of(each.module) for each in imports_of(path)} <= {"config"}


def loaded_by(code: str) -> set[str]:
    """Runs code in a fresh interpreter; the top-level modules that it has imported at the end."""
    report = "import sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_help_needs_neither_jax_nor_tensorflow() -> None:
    code = """
import runpy, sys
sys.argv = ["gpt-jax", "--help"]
try:
    runpy.run_module("gpt_jax", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
"""
    loaded = loaded_by(code)
    assert "gpt_jax" in loaded
    assert not loaded & (ACCELERATED | HEAVY)


def test_training_does_not_import_tensorflow() -> None:
    loaded = loaded_by("import gpt_jax.train.loop, gpt_jax.model.transformer")
    assert "jax" in loaded
    assert "tensorflow" not in loaded


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs_load_and_open_with_their_command(path: Path) -> None:
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    config = load_config(name)
    assert isinstance(config, RunConfig)
    assert config_folder().samefile(ROOT / "configs")
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"    gpt-jax {'finetune' if isinstance(config, FinetuneConfig) else 'pretrain'} {name} " in header
    assert "Time" in header
    assert "Expect: " in header or "result: " in header


def test_array_shapes_are_checked_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        dropout.dropout(jnp.ones((2, 3)), jnp.zeros((2, 7), jnp.uint32), 0.5)


def sections(kind: type) -> Iterator[type]:
    yield kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            yield from sections(type(field.default))


@pytest.mark.parametrize(
    "section", sorted({*sections(PretrainConfig), *sections(FinetuneConfig)}, key=lambda kind: kind.__name__)
)
def test_every_config_field_says_what_it_is_and_may_change(section: type) -> None:
    tree = ast.parse(Path(configs.__file__).read_text())
    names = {kind.__name__ for kind in section.__mro__}
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    explained = {
        field.target.id
        for body in bodies
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default):
            assert type(field.default).__doc__, f"{field.name}: its class has no docstring"
        else:
            assert field.name in explained, f"{section.__name__}.{field.name} has no docstring"
            assert field.metadata.get("effect") in ("result", "speed", "display"), f"{section.__name__}.{field.name}: no effect"


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    parts = [path.parent.relative_to(ROOT).parts for path in (ROOT / "gpt_jax").rglob("__init__.py")]
    mapped = [path for folder in ("configs", "launch") for path in (ROOT / folder).rglob("*.py")]
    parts += [("gpt_jax", *path.parent.relative_to(ROOT).parts) for path in mapped]
    assert set(setup["options"]["packages"].split()) == {".".join(each) for each in parts}


@pytest.mark.parametrize("version", ["311", "312"])
def test_constraints_hold_pins_only_and_never_torch(version: str) -> None:
    lines = (ROOT / "constraints" / f"py{version}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert all(set(pin) <= set("0123456789.abcrpost") for pin in pins.values())
    assert {"jax", "flax", "tensorflow", "tensorflow-cpu", "pytest", "mypy", "setuptools"} <= pins.keys()
    assert not {"torch", "gpt-jax"} & pins.keys()


@pytest.mark.parametrize("version", ["311", "312"])
def test_the_environment_of_the_exports_agrees_with_the_main_one(version: str) -> None:
    main, interop = (
        dict(line.split("==") for line in (ROOT / "constraints" / f"{prefix}py{version}.txt").read_text().splitlines())
        for prefix in ("", "interop-")
    )
    assert {"torch", "transformers", "onnx", "onnxruntime", "safetensors", "tokenizers"} <= interop.keys()
    assert {name: interop[name] for name in main.keys() & interop.keys()} == {
        name: main[name] for name in main.keys() & interop.keys()
    }


@pytest.mark.slow
def test_a_plain_install_brings_the_configs(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    for name in ("gpt_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, copy]
    subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
    shutil.rmtree(copy)

    code = "from gpt_jax import config_io as io; import gpt_jax.configs.smoke as smoke; print(io.config_folder()); smoke.config()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == site / "gpt_jax" / "configs"
