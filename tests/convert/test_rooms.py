"""The rooms of the converter: each imports only from itself and from those before it."""

import ast

import pytest

from tests.conftest import REPOSITORY

ROOMS = ("progress", "sources", "transform", "target", "verify", "job", "pruning", "export")
# They name what is public, and what starts: no room of their own.
ENTRIES = ("__init__", "__main__")
FILES = {
    path.relative_to(REPOSITORY / "convert").as_posix(): path
    for path in sorted((REPOSITORY / "convert").rglob("*.py"))
    if path.stem not in ENTRIES
}


def room(name):
    return name.removesuffix(".py").split("/")[0]


@pytest.mark.parametrize("name", FILES)
def test_a_room_of_the_converter_imports_only_from_those_before_it(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("jlayer.convert."):
            continue
        there = node.module.split(".")[2]
        assert ROOMS.index(there) <= ROOMS.index(room(name)), f"{name} imports {node.module}"
