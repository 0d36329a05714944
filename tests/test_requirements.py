"""The lock files: each requirement has hashes, and all of them fit what pyproject.toml asks for."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]
LOCKS = {"stable": ("3.10", "3.11"), "spu-next": ("3.11",), "docs": ("3.11",), "tools": ("3.10", "3.11")}
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


def entries(name: str) -> list[tuple[Requirement, list[str]]]:
    """Requirements with their hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").replace("\\\n", " ")
    split = [line.partition(" --hash=") for line in text.splitlines() if line and not line.startswith("#")]
    return [(Requirement(spec.strip()), f"{equals}{hashes}".split()) for spec, equals, hashes in split]


def asked(name: str) -> list[Requirement]:
    """What a lock file is of: pyproject.toml with the extra dev, and what takes the place of some of it."""
    if name == "tools":
        lines = (ROOT / "requirements" / "tools.in").read_text("utf-8").splitlines()
        return [Requirement(line) for line in lines if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = (*extras["dev"], *extras["bench"], *(extras["docs"] if name == "docs" else ()))
    wanted = [Requirement(spec) for spec in (*project["dependencies"], *own)]
    instead = {}
    if name == "spu-next":
        lines = (ROOT / "requirements" / "spu-next.in").read_text("utf-8").splitlines()
        instead = {spec.name: spec for spec in map(Requirement, (line for line in lines if not line.startswith("#")))}
    return [instead.get(spec.name, spec) for spec in wanted if spec.name != "flaxmpc"]


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_is_one_version_with_hashes(name):
    found = entries(name)
    assert len(found) > 20
    for requirement, hashes in found:
        assert re.fullmatch(r"==[^=,*]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), requirement


@pytest.mark.parametrize(("name", "python"), [(name, python) for name, pythons in LOCKS.items() for python in pythons])
def test_what_is_asked_for_is_locked_once_for_every_machine(name, python):
    for system, machine in PLATFORMS:
        environment: Any = {
            "python_version": python,
            "python_full_version": f"{python}.7",
            "sys_platform": system,
            "platform_machine": machine,
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
            "extra": "",
        }
        locked: dict[str, Any] = {}
        for requirement, _ in entries(name):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                key = canonicalize_name(requirement.name)
                assert key not in locked, f"{key} is locked twice"
                locked[key] = next(iter(requirement.specifier)).version
        for spec in asked(name):
            if spec.marker is None or spec.marker.evaluate(environment):
                version = locked[canonicalize_name(spec.name)]
                assert spec.specifier.contains(version, prereleases=True), f"{spec}: {version} is locked"
