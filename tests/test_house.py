"""The layout: what may import what; and the least versions of what is imported."""

import ast
import re
import sys

import pytest
from conftest import ROOT

METHOD_FILES = ["schedule", "losses", "unlearning", "beyond", "sampling", "unet"]


def imports(path):
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", METHOD_FILES)
def test_method_files_import_torch_einops_and_each_other(name):
    allowed = {"torch", "einops", *sys.stdlib_module_names}
    for module in imports(ROOT / f"minisiss/{name}.py"):
        top, *rest = module.split(".")
        assert top in allowed or (top == "minisiss" and rest[0] in METHOD_FILES), module


def test_the_lab_imports_neither_study_nor_scripts():
    for path in ROOT.glob("minisiss/lab/*.py"):
        for module in imports(path):
            top, *rest = module.split(".")
            assert top not in ("train_ddpm", "unlearn", "eval") and rest[:1] != ["study"], path


def test_the_declared_least_versions_are_those_to_try():
    """To try them: pip install -c tests/minimum.txt, see there."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.findall(r'"(\w+)>=([\d.]+)"', project.split("\ndependencies")[1])
    pinned = (ROOT / "tests/minimum.txt").read_text(encoding="utf-8")
    assert sorted(declared) == sorted(re.findall(r"^(\w+)==([\d.]+)\.0$", pinned, re.MULTILINE))


def test_readme_shows_siss_as_it_stands():
    source = (ROOT / "minisiss/losses.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    (siss,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "siss")
    docstring = siss.body[0]
    head = lines[siss.lineno - 1 : docstring.lineno - 1]
    code = [*head, *lines[docstring.end_lineno : siss.end_lineno]]
    assert "\n".join(code) in (ROOT / "README.md").read_text(encoding="utf-8")
