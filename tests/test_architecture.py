"""The import rules of the house, checked on the source: no module is imported to look at it.

`violations(root)` reads every module under root/t5x_lite and root/scripts. Imports count wherever
they stand: in functions, under TYPE_CHECKING, and in import_module("...").
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "t5x_lite"

# A room may import its own rank and lower ones. `data` has rules of its own.
RANK = {
    **dict.fromkeys(("types", "trees", "records", "devices", "lifeline"), 0),
    **dict.fromkeys(("aside", "compilation", "distributed", "programs", "sharding"), 1),
    "kernels": 2,
    "models": 3,
    "peft": 4,
    **dict.fromkeys(("decode", "interop"), 5),
    "evaluation": 6,
    "train": 7,
    **dict.fromkeys(("planning", "serving", "studies"), 8),
    **dict.fromkeys(("bindings", "commandline", "registry", "configure"), 9),
    "scripts": 10,
}
DATA_IMPORTS = {"types", "data"}
JAX_STACK = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
JAX_FREE = {"data", "types"}  # types too: data imports it
NEVER = {"torch", "transformers", "tensorflow"}
HARNESS = {f"{PACKAGE}.evaluation.harness", f"{PACKAGE}.train.harness"}  # alone import lm_eval
GIN_MODULE = f"{PACKAGE}.configure"
MAX_LINES = 400
LONG_MODULES: dict[str, str] = {}  # path from the root -> why it isn't two modules


class Module:
    """A parsed module: its dotted name, its room and (line, imported dotted name) pairs."""

    def __init__(self, path: Path, root: Path):
        self.path = path.relative_to(root).as_posix()
        parts = path.relative_to(root).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        parts = parts[:-1] if self.is_package else parts
        self.name = ".".join(parts)
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, filename=str(path))
        self.room = room(self.name)
        self.imports = list(self.find_imports())

    def find_imports(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=names):
                    yield from ((node.lineno, alias.name) for alias in names)
                case ast.ImportFrom(module=module, names=names, level=level):
                    base = module or ""
                    if level:
                        parts = self.name.split(".")
                        parts = parts[: len(parts) - level + self.is_package]
                        base = ".".join((*parts, *([module] if module else [])))
                    # The name may be a submodule or something inside of `base`: see `resolve`.
                    yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
                case ast.Call(args=[ast.Constant(value=str(name)), *_]):
                    called = ast.unparse(node.func).rpartition(".")[2]
                    if called in ("import_module", "__import__"):
                        yield node.lineno, name


def room(name: str) -> str:
    """'models' for t5x_lite.models.config; '' for t5x_lite itself and for other packages."""
    top, _, rest = name.partition(".")
    if top == "scripts":
        return "scripts"
    return rest.partition(".")[0] if top == PACKAGE else ""


def resolve(name: str, modules: Mapping[str, Module]) -> str | None:
    """The module of ours that `import name` or `from ... import name` reaches, or None."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def violations(root: Path, long_modules: Mapping[str, str] = LONG_MODULES) -> list[str]:
    """One line for each breach of the house's rules under `root`."""
    files = sorted([*(root / PACKAGE).rglob("*.py"), *(root / "scripts").rglob("*.py")])
    parsed = [Module(path, root) for path in files]
    modules = {module.name: module for module in parsed}
    found = []
    for module in parsed:
        lines = module.text.count("\n")
        if lines > MAX_LINES and module.path not in long_modules:
            found.append(f"{module.path}: {lines} lines; at most {MAX_LINES} without a reason")
        if lines <= MAX_LINES and module.path in long_modules:
            found.append(f"{module.path}: listed as long, but isn't any more")
        if not ast.get_docstring(module.tree):
            found.append(f"{module.path}: no docstring")
        if module.room and module.room not in (*RANK, "data"):
            found.append(f"{module.path}: room '{module.room}' is unknown; give it a rank in RANK")
            continue
        for line, name in module.imports:
            found += [f"{module.path}:{line}: {why}" for why in _breaches(module, name, modules)]
    gone = [path for path in long_modules if not (root / path).exists()]
    found += [f"{path}: listed as long, but isn't there" for path in gone]
    found += [f"circle: {' -> '.join(circle)}" for circle in circles(modules)]
    return list(dict.fromkeys(found))


