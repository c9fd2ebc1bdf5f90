"""The examples of the documentation run as they stand, and each ends with a picture."""

import ast
from pathlib import Path

import pytest
from matplotlib.figure import Figure

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"
NEEDED = {
    "2_lightning": ["lightning"],
    "3_trainer": ["transformers"],
    "7_train_with": ["accelerate", "lightning", "transformers"],
}
"""Libraries of the extra `examples`."""


@pytest.mark.filterwarnings("default")  # the libraries' own
@pytest.mark.parametrize("script", sorted(GALLERY.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_ends_with_a_picture(script, tmp_path, monkeypatch):
    for library in NEEDED.get(script.stem, []):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    *body, last = ast.parse(script.read_text(encoding="utf-8")).body
    assert isinstance(last, ast.Expr)
    namespace = {"__name__": "__example__"}
    exec(compile(ast.Module(body, []), str(script), "exec"), namespace)
    shown = eval(compile(ast.Expression(last.value), str(script), "eval"), namespace)
    assert isinstance(shown, Figure) or "data:image/svg+xml" in shown._repr_html_()


def test_the_libraries_of_the_examples_are_named():
    for stem, libraries in NEEDED.items():
        text = (GALLERY / f"{stem}.py").read_text(encoding="utf-8")
        assert all(f"import {library}" in text or f"from {library} import" in text for library in libraries)
