"""How the project is put together: who imports whom, what is installed, and rules of style that hold for every file."""

import ast
import configparser
import graphlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from gpt_jax.model import dropout

ROOT = Path(__file__).parents[1]

# Top to bottom; a module imports from its own line and from lower ones only.
LAYERS = (
    {"__main__", "cli"},
    {"arguments"},
    {"bench", "experiments"},
    {"launch", "plan"},
    {"interop"},
    {"tasks"},
    {"train"},
    {"model"},
    {"data"},
    {"runtime"},
    {"config"},
    {"inputs"},
    {"errors"},
    {"__init__"},
)
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
WITHOUT_JAX = (
    *(
        "launch/",
        "gpt_jax/__init__.py",
        "gpt_jax/__main__.py",
        "gpt_jax/arguments.py",
        "gpt_jax/cli.py",
        "gpt_jax/config/",
        "gpt_jax/data/",
        "gpt_jax/inputs/",
    ),
    *("gpt_jax/errors.py", "gpt_jax/runtime/console.py", "gpt_jax/runtime/git_info.py", "gpt_jax/runtime/mesh.py"),
    *(
        "gpt_jax/runtime/chips.py",
        "gpt_jax/runtime/prices.py",
        "gpt_jax/train/flops.py",
        "gpt_jax/runtime/lock.py",
        "gpt_jax/runtime/machine.py",
        "gpt_jax/runtime/rundir.py",
        "gpt_jax/runtime/signals.py",
    ),
)
"""Folders and modules that import none of the libraries in `ACCELERATED`, not even inside a function."""

HEAVY = {
    *(
        "ctranslate2",
        "ftfy",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "pyarrow",
        "safetensors",
        "scipy",
        "sentencepiece",
        "sklearn",
        "spacy",
        "tensorboardX",
    ),
    *("tensorflow", "tensorflow_datasets", "tokenizers", "torch", "transformers"),
}
"""Libraries whose import takes long, or that a machine which only trains may lack."""

TENSORFLOW = {"gpt_jax/data/pipeline.py", "gpt_jax/interop/stablehlo.py"}
"""Modules that import tensorflow: to make batches, and to write a SavedModel."""

