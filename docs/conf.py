"""The documentation site: `make docs` builds it in docs/_build/html, from these pages and the docstrings."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}

import flaxmpc  # noqa: E402

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
html_static_path = ["_static"]
html_theme_options = {
    "source_repository": "",
    "navigation_with_keys": True,
}

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


def setup(app) -> None:
    app.connect("autodoc-skip-member", skipped)
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon's, at 500
