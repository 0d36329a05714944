"""README and the pages of docs/: every command and snippet in them is run, as it stands, on a small model.

Pages that are notebooks are executed by `make docs`, and their commands with them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flaxmpc.cli import main as cli
from flaxmpc.nn.normalization import Chebyshev

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LEFT_OUT = {DOCS / "zoo", DOCS / "_build", DOCS / "upstream"}  # generated; for SPU's authors
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
    if not LEFT_OUT & set(path.parents)
}
BLOCKS = re.compile(r"^```(bash|python)\n(.*?)^```$", re.M | re.S)
WITH_BLOCKS = [name for name, text in PAGES.items() if BLOCKS.search(text)]

# Commands that need other hosts, or a hub: that they exist, with these options, is tested here, what they do elsewhere.
LEFT_TO_THE_READER = re.compile(r"^flaxmpc .*(?: \.\.\. |OWNER/NAME).*$", re.MULTILINE)

SHIPPED = "movie-minilm-l6-2quad-freediv"
# What is added to a command, so that it takes seconds.
SHORT = {
    "finetune": "--schedule.epochs 1 --schedule.batch-size 64 --max-length 16",
    "convert": "--stage1.epochs 1 --stage2.epochs 1 --ref2k-sentences 2 --aby3-sentences 1 --max-length 16",
    "check": "--sentences 4",
    "plan": "--sentences 4",
    "put": "--lengths 16",
}
# A model that a plan can be made for.
PLANNED = {"layer_norm": Chebyshev(low=0.2, high=40.0, depth=5), "intermediate_size": 128}


def test_readme_is_of_one_screen_and_a_table():
    assert len(PAGES["README.md"].splitlines()) <= 120


def _command(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def stock(tmp_path_factory, write_classifier) -> Path:
    """A folder that has what the pages name, and the commands that they call."""
    folder = tmp_path_factory.mktemp("stock")

    def classifier(name: str, **changes) -> Path:
        size = {"num_hidden_layers": 1, "max_position_embeddings": 64}
        made = write_classifier(tmp_path_factory.mktemp("made"), **size, **changes)
        (folder / name).parent.mkdir(exist_ok=True)
        return Path(shutil.move(made, folder / name))

    classifier("FOLDER", attention="softmax", hidden_act="gelu")
    (classifier(f"zoo/{SHIPPED}") / "README.md").write_text("# A card\n")
    classifier("PAIRS", num_texts=2)
    classifier("student", **PLANNED)
    moods = {"good": 1, "gripping": 1, "bad": 0, "tedious": 0}
    nouns, words = ("film", "movie", "mess"), ("a", "very", "beautifully", "acted", "lifeless")
    rows = [f"the {noun} {word} {mood},{label}" for mood, label in moods.items() for noun in nouns for word in words]
    (folder / "DATA").mkdir()
    for name, some in (("reviews.csv", rows[:3]), ("DATA/train.csv", rows)):
        (folder / name).write_text("\n".join(["sentence,label", *some, ""]))
    tools = folder / "bin"
    tools.mkdir()
    cases = [f'{name}) set -- "$@" {options} ;;' for name, options in SHORT.items()]
    _command(tools / "flaxmpc", 'case "$1" in', *cases, "esac", f'exec {sys.executable} -m flaxmpc "$@"')
    # The encoder that a page asks for is there; a small one is taken in its place.
    small = f'case "$*" in *minilm_l6*) {sys.executable} "$@" >/dev/null && echo FOLDER; exit ;; esac'
    _command(tools / "python", small, f'exec {sys.executable} "$@"')
    _command(tools / "make", f'exec {shutil.which("make")} --dry-run -C {ROOT} "$@" >/dev/null')
    _command(tools / "pip", '[ "$*" = "install flaxmpc[cuda]" ]')
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    return folder


@pytest.fixture
def place(stock, tmp_path, monkeypatch) -> Path:
    """A copy of it, where a page's commands run."""
    folder = shutil.copytree(stock, tmp_path / "place")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FLAXMPC_ZOO", str(folder / "zoo"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(folder)
    return folder


def _blocks(name: str) -> list[tuple[str, str]]:
    """What a page shows; of README, what no other page shows too."""
    others = "".join(PAGES[page] for page in PAGES if page != name) if name == "README.md" else ""
    return [(kind, block) for kind, block in BLOCKS.findall(PAGES[name]) if block not in others]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_what_a_page_shows_runs(name, place):
    for made in ("teacher", "student"):
        if f"--out {made}" in PAGES[name]:
            shutil.rmtree(place / made, ignore_errors=True)
    script = []  # what needs a shell, in one
    session = ""  # Python, as in one session: with what came before
    for number, (kind, block) in enumerate(_blocks(name)):
        if kind == "python":
            session += block
            (place / f"session{number}.py").write_text(session)
            script.append(f"python session{number}.py")
            continue
        block = LEFT_TO_THE_READER.sub("", block)
        commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]
        if script or re.search("[$&|]", block) or any(command[0] != "flaxmpc" for command in commands):
            script.append(block)
            continue
        for _, command, *options in commands:  # a process for each would take longer to start than to run
            cli.main([command, *options, *SHORT.get(command, "").split()])
    if script:
        start = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
        done = subprocess.run(["bash", "-c", "\n".join(start + script)], text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr


def _commands() -> set[str]:
    """All commands that the pages name within a line, or leave parts out of."""
    found = set()
    for text in PAGES.values():
        found |= {re.sub(r"\s+", " ", each) for each in re.findall(r"`(flaxmpc [a-z][^`]*)`", text)}
        found |= {line.partition(" #")[0].strip() for line in LEFT_TO_THE_READER.findall(text)}
    return found


@pytest.mark.parametrize("command", sorted(_commands()))
def test_a_command_that_a_page_names_exists(command, capsys):
    """With its options: what is in capitals is left to the reader."""
    words = shlex.split(command)[1:]
    depth = 2 if words[0] in ("cluster", "zoo") else 1
    if "COMMAND" in words:
        return
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words[:depth], "--help"])
    told = capsys.readouterr().out
    for option in words[depth:]:
        if option.startswith("--"):
            assert re.search(rf"{re.escape(option)}\b", told), f"{command}: {option} is none of its options"


def test_a_script_or_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    for name, text in PAGES.items():
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert target in targets, f"{name}: make {target}"
        for script in re.findall(r"(?:python |`)((?:benchmarks|train)/\w+\.py)", text):
            assert (ROOT / script).is_file(), f"{name}: {script}"


def test_a_message_that_a_page_explains_is_one_of_the_librarys():
    library = " ".join(path.read_text("utf-8") for path in sorted((ROOT / "flaxmpc").rglob("*.py")))
    library += (ROOT / "Makefile").read_text("utf-8")
    said = re.sub(r'"\s*f?"', "", re.sub(r"\{[^{}]*\}", "...", library))
    explained = re.findall(r"^\| `([^`]+)`", PAGES["docs/guides/troubleshooting.md"], flags=re.M)
    assert len(explained) > 10
    for message in explained:
        for part in message.split("..."):
            assert part.strip() in said, message
