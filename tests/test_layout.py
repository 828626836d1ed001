"""The shape of the house: imports go down the floors, Flax stays in its room, and files stay readable."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {  # DESIGN: "Import downward only"; longer names win over the folders they are in
    "gptjax": 0,  # the lazy gptjax/__init__.py, which anything may import
    "gptjax.config": 0,
    "gptjax.config_files": 0,
    "gptjax.model_config": 0,
    "gptjax.tuning_config": 0,
    "gptjax.recipe": 0,
    "gptjax.safety_config": 0,
    "gptjax.errors": 0,
    "gptjax.checks": 0,
    "gptjax.streams": 0,
    "gptjax.plain_files": 0,
    "gptjax.presets": 0,
    "gptjax.resolve": 0,
    "gptjax.parametrization": 0,
    "gptjax.model.accounting": 0,  # arithmetic on a configuration
    "gptjax.model.workload": 0,
    "gptjax.model.devices": 0,
    "gptjax.sampling.config": 0,
    "gptjax.text": 1,
    "gptjax.data": 1,
    "gptjax.parallel": 1,
    "gptjax.model": 2,
    "gptjax.training": 3,
    "gptjax.training.schedule": 0,  # arithmetic: plans and studies make steps of tokens
    "gptjax.sampling": 3,
    "gptjax.stages": 4,
    "gptjax.evaluation": 4,
    "gptjax.scaling": 4,
    "gptjax.scaling.laws": 0,  # published figures: a plan is made before JAX loads
    "gptjax.scaling.study": 0,
    "gptjax.scaling.plan": 0,
    "gptjax.scaling.depth": 0,
    "gptjax.interop": 3,
    "gptjax.interop.families": 0,
    "gptjax.interop.tensor_names": 0,
    "gptjax.interop.gguf": 1,  # of one file, the tokenizer too
    "gptjax.interop.gguf_tokenizer": 1,
    "gptjax.serving": 4,
    "gptjax.runs": 4,
    "gptjax.cli": 5,
    "gptjax.commands": 5,
    "gptjax.__main__": 5,
    "train": 5,
    "sample": 5,
}
STANDARD_LIBRARY_ONLY = (
    *(
        "gptjax.config",
        "gptjax.config_files",
        "gptjax.model_config",
        "gptjax.tuning_config",
        "gptjax.recipe",
        "gptjax.safety_config",
        "gptjax.checks",
        "gptjax.errors",
        "gptjax.streams",
        "gptjax.plain_files",
        "gptjax.presets",
        "gptjax.sampling.config",
    ),
    *("gptjax.resolve", "gptjax.model.accounting", "gptjax.model.workload", "gptjax.parametrization"),
    *("gptjax.model.devices", "gptjax.scaling.laws", "gptjax.scaling.study", "gptjax.scaling.plan"),
    *("gptjax.scaling.depth", "gptjax.training.schedule"),
)
MAX_LINES = 350
MAX_LINES_OF = {"gptjax/config.py": 500}  # one line of doc under every field of a run


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in (*ROOT.glob("gptjax/**/*.py"), ROOT / "train.py", ROOT / "sample.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, known: frozenset[str] = frozenset()) -> set[str]:
    """Modules that a file imports, inside functions too; `from package import module` names the module."""
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the floor"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
        elif not is_type_checking(node):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def imports_of_house(name: str) -> set[str]:
    return {module for module in imports(SOURCES[name], frozenset(SOURCES)) if module.split(".")[0] == "gptjax"}


def floor(name: str) -> int:
    """The floor of a module: that of the longest prefix in the table."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = next(prefix for prefix in prefixes if prefix in FLOORS)
    assert found != "gptjax" or name == "gptjax", f"{name} is on no floor: put it into a folder, or into the table"
    return FLOORS[found]


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"gptjax"}))
def test_imports_go_downward(name):
    """Nothing imports from a floor above its own. gptjax/__init__.py is lazy and re-exports all floors."""
    for imported in imports_of_house(name):
        assert floor(imported) <= floor(name), f"{name} (floor {floor(name)}) imports {imported} ({floor(imported)})"


def test_no_circles():
    """Each file can be read after those it imports: their graph has an order."""
    graph = {name: imports_of_house(name) - {"gptjax"} for name in SOURCES if name != "gptjax"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_flax_only_in_model():
    """Leaving Flax would cost the files of one folder: no other imports it."""
    users = {name for name in SOURCES if any(m.split(".")[0] == "flax" for m in imports(SOURCES[name]))}
    assert users
    assert all(name.startswith("gptjax.model.") for name in users), users


@pytest.mark.parametrize("name", [name for name in STANDARD_LIBRARY_ONLY if name in SOURCES])
def test_light_modules_import_the_standard_library_only(name):
    """A command line is parsed before anything heavy loads: these import each other and Python's own."""
    outside = {module for module in imports(SOURCES[name]) if module.split(".")[0] not in sys.stdlib_module_names}
    assert outside <= set(STANDARD_LIBRARY_ONLY)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.py")), ids=lambda path: path.name)
def test_configs_are_data(path):
    """A run's or study's file imports configuration and presets, and can run nothing else."""
    assert imports(path) <= {"gptjax.config", "gptjax.presets", "gptjax.scaling.study", "gptjax.recipe"}
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    assert all(isinstance(s, ast.Expr | ast.Import | ast.ImportFrom | ast.Assign) for s in statements)


def test_package_is_lazy():
    """`import gptjax` loads no submodule: its top-level statements import from the standard library only."""
    body = ast.parse(SOURCES["gptjax"].read_text(encoding="utf-8")).body
    eager = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in eager}
    assert all(module.split(".")[0] in sys.stdlib_module_names for module in modules)


def test_files_can_be_read():
    """A file that has grown past reading is usually two."""
    files = (*SOURCES.values(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/*.py"))
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {file: n for file, n in lengths.items() if n > MAX_LINES_OF.get(file, MAX_LINES)} == {}