def _breaches(module: Module, name: str, modules: Mapping[str, Module]) -> Iterator[str]:
    top, target = name.partition(".")[0], room(name)
    if top in NEVER:
        yield f"imports {top}, which nothing here may need"
    if top == "gin" and module.name != GIN_MODULE:
        yield f"imports gin; only {GIN_MODULE} does"
    if top == "lm_eval" and module.name not in HARNESS:
        yield f"imports lm_eval; only {' and '.join(sorted(HARNESS))} do"
    if top in JAX_STACK and module.room in JAX_FREE:
        yield f"{module.room} imports {top}"
    if not target or target == module.room or target not in (*RANK, "data"):
        return
    if module.room == "data":
        if target not in DATA_IMPORTS:
            yield f"data imports {target}; it may import only {', '.join(sorted(DATA_IMPORTS))}"
    elif module.room == "":
        yield f"{PACKAGE}/__init__.py imports {target}; it stays empty"
    elif target == "data":
        if RANK[module.room] <= RANK["models"]:
            yield f"{module.room} imports data; they meet in the batch keys alone"
    elif RANK[target] > RANK[module.room]:
        yield f"{module.room} imports {target}, which is above it"


def circles(modules: Mapping[str, Module]) -> list[list[str]]:
    """Circles of imports, each once, as names that begin and end alike."""
    graph = {
        name: {resolve(imported, modules) for _, imported in module.imports} - {None, name}
        for name, module in modules.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name not in done:
            for imported in sorted(filter(None, graph[name])):
                visit(imported, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_the_house_keeps_its_rules() -> None:
    assert violations(ROOT) == []


# Imports all of data while watching who asks for the JAX stack. grain asks for jax while it is
# imported, and does without when it isn't there; so the first run takes it away altogether.
IMPORT_DATA = """
import importlib, pkgutil, sys

blocked = {blocked!r}
askers = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {watched!r}:
            return None
        frame, stack = sys._getframe(1), []
        while frame:
            stack.append(frame.f_globals.get("__name__", "").partition(".")[0])
            frame = frame.f_back
        askers.append((name, [m for m in stack if m not in ("importlib", "__main__")]))
        if blocked:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Watch())
import t5x_lite.data
for module in pkgutil.walk_packages(t5x_lite.data.__path__, "t5x_lite.data."):
    importlib.import_module(module.name)
for name, stack in askers:
    if "grain" not in stack:
        sys.exit(f"{{name}} is imported by way of {{stack}}")
print(*sorted({watched!r} & set(sys.modules)))
"""


def import_data(blocked: bool, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = IMPORT_DATA.format(blocked=blocked, watched=JAX_STACK | NEVER)
    return subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )


def test_data_needs_no_jax_even_by_way_of_others() -> None:
    done = import_data(blocked=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_only_grain_brings_jax_into_data() -> None:
    done = import_data(blocked=False)
    assert done.returncode == 0, done.stderr
    assert not NEVER & set(done.stdout.split()), "tensorflow_datasets is to be used without these"


# Every rule fires


def house(root: Path, files: Mapping[str, str]) -> Path:
    """Writes modules with a docstring each: `{"models/config": "import x"}`."""
    for name, text in {"__init__": "", **files}.items():
        path = (root if name.startswith("scripts/") else root / PACKAGE) / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""A module."""\n{text}\n', encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"models/a": "import t5x_lite.train.loop", "train/loop": ""}, "models imports train"),
        ({"models/a": "from t5x_lite import train"}, "models imports train"),
        ({"models/a": "from ..train import loop"}, "models imports train"),
        ({"models/__init__": "from ..train import loop"}, "models imports train"),
        ({"models/a": "from .. import train"}, "models imports train"),
        ({"models/a": "def f():\n    from t5x_lite.train import x"}, "models imports train"),
        ({"models/a": "if TYPE_CHECKING:\n    import t5x_lite.peft"}, "models imports peft"),
        ({"models/a": "importlib.import_module('t5x_lite.train.a')"}, "models imports train"),
        ({"types": "import t5x_lite.sharding"}, "types imports sharding"),
        ({"train/a": "import t5x_lite.configure"}, "train imports configure"),
        ({"configure": "import scripts.train"}, "configure imports scripts"),
        ({"data/a": "from t5x_lite import trees"}, "data imports trees"),
        ({"data/a": "def f():\n    import jax.numpy as jnp"}, "data imports jax"),
        ({"data/builders/a": "from flax import linen"}, "data imports flax"),
        ({"types": "import optax"}, "types imports optax"),
        ({"models/a": "from t5x_lite.data import tasks"}, "models imports data"),
        ({"train/a": "import gin"}, "imports gin"),
        ({"scripts/a": "from gin import config"}, "imports gin"),
        ({"studies/a": "def f():\n    import torch.nn"}, "imports torch"),
        ({"interop/a": "from transformers import T5Config"}, "imports transformers"),
        ({"data/a": "import tensorflow as tf"}, "imports tensorflow"),
        ({"__init__": "from t5x_lite import types", "types": ""}, "it stays empty"),
        ({"cellar/a": ""}, "room 'cellar' is unknown"),
        ({"cellar": ""}, "room 'cellar' is unknown"),
        ({"models/long": "\n" * 400}, "402 lines"),
        (
            {"models/a": "from t5x_lite.models import b", "models/b": "from .a import x"},
            "circle: t5x_lite.models.a -> t5x_lite.models.b -> t5x_lite.models.a",
        ),
        (
            {
                "models/a": "def f():\n    from t5x_lite.models.b import x",
                "models/b": "import t5x_lite.models.c",
                "models/c": "if TYPE_CHECKING:\n    from t5x_lite.models.a import y",
            },
            "circle: t5x_lite.models.a -> t5x_lite.models.b -> t5x_lite.models.c",
        ),
    ],
)
def test_a_breach_is_found(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    found = violations(house(tmp_path, files))
    assert len(found) == 1, found
    assert expected in found[0]


def test_missing_docstrings_and_stale_exceptions_are_found(tmp_path: Path) -> None:
    house(tmp_path, {"models/a": "", "models/b": "\n" * 400})
    (tmp_path / PACKAGE / "models" / "a.py").write_text("x = 1\n")
    listed = ["t5x_lite/models/b.py", "t5x_lite/models/a.py", "t5x_lite/gone.py"]
    assert violations(tmp_path, dict.fromkeys(listed, "a reason")) == [
        "t5x_lite/models/a.py: listed as long, but isn't any more",
        "t5x_lite/models/a.py: no docstring",
        "t5x_lite/gone.py: listed as long, but isn't there",
    ]


def test_what_is_allowed_is_not_complained_of(tmp_path: Path) -> None:
    allowed = {
        "types": "import numpy",
        "trees": "from t5x_lite.types import InputError\nimport jax",
        "models/__init__": "from t5x_lite.models.a import A",
        "models/a": "from . import b\nfrom .b import c\nfrom t5x_lite import sharding, trees",
        "models/b": "import jax, flax",
        "sharding": "",
        "data/a": "import tensorflow_datasets, grain\nimport t5x_lite.types\nfrom . import b",
        "data/b": "",
        "decode/a": "from t5x_lite.data import a",
        "interop/a": "from t5x_lite.decode import a",
        "train/a": "from t5x_lite import decode, data, models, peft",
        "configure": "import gin\nfrom t5x_lite.train import a",
        "scripts/train": "from t5x_lite import configure",
    }
    assert violations(house(tmp_path, allowed)) == []


@pytest.mark.parametrize(
    ("module", "complaint"),
    [("import jax", "jax is imported by way of"), ("import optax", "optax is imported")],
)
def test_jax_within_data_is_found_at_run_time(tmp_path: Path, module: str, complaint: str) -> None:
    house(tmp_path, {"data/__init__": "", "data/a": f"import helper_of_ours\n{module}"})
    (tmp_path / "helper_of_ours.py").write_text("")
    assert complaint in import_data(blocked=False, root=tmp_path).stderr
    assert import_data(blocked=True, root=tmp_path).returncode != 0


def test_programs_start_without_what_few_of_them_need() -> None:
    late = ("orbax.checkpoint", "jax.experimental.pallas.tpu")
    program = (
        "import importlib, sys, t5x_lite.configure\n"
        f"print(*(m for m in {late} if m in sys.modules))\n"
        f"for m in {late}: importlib.import_module(m)"  # they are names that exist
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
