"""What is built for `pip install`: its files and what it says of itself. `make wheel-test` installs it."""

import email
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import flaxmpc
from flaxmpc.models import zoo

ROOT = Path(__file__).parents[1]
DIST_INFO = f"flaxmpc-{flaxmpc.__version__}.dist-info/"


def build(builder, root, folder) -> Path:
    return Path(next(iter(builder(str(root)).build(directory=str(folder), versions=["standard"]))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build(WheelBuilder, ROOT, tmp_path_factory.mktemp("wheel"))) as built:
        yield built


@pytest.fixture(scope="module")
def metadata(wheel):
    return email.message_from_bytes(wheel.read(f"{DIST_INFO}METADATA"))


def kept(folder):
    """The files below a folder that git keeps or would keep."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


def test_it_holds_the_package_and_the_zoo_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if not name.startswith(DIST_INFO)}
    zoo_files = {name.replace("models/", "flaxmpc/zoo/", 1) for name in kept("models")}
    assert names == kept("flaxmpc") | zoo_files
    assert f"flaxmpc/zoo/{zoo.DEFAULT}/model.safetensors" in names
    assert sum(entry.compress_size for entry in wheel.filelist) < 20e6


def test_it_says_what_it_is(metadata, wheel):
    assert (metadata["Name"], metadata["Version"]) == ("flaxmpc", flaxmpc.__version__)
    assert (metadata["Author"], metadata["License-Expression"]) == ("flaxmpc authors", "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# flaxmpc\n")
    assert metadata.get_all("Project-URL")
    scripts = wheel.read(f"{DIST_INFO}entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "flaxmpc", "=", "flaxmpc.__main__:main"]


def test_the_pythons_it_names_are_those_it_allows(metadata):
    allowed = SpecifierSet(metadata["Requires-Python"])
    named = {match[1] for line in metadata.get_all("Classifier") if (match := re.search(r":: (3\.\d+)$", line))}
    assert named == {f"3.{minor}" for minor in range(7, 20) if f"3.{minor}" in allowed} == {"3.10", "3.11"}


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_the_locked_versions_are_among_those_it_allows(metadata, python):
    """So what is tested here is what pip may choose."""
    environment = {"python_version": python, "python_full_version": f"{python}.7", "extra": ""}
    text = (ROOT / "requirements" / "stable.txt").read_text()
    lines = [line.removesuffix(" \\") for line in text.splitlines() if line[:1] not in ("", " ", "#")]  # not the hashes
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate(environment)]
    locked = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    needed = [need for need in needed if need.marker is None or need.marker.evaluate(environment)]
    assert len(needed) >= 19
    for need in needed:
        assert need.specifier.contains(locked[need.name]), f"{need} and {locked[need.name]}"


def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build(SdistBuilder, ROOT, tmp_path)) as source:
        source.extractall(tmp_path / "source", filter="data")
    (root,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(build(WheelBuilder, root, tmp_path)) as again:
        assert {entry.filename: entry.CRC for entry in again.filelist} == {
            entry.filename: entry.CRC for entry in wheel.filelist
        }
