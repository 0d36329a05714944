"""The modules of a deployment import one another in one direction only."""

import ast
import graphlib
from pathlib import Path

import flaxmpc

ROOT = Path(flaxmpc.__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "flaxmpc" / "secure").rglob("*.py")
    if path.name != "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Names of our modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def test_there_is_no_circle():
    graph = {name: imported(path) for name, path in FILES.items()}
    assert "flaxmpc.secure.deploy.errors" in graph["flaxmpc.secure.deploy.turns"]
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names it


def test_what_runs_in_a_process_knows_no_deployment():
    for name, path in FILES.items():
        if ".deploy." not in name:
            assert not [each for each in imported(path) if ".deploy." in each], name
