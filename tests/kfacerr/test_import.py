"""What imports what: no heavy package before it is needed, and no module from a line below its own."""

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kfacerr

ROOT = Path(kfacerr.__file__).parent.parent
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
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {kfacerr.__version__}\n" in citation


# ---------------------------------------------------------------------------------------------------- order


def sources() -> dict[str, Path]:
    """Every module of the repository but the packages' own files, which import what they export."""
    paths = [path for package in ("kfacerr", "figures", "studies") for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths if p.stem != "__init__"}


def imported(name: str, modules: dict[str, Path]) -> Iterator[str]:
    """The repository's modules that this one imports, within functions too; for its annotations does not count."""
    tree = ast.parse(modules[name].read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from {source, *(f"{source}.{alias.name}" for alias in node.names)} & set(modules)
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & set(modules)


def test_modules_import_from_their_own_line_of_contributing_and_those_above_it_and_in_no_circle():
    lines = re.findall(
        r"^\d+\. (.*?)(?::|$)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    place = {name: i for i, line in enumerate(lines) for name in re.findall(r"`([\w.]+)`", line)}

    def line_of(module: str) -> int:
        package, _, own = module.partition(".")
        if package != "kfacerr":
            return place[package]
        return place["kfacerr.torch"] if own.startswith("torch.") else place[own]

    modules = sources()
    graph = {name: set(imported(name, modules)) - {name} for name in modules}
    assert len(graph["kfacerr.study"]) > 3, "imports are found"
    assert not {(one, other) for one in graph for other in graph[one] if line_of(other) > line_of(one)}
    TopologicalSorter(graph).prepare()  # raises where there is a circle
