"""The pages about families are true of the code."""

import re

import pytest

from benchmarks import described
from jlayer.families.holders import HOLDERS
from jlayer.families.registry import FAMILIES
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
(DIFF,) = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PARTS = dict(re.findall(r"^--- (\S+)\n((?:[+ ].*\n)+)", DIFF, re.MULTILINE))


def test_a_family_is_less_than_40_lines():
    assert len(DIFF.splitlines()) < 40


@pytest.mark.parametrize("file", PARTS)
def test_the_lines_of_the_family_that_is_shown_stand_in_the_code(file):
    text = (REPOSITORY / file).read_text()
    added = re.findall(r"(?:^\+.*\n)+", PARTS[file], re.MULTILINE)
    assert added
    for lines in added:
        assert re.sub(r"^\+", "", lines, flags=re.MULTILINE) in text


def test_every_type_is_described():
    assert set(described.MODELS) == {*FAMILIES, *HOLDERS}
