"""What importing the package loads, and what it does not: torch and CuPy never, tables and figures when needed."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kfacerr

HEAVY = ("torch", "cupy", "pandas", "matplotlib", "h5py")


def loaded(code: str, packages: tuple[str, ...]) -> set[str]:
    """Those of the packages that a new interpreter has loaded after `code`."""
    lines = ["import sys", code, f"print(*({set(packages)!r} & set(sys.modules)), file=sys.stderr)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_importing_kfacerr_and_its_modules_imports_neither_torch_nor_cupy():
    modules = [m.name for m in pkgutil.iter_modules(kfacerr.__path__) if m.name != "torch"]
    assert "study" in modules
    code = "\n".join(["import importlib", *(f"importlib.import_module('kfacerr.{name}')" for name in modules)])
    assert loaded(code, ("torch", "cupy", "matplotlib")) == {"matplotlib"}, "what is loaded is seen"


@pytest.mark.parametrize("code", ["import kfacerr", "import kfacerr.command", "import kfacerr.cli"])
def test_importing_kfacerr_and_its_command_line_loads_neither_tables_nor_figures_nor_files(code):
    assert loaded(code, HEAVY) == set()


def test_a_command_loads_what_it_needs(tmp_path):
    code = f"from kfacerr.cli import main; main(['info', {str(tmp_path / 'none.h5')!r}])"
    assert loaded(f"sys.stderr = sys.stdout; {code}; sys.stderr = sys.__stderr__", HEAVY) == {"h5py"}


def test_the_version_is_that_of_the_citation():
    citation = (Path(kfacerr.__file__).parent.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {kfacerr.__version__}\n" in citation
