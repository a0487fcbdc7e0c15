"""The layout: the method files import only torch, einops and each other, and imports between rooms point downwards.

And the least versions of what is imported.
"""

import ast
import re
import sys

import pytest
from conftest import ROOT

# From the top down; a room may import from itself and from those below. The first of each may import the rest.
ROOMS = ["study", "report", "metrics", "runs", "data", "machine"]
FIVE = ["unlearning", "losses", "sampling", "unet", "schedule"]
FILES = sorted(ROOT.glob("minisiss/**/*.py"))


def imports(path):
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"minisiss.{alias.name}" for alias in node.names] if node.module == "minisiss" else [node.module]
            yield from inner


@pytest.mark.parametrize("place, name", list(enumerate(FIVE)))
def test_a_method_file_imports_only_torch_einops_and_those_below_it(place, name):
    below = {f"minisiss.{other}" for other in FIVE[place + 1 :]}
    for module in imports(ROOT / f"minisiss/{name}.py"):
        top = module.split(".")[0]
        assert module in below or top in ("torch", "einops") or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ROOMS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_room_imports_only_from_itself_and_from_those_below(path):
    allowed = {*ROOMS[ROOMS.index(path.parent.name) :], *FIVE, "errors", "presets"}
    for module in imports(path):
        package, *rest = module.split(".")
        assert package != "minisiss" or rest[0] in allowed, module


def test_the_least_versions_that_are_declared_are_those_of_the_file_to_try_them():
    dependencies = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies")[1]
    pinned = re.findall(r"^(\w+)==(.+)$", (ROOT / "tests/minimum.txt").read_text(), re.MULTILINE)
    assert dict(re.findall(r'"(\w+)>=(.+?)"', dependencies)) == {name: version.removesuffix(".0") for name, version in pinned}