FILES = sorted([*(ROOT / "gpt_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.stem != "__init__")
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Import(NamedTuple):
    """An import statement, or one name of it."""

    module: str
    """Absolute dotted name, with the imported name at its end if there is one, since that may be a module too."""
    line: int
    eager: bool
    """Whether it runs when the module is imported, not only when a function is called or types are checked."""


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Returns every import in a module's source. `package` is the dotted package that relative imports start from."""

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
    """Returns the part of gpt_jax that a dotted module belongs to, or None for other libraries."""
    top, _, rest = module.partition(".")
    if top != "gpt_jax":
        return None
    part = rest.partition(".")[0]
    if part == "launch":  # mapped into the package
        return part
    return part if (ROOT / "gpt_jax" / part).is_dir() or (ROOT / "gpt_jax" / f"{part}.py").is_file() else "__init__"


def test_every_form_of_import_is_recognized() -> None:
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
    assert {(name, eager) for name, _, eager in imports(source, "gpt_jax.data")} == {
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
    for module, line, _ in imports_of(path):
        part = part_of(module)
        if part is not None:
            assert layer_of(part) >= own, f"{name_of(path)}:{line} imports {module}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    for module, line, eager in imports_of(path):
        library = module.partition(".")[0]
        where = f"{name_of(path)}:{line} imports {module}"
        assert library not in HEAVY or not eager, f"{where} outside of a function"
        assert library != "tensorflow" or name_of(path) in TENSORFLOW, f"{where}; only {' and '.join(sorted(TENSORFLOW))} may"
        assert library not in ACCELERATED or not name_of(path).startswith(WITHOUT_JAX), f"{where}, but must do without"


def test_the_lists_of_modules_follow_the_tree() -> None:
    for name in (*WITHOUT_JAX, *TENSORFLOW):
        assert (ROOT / name).exists(), name
    importers = {name_of(path) for path in FILES if any(name.partition(".")[0] == "tensorflow" for name, *_ in imports_of(path))}
    assert importers == TENSORFLOW


def module_of(name: str) -> str | None:
    """Returns the module of this project that an imported dotted name is, or is part of; None for other libraries."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        folder = ROOT / Path(*(parts[1:end] if parts[:2] == ["gpt_jax", "launch"] else parts[:end]))
        if folder.with_suffix(".py").is_file() or (folder / "__init__.py").is_file():
            return ".".join(parts[:end])
    return None


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = ".".join(("gpt_jax", *parts) if parts[0] == "launch" else parts).removesuffix(".__init__")
        graph[own] = {module for name, *_ in imports_of(path) if (module := module_of(name)) not in (None, own)}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("gpt_jax.errors") < order.index("gpt_jax.launch.command") < order.index("gpt_jax.cli")


def test_no_module_that_launch_imports_needs_jax() -> None:
    """This includes imports inside functions, and the imports of imported modules."""
    names = {name for path in FILES if path.parent.name == "launch" for name, *_ in imports_of(path)}
    modules = sorted({module for name in names if (module := module_of(name))})
    modules += [f"gpt_jax.launch.{path.stem}" for path in FILES if path.parent.name == "launch" and path.stem != "__init__"]
    loaded = loaded_by("import " + ", ".join(modules))
    assert {"gpt_jax", "yaml"} <= loaded
    assert not loaded & ACCELERATED


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs_import_only_the_config_classes(path: Path) -> None:
    assert {part_of(module) for module, *_ in imports_of(path)} <= {"config"}


def loaded_by(code: str) -> set[str]:
    """Runs code in a new interpreter; returns the top-level modules that it has imported at the end."""
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


def test_a_checkout_can_be_used_without_installing_it() -> None:
    code = "import gpt_jax.cli, gpt_jax.launch.command, gpt_jax.configs.finetune.cola as c; print(c.config().task.name)"
    paths = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-c", code]  # -S: without the links of an editable installation
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cola\n", "")


def test_training_does_not_import_tensorflow() -> None:
    loaded = loaded_by("import gpt_jax.train.pretrain, gpt_jax.tasks.finetune, gpt_jax.model.network")
    assert "jax" in loaded
    assert not loaded & HEAVY


def test_array_shapes_are_checked_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        dropout.dropout(jnp.ones((2, 3)), jnp.zeros((2, 7), jnp.uint32), 0.5)


# -- style ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_longer_than_80_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
            assert lines <= 80, f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines"


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of each docstring: strings that stand alone, below a module, class, function or field."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


FRAGMENT = re.compile(r"(Of|That|What|Whose|The same)\b")
"""Beginnings of docstrings that cannot be understood without the name above them."""


@pytest.mark.parametrize("path", [*FILES, *CONFIGS], ids=name_of)
def test_docstrings_do_not_begin_as_fragments(path: Path) -> None:
    for line, text in docstrings(path.read_text()):
        assert not FRAGMENT.match(text), f"{name_of(path)}:{line}: {text.splitlines()[0]}"


def test_docstrings_of_every_kind_are_recognized() -> None:
    source = '''
"""Of a module."""
class A:
    """That of a class."""
    x = 1
    """
    Whose line is the next one."""
    async def f(self):
        "What it does."
        text = "Of no interest."
'''
    assert [FRAGMENT.match(text)[1] for _, text in sorted(docstrings(source))] == ["Of", "That", "Whose", "What"]  # type: ignore[index]


# The brackets keep these patterns from matching this file.
BRITISH = re.compile(
    r"optimi[s]|normali[s]|initiali[s]|tokeni[s][ei]|seriali[s]|generali[s]|summari[s][ei]|recogni[s]|organi[s][ei]|minimi[s]e|maximi[s]e"
    r"|label[l]|model[l]|neighbo[u]r|behavio[u]r|colo[u]r|favo[u]r|cent[r]e|program[m]e\b|learn[t]\b|spel[t]\b",
    re.IGNORECASE,
)
FOLDERS = ("gpt_jax", "launch", "configs", "tests", "benchmarks")
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", sorted(TEXTS), ids=name_of)
def test_spelling_is_american(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not BRITISH.search(line), f"{name_of(path)}:{number}: {line.strip()}"


ACROSS_MODULES = {
    "bench/test_gpu": "the measurements in benchmarks/gpu",
    "bench/test_gpu_tables": "their tables",
    "bench/test_tpu_kernels": "benchmarks/tpu_kernels.py",
    "config/test_configs": "the files in configs/",
    "interop/test_graphs": "ONNX and StableHLO",
    "launch/test_container": "launch/Dockerfile",
    "model/test_gradients": "the network and its loss",
    "plan/test_planned_configs": "configs on the TPUs that they name",
    "test_fixture": "the runs of earlier versions in fixtures/",
    "test_fuzz": "the readers of files from outside the project",
    "test_makefile": "the Makefile",
    "test_packaging": "all of the project",
    "test_released": "the released code beside ours",
    "train/test_processes": "several processes of a pre-training",
    "train/test_resume": "pre-trainings that were killed",
}
"""Test modules that do not mirror a single module, and their subjects."""


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_mirror_the_modules(path: Path) -> None:
    """The name of a test module is a module's, to which a word for the kind of test may be added."""
    folder = path.parent.relative_to(ROOT / "tests")
    if (folder / path.stem).as_posix() in ACROSS_MODULES:
        return
    source = ROOT / ("launch" if folder.name == "launch" else "gpt_jax" / folder)
    modules = {module.stem.rstrip("_") for module in source.glob("*.py")}
    words = path.stem.removeprefix("test_").split("_")
    assert modules & {"_".join(words[:end]) for end in range(1, len(words) + 1)}, f"{name_of(path)} mirrors no module of {source}"


def test_the_exceptions_among_test_modules_exist() -> None:
    assert {path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in TESTS} >= ACROSS_MODULES.keys()


# -- installation -----------------------------------------------------------------------------------------------------------


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    parts = [path.parent.relative_to(ROOT).parts for path in (ROOT / "gpt_jax").rglob("__init__.py")]
    mapped = [path for folder in ("configs", "launch") for path in (ROOT / folder).rglob("*.py")]
    parts += [("gpt_jax", *path.parent.relative_to(ROOT).parts) for path in mapped]
    assert set(setup["options"]["packages"].split()) == {".".join(part) for part in parts}


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
    assert {"torch", "transformers", "onnx", "onnxruntime", "pyarrow", "safetensors", "tokenizers"} <= interop.keys()
    assert {name: interop[name] for name in main.keys() & interop.keys()} == {
        name: main[name] for name in main.keys() & interop.keys()
    }


@pytest.mark.slow
def test_a_plain_install_brings_the_configs_and_launch(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    for name in ("gpt_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, copy]
    subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
    shutil.rmtree(copy)

    code = """
from gpt_jax.config.load import config_folder, load_config
import gpt_jax.configs.smoke, gpt_jax.launch.command
assert load_config("smoke") == gpt_jax.configs.smoke.config()
print(config_folder())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == site / "gpt_jax" / "configs"
    data = {path.relative_to(ROOT) for path in (ROOT / "gpt_jax").rglob("*.json")}
    assert data
    assert {path.relative_to(site) for path in (site / "gpt_jax").rglob("*.json")} == data
