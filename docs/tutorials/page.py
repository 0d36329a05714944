"""What the tutorials share: a quiet process, a `%%bash` that fails the build, and figures for light and dark pages."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich
from IPython.core.magic import register_cell_magic  # pyright: ignore[reportMissingImports]
from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]
from matplotlib import style as mplstyle

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(_BENCHMARKS))

import style  # noqa: E402

_COLUMNS = 84  # as many letters as a page shows in a row
# JAX looks for no accelerator, so it has nothing to say about one that it can't use.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["COLUMNS"] = str(_COLUMNS)
# A kernel has it set, and commands would draw on the page as on a terminal.
os.environ.pop("FORCE_COLOR", None)
# `flaxmpc` of the environment that runs the page.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Text, as on a terminal; else rich wants ipywidgets, for bars that no page shows. So does tqdm, when it is imported.
rich.reconfigure(force_jupyter=False, width=_COLUMNS)
warnings.filterwarnings("ignore", "IProgress not found")

_STARTED = time.perf_counter()
_WIDTH = 5.4  # inches: on a phone text in it can still be read
_BLACK = "#000000"
_IN_BLACK = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor")

colour = style.colour


@register_cell_magic
def bash(line: str, cell: str) -> None:
    """Runs a cell as one script, and shows what it printed in one piece.

    RuntimeError: a command of it failed, in a pipe too. IPython's own asks for the last one alone.
    """
    script = f"set -euo pipefail\n{cell}"
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}")


def took() -> None:
    """Prints the page's seconds so far."""
    print(f"This page took {time.perf_counter() - _STARTED:.0f} s when this site was built, on {os.cpu_count()} cores.")


@contextlib.contextmanager
def figure(rows: int, *, height: float, alt: str, **shared: bool) -> Iterator[list[Any]]:
    """A figure of panels below one another, shown at the end of the block.

    Args:
        rows: how many panels; the block gets their axes.
        height: inches.
        alt: what the figure shows, for who can't see it.
        **shared: sharex, sharey.
    """
    with mplstyle.context([_BENCHMARKS / "flaxmpc.mplstyle", dict.fromkeys(_IN_BLACK, _BLACK)]):
        made, axes = style.figure(rows, 1, figsize=(_WIDTH, height), **shared)
        yield [row[0] for row in axes]
        written = io.StringIO()
        made.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    # In the page, not a file beside it: so black is the colour of the page's text. SVG leaves out what is black.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(_BLACK, "currentColor")
    start = f'<svg role="img" aria-label="{alt}" fill="currentColor" style="max-width: 100%; height: auto" '
    display(HTML(svg.replace("<svg ", start, 1)))
