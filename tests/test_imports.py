"""The rules of the code base: imports only point down, ``import fastfg`` is fast, files and functions are short."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastfg

ROOT = Path(fastfg.__file__).parent
HEAVY = (
    "triton",
    "timm",
    "transformers",
    "torchvision",
    "matplotlib",
    "pandas",
    "pyarrow",
    "scipy",
    "rich",
    "PIL",
    "onnx",
    "ray",
)

# {folder or file: what it may import from fastfg, besides its own files}. Lower ones import less.
ALLOWED = {
    "types": set(),
    "targets": set(),
    "reference": set(),
    "files": set(),
    "torch_internals": set(),
    "ops": {"reference", "torch_internals"},
    "models": {"files", "targets", "torch_internals"},
    "sae": {"files", "ops", "reference", "types"},
    "checks": {"models", "sae", "targets", "types"},
    "data": {"files"},
    "attribution": {"checks", "models", "ops", "perturb", "reference", "sae", "targets", "torch_internals", "types"},
    "perturb": {"models", "targets", "torch_internals"},
    "metrics": {"checks", "models", "perturb", "targets", "types"},
    "report": {"files", "metrics", "types"},
    "study": {
        "attribution",
        "checks",
        "data",
        "files",
        "metrics",
        "models",
        "perturb",
        "report",
        "sae",
        "targets",
        "types",
    },
    "__main__": {"cli"},
    "ray": {"attribution", "data", "metrics", "models", "sae", "targets", "types"},
    "cli": {
        "attribution",
        "data",
        "files",
        "metrics",
        "models",
        "ops",
        "perturb",
        "report",
        "sae",
        "study",
        "targets",
        "types",
    },
}


def imports(file):
    """The parts of fastfg that a file imports, and the other packages that it imports at its top level."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside, outside = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "fastfg" else [f"fastfg.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("fastfg."):
                inside.add(name.split(".")[1])
            elif node in tree.body:
                outside.add(name.split(".")[0])
    return inside, outside


def rooms():
    for path in sorted(ROOT.iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            yield path.name, sorted(path.rglob("*.py"))
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield path.stem, [path]


@pytest.mark.parametrize(("room", "files"), list(rooms()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_down(room, files):
    for file in files:
        inside, outside = imports(file)
        beyond = inside - ALLOWED[room] - {room} - {"__version__"}
        assert not beyond, f"{file} imports {beyond}"
        if room == "reference":
            assert outside <= {"torch", "__future__", "collections", "dataclasses", "typing"}


def test_reference_and_perturb_know_no_model_library():
    for room, files in rooms():
        if room in ("reference", "perturb", "metrics"):
            for file in files:
                assert not imports(file)[1] & {"timm", "transformers", "torchvision", "open_clip"}


@pytest.mark.parametrize(
    "statement", ["import fastfg", "import fastfg; fastfg.Gate; fastfg.attribute; fastfg.evaluate; fastfg.load_saes"]
)
def test_importing_loads_nothing_heavy(statement):
    code = f"import sys; {statement}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    import torch

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    by_torch = subprocess.run(
        [sys.executable, "-c", code.replace(statement, "import torch")], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch.__name__ in by_torch
    assert not (set(loaded) - set(by_torch)) & set(HEAVY)


def test_import_fastfg_alone_does_not_even_load_torch():
    code = "import sys, fastfg; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_every_public_name_is_there():
    for name in fastfg.__all__:
        assert getattr(fastfg, name) is not None
    for module in ("attribution.attribute", "metrics.evaluate"):  # a module must not take the function's place
        importlib.import_module(f"fastfg.{module}")
    assert callable(fastfg.attribute)
    assert callable(fastfg.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'atribute'"):
        _ = fastfg.atribute


def test_files_and_functions_are_short():
    for _, files in rooms():
        for file in files:
            text = file.read_text(encoding="utf-8")
            assert len(text.splitlines()) < 400, file
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    body = node.body[1:] if ast.get_docstring(node) else node.body
                    lines = (node.end_lineno or 0) - (body[0].lineno if body else node.lineno) + 1
                    assert lines < 60, f"{file}: {node.name} has {lines} lines"
