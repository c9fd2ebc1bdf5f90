"""The core runs without torch and CuPy, and does not load them."""

import pkgutil
import subprocess
import sys

import kfacerr


def test_importing_kfacerr_and_its_modules_imports_neither_torch_nor_cupy():
    modules = [m.name for m in pkgutil.iter_modules(kfacerr.__path__) if m.name != "torch"]
    assert "study" in modules
    lines = ["import importlib, sys", "import kfacerr"]
    lines += [f"importlib.import_module('kfacerr.{name}')" for name in modules]
    lines += ["print(sorted({'torch', 'cupy'} & set(sys.modules)))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
