"""The house: which room imports which, no circle of imports, and no two public things of one name."""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The rooms that each room may import. All may import errors.py and files.py, which stand above the rooms.
ROOMS = {
    "nn": set(),
    "models": {"nn"},
    "data": set(),
    "training": {"nn", "models", "data"},
    "secure": set(),
    "secure.deploy": {"secure"},
    "serve": {"nn", "models", "data", "secure", "secure.deploy"},
    "convert": {"nn", "models", "data", "training", "secure", "serve"},
    "cli": {"models", "data", "training", "secure", "secure.deploy", "serve", "convert"},
}
ABOVE = {"flaxmpc.errors", "flaxmpc.files"}

# Imports against the arrows.
AGAINST = {
    ("flaxmpc.cli.main", "flaxmpc"),  # the version
    ("flaxmpc.secure", "flaxmpc.secure.deploy.client"),  # a public name, given on
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its name."""
    found = {}
    for path in sorted((ROOT / "flaxmpc").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imported(module: str) -> Iterator[str]:
    """The modules of the project that a module imports: everywhere, also in functions and for types alone."""
    for node in ast.walk(modules()[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by dots: the project writes whole names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "flaxmpc":
                yield name if name in modules() else name.rpartition(".")[0]


@functools.cache
def graph() -> dict[str, set[str]]:
    return {module: set(imported(module)) for module in modules()}


def room(module: str) -> str | None:
    """The room of a module; None: it is none of theirs, but one above them all."""
    path = module.removeprefix("flaxmpc.")
    inside = [name for name in ROOMS if path == name or path.startswith(f"{name}.")]
    return max(inside, key=len, default=None)


def test_every_import_is_of_a_module_that_is_there():
    missing = [(module, name) for module, names in graph().items() for name in names if name not in modules()]
    assert not missing


def test_a_room_imports_the_rooms_it_may():
    against = {
        (module, name)
        for module, names in graph().items()
        for name in names
        if (here := room(module)) and name not in ABOVE and room(name) not in {here, *ROOMS[here]}
    }
    assert against == AGAINST


def test_above_the_rooms_is_what_all_use_and_the_way_in():
    above = {module: names for module, names in graph().items() if room(module) is None}
    assert set(above) == {"flaxmpc", "flaxmpc.__main__", *ABOVE}
    assert [above[module] for module in sorted(ABOVE)] == [set(), set()]
    assert above["flaxmpc.__main__"] == {"flaxmpc.cli.main"}
    assert {room(name) for name in above["flaxmpc"]} <= {"nn", "models", "secure", "serve"}


def test_no_modules_import_one_another_in_a_circle():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' is imported by '.join(error.args[1])}") from None


def public(module: str) -> Iterator[str]:
    """The classes, and the constants in capitals, that a module defines and that are not private."""
    for node in modules()[module].body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            names = [name for name in names if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_two_public_things_have_one_name():
    homes: dict[str, list[str]] = {}
    for module in modules():
        for name in public(module):
            homes.setdefault(name, []).append(module)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    assert not twice


def test_contributors_are_told_of_these_rooms():
    lines = (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    told = {re.findall(r"`(.+?)`", first)[0]: set(re.findall(r"`(.+?)`", last)) for first, _, last in cells}
    assert told == {room.replace(".", "/"): {other.replace(".", "/") for other in own} for room, own in ROOMS.items()}
