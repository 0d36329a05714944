"""The documentation site: `make docs` builds it in docs/_build/html, from these pages and the docstrings."""

import multiprocessing
import os
import re
import sys
from pathlib import Path

from jupyter_cache import get_cache  # pyright: ignore[reportMissingImports]
from jupyter_cache.executors import load_executor  # pyright: ignore[reportMissingImports]

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}

# Kernels would each warn that their sockets, on loopback, are TCP.
_PROFILE = DOCS / "_build" / "ipython" / "profile_default"
_PROFILE.mkdir(parents=True, exist_ok=True)
(_PROFILE / "ipython_kernel_config.py").write_text('c.IPKernelApp.log_level = "ERROR"\n', "utf-8")
os.environ["IPYTHONDIR"] = str(_PROFILE.parent)

import flaxmpc  # noqa: E402
from flaxmpc.models import zoo  # noqa: E402
from flaxmpc.models.folder import read_config  # noqa: E402
from flaxmpc.training import metrics  # noqa: E402

project = "flaxmpc"
author = "the flaxmpc authors"
version = release = flaxmpc.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "upstream"]

# Notebooks are pages in Markdown, executed at every build: one that fails ends it.
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / "executed")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "substitution"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"
napoleon_use_ivar = True
napoleon_attr_annotations = False
# Letters that are shapes of arrays, such as "batch head", look like references.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = "flaxmpc"
html_show_copyright = False
html_static_path = ["_static"]
html_theme_options = {
    "source_repository": "",
    "navigation_with_keys": True,
}

# The notebooks, for two processes.
LONGEST_FIRST = ("convert", "own-attention", "cost-table", "hosts", "classify")

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:", "Example:")


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: what else reStructuredText would read in them is escaped, and an indented
    formula is shown as it stands.
    """
    formula = in_section = False
    out = []
    for number, line in enumerate(lines):
        in_section |= line.strip() in SECTIONS
        indented = line.startswith("    ") and not in_section
        if indented and not formula and (number == 0 or not lines[number - 1].strip()):
            out += ["::", ""]
            formula = True
        elif line.strip() and not indented:
            formula = False
        if formula:
            out.append(line)
        else:
            pieces = re.split(r"(`[^`]*`)", line)
            pieces[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", piece) for piece in pieces[::2]]
            pieces[2::2] = [f"\\ {piece}" if piece[:1].isalnum() else piece for piece in pieces[2::2]]
            out.append("".join(pieces))
    lines[:] = out


def skipped(app, what, name, obj, skip, options) -> bool | None:
    """`setup` of a Linen module is flax's, not ours."""
    return True if name == "setup" else None


def gallery(app) -> None:
    """Writes a page for each card of the zoo, and a tile that leads to it."""
    pages = DOCS / "zoo"
    pages.mkdir(exist_ok=True)
    tiles = []
    for folder in sorted(path.parent for path in (DOCS.parent / "models").glob("*/README.md")):
        name, config, figures = folder.name, read_config(folder), zoo.results(folder)
        card = (folder / "README.md").read_text("utf-8")
        (pages / f"{name}.md").write_text(re.sub(r"\(\.\./([\w-]+)/README\.md\)", r"(\1.md)", card), "utf-8")
        parts = f"`{config.attention_of(0).name}`, `{config.hidden_act_of(0).name}`, {config.num_hidden_layers} layers"
        metric = metrics.headline(figures)
        assert metric is not None, f"{name} has no figures"
        value = f"{100 * figures[metric]:.1f} % {metric.replace('_', ' ')}"
        ships = "weights ship" if (folder / "model.safetensors").is_file() else "by recipe"
        tiles.append(
            f"::::{{grid-item-card}} {name}\n:link: zoo/{name}\n:link-type: doc\n{parts}\n\n{value}; {ships}\n::::"
        )
    (pages / "tiles.txt").write_text(":::::{grid} 1 1 2 2\n:gutter: 2\n\n" + "\n\n".join(tiles) + "\n:::::\n", "utf-8")


def executed(app) -> None:
    """Executes the notebooks side by side. The build, which would take one after the other, finds them in its cache; it
    executes again what failed here, and fails then.
    """
    cache = get_cache(app.config.nb_execution_cache_path)
    for name in LONGEST_FIRST:
        page = DOCS / "tutorials" / f"{name}.md"
        cache.add_nb_to_project(str(page), read_data={"name": "myst_nb_md", "type": "plugin"})
    load_executor("local-parallel", cache, logger=multiprocessing.get_logger()).run_and_cache(
        timeout=app.config.nb_execution_timeout
    )


def setup(app) -> None:
    app.connect("builder-inited", gallery)
    app.connect("builder-inited", executed)
    app.connect("autodoc-skip-member", skipped)
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon's, at 500
