"""Sphinx settings: MyST pages, and the API reference from docstrings, which are written in Markdown's manner."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst, matplotlib_scraper

from kfacerr import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
release = __version__
author = PROJECT["authors"][0]["name"]
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sourcelink = False

# MathJax comes with the site, for readers without a network: one script, which holds its fonts as outlines.
MATHJAX = Path(str(files("mathjax"))) / "static/mathjax/es5/tex-svg-full.js"
html_static_path = [str(MATHJAX)]
mathjax_path = MATHJAX.name

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
smartquotes_action = "D"  # only the dashes that Sphinx itself writes as --
python_maximum_signature_line_length = 100


# --------------------------------------------------------------------------------------------- the examples


def figures(block: Any, variables: dict[str, Any], conf: Any, **options: Any) -> str:
    """A scraper for sphinx-gallery: pyplot's figures, or the one of a block's last line that pyplot knows not."""
    shown = variables["example_globals"].get("___")
    if not isinstance(shown, Figure) or shown.canvas.manager is not None:
        return str(matplotlib_scraper(block, variables, conf, **options))
    path = next(variables["image_path_iterator"])
    shown.savefig(path, dpi=150)
    return str(figure_rst([path], conf["src_dir"]))


sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": (figures,),
    "default_thumb_file": str(ROOT / "docs/images/tutorial.png"),
    "ignore_repr_types": r"matplotlib\.figure",
    "only_warn_on_example_error": False,
    "abort_on_example_error": True,
    "write_computation_times": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
}
suppress_warnings = ["config.cache"]  # of the scraper, a function
exclude_patterns = ["gallery"]  # what sphinx-gallery makes pages of, in examples/


# ------------------------------------------------------------------------------- docstrings to reStructuredText

_PLAIN = re.compile(r"(`[^`]+`|\*\*[^*\s](?:[^*\n]*[^*\s])?\*\*)")
_LIST = re.compile(r"(\s*(?:[-+*] )?)(.*)", re.DOTALL)


def _escaped(line: str) -> str:
    """A line whose `code` and **bold** stay as they are, while |norms|, stars and a trailing _ mean nothing."""
    start, rest = _LIST.match(line).groups()  # type: ignore[union-attr]
    parts = _PLAIN.split(rest)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*|`])|(?<=\w)_(?!\w)", lambda m: "\\" + m.group(), parts[i])
        parts[i] = re.sub(r"(?<![\w-])--[a-z][a-z-]*", lambda m: f"`{m.group()}`", parts[i])  # --options
    for i in range(1, len(parts), 2):
        if parts[i][0] == "`":
            parts[i] = parts[i].replace("\\", "\\\\")
        if re.match(r"\w", parts[i + 1]):  # "`Psd`s"
            parts[i] += "\\ "
    rest = "".join(parts)
    if re.match(r"\(?[\w#]+[.)](\s|$)|-\w|[-+]\s", rest):  # "(12) if", "-tau P": no list of any kind
        rest = "\\" + rest
    return start + rest


def _table(rows: list[str]) -> list[str]:
    """A Markdown table as a list-table."""
    indent = rows[0][: len(rows[0]) - len(rows[0].lstrip())]
    out = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for row in rows:
        if set(row.strip()) <= set("|-: "):
            continue
        for i, cell in enumerate(row.strip().strip("|").split(" | ")):
            out.append(f"{indent}   {'*' if i == 0 else ' '} - {_escaped(cell.strip())}")
    return [*out, ""]


def as_rst(lines: list[str]) -> list[str]:
    """Paragraphs escaped, indented blocks and doctests literal, tables tables; sections are left to napoleon."""
    out: list[str] = []
    above, blank, literal = 0, True, -1  # indent of the paragraph above; of the text that a literal block is under
    i = 0
    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            out.append(line)
            blank = True
            i += 1
            continue
        if literal >= 0 and indent > literal:
            out.append(line)
            i += 1
            continue
        literal = -1
        if line.lstrip().startswith("| ") and line.rstrip().endswith(" |"):
            end = next((j for j in range(i, len(lines)) if not lines[j].lstrip().startswith("|")), len(lines))
            out += _table(lines[i:end])
            i, blank = end, True
            continue
        if line.lstrip().startswith(">>> "):
            end = next((j for j in range(i, len(lines)) if not lines[j].strip()), len(lines))
            out += lines[i:end]
            i, blank = end, False
            continue
        in_item = bool(out) and re.match(r"\s*[-*] ", next((x for x in reversed(out) if x.strip()), ""))
        if blank and indent > above and out and not in_item:
            out += [" " * above + "::", "", line]
            literal = above
        else:
            out.append(_escaped(line))
            above = indent
        blank = False
        i += 1
    return out


COLON = "\ue000"  # stands for a colon that napoleon is not to see


def _before_napoleon(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)  # what stands before one would be taken for a type


def _after_napoleon(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def _skip(app: Any, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """A NamedTuple's fields are described in its docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _add_modules(app: Any, docname: str, source: list[str]) -> None:
    """The page of the studies takes whatever modules there are."""
    if docname != "api/studies":
        return
    for path in sorted([*ROOT.glob("studies/*.py"), *ROOT.glob("figures/*.py")]):
        if not path.stem.startswith("_"):
            module = f"{path.parent.name}.{path.stem}"
            source[0] += f"\n## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("autodoc-skip-member", _skip)
    app.connect("source-read", _add_modules)
