"""Imports point one way: commands -> science -> stagewise -> libraries."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

# train, which runs them all, also evaluates
SCIENCE = ("growth", "policies", "schedule", "cost", "memory", "model")
COMMANDS = (
    "train",
    "forecast",
    "fineweb",
    "hellaswag",
    "plot",
    "sample",
    "export",
    "study",
    "frontier",
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(p): p for p in (*ROOT.glob("*.py"), *(ROOT / "stagewise").rglob("*.py"))}
PLUMBING = tuple(name for name in PATHS if name.split(".")[0] == "stagewise")


def imports(name: str, source: str) -> set[str]:
    """Return the modules that module `name` imports anywhere in its source.

    Modules of the repository by their full name, libraries by the name of their package.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & PATHS.keys()
            found |= submodules or {base}
    return {n if n in PATHS else n.split(".")[0] for n in found}


IMPORTS = {name: imports(name, path.read_text()) for name, path in PATHS.items()}


def reachable(name: str) -> set[str]:
    """Return what importing a module of the repository imports, directly or not."""
    reached, new = set(), {name}
    while new:
        reached |= new
        new = {n for module in new for n in IMPORTS.get(module, ())} - reached
    return reached - {name}


def test_every_form_of_import_is_found():
    source = """
import os.path, schedule
import stagewise.loss as loss
from stagewise import data, hf
from stagewise.errors import UserError
def f():
    from . import metrics
    from .monitor import SPIKE
    import matplotlib.pyplot as plt
"""
    of_stagewise = {"loss", "data", "hf", "errors", "metrics", "monitor"}
    expected = {"os", "schedule", "matplotlib"} | {f"stagewise.{m}" for m in of_stagewise}
    assert imports("stagewise.x", source) == expected
    assert set(COMMANDS) | set(SCIENCE) <= PATHS.keys() and "stagewise.checkpoint" in PLUMBING
    assert "torch" in reachable("train") and "stagewise.seeding" in reachable("train")


@pytest.mark.parametrize("name", PLUMBING)
def test_stagewise_imports_nothing_from_the_root(name):
    assert not reachable(name) & (PATHS.keys() - set(PLUMBING))


@pytest.mark.parametrize(
    "name, forbidden",
    [
        ("growth", {"torch", "model", "schedule", "cost"}),
        ("schedule", {"torch", "model", "cost"}),
        ("cost", {"torch", "model"}),
        ("memory", {"torch", "model"}),
        (
            "model",
            {"schedule", "cost", "stagewise.checkpoint", "stagewise.hf", "stagewise.config"},
        ),
        *((name, set(COMMANDS)) for name in SCIENCE),
        *((name, {"benchmarks", "tests", "conftest"}) for name in PATHS),
    ],
)
def test_a_module_does_not_depend_on_what_uses_it(name, forbidden):
    assert not reachable(name) & forbidden


def test_there_are_no_import_cycles():
    graph = {name: IMPORTS[name] & PATHS.keys() for name in PATHS}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_training_does_not_import_slow_libraries():
    """Each takes seconds, in every process of a run, or is optional."""
    slow = {"datasets", "matplotlib", "transformers", "pandas", "sklearn"}
    slow |= {"wandb", "tensorboard", "plotly"}
    program = "import sys, train; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "torch" in loaded and not loaded & slow
