"""What is done before the command line runs."""

import os

import pytest

from jlayer import __main__ as program
from jlayer.app import cli
from jlayer.interrupts import release

LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@pytest.mark.parametrize(("given", "found"), [(None, "2"), ("0", "0")])
def test_warnings_of_xla_are_shown_if_somebody_asks_for_them(monkeypatch, given, found):
    monkeypatch.setenv(LEVEL, given or "")
    if given is None:
        monkeypatch.delenv(LEVEL)
    monkeypatch.setattr(cli, "main", lambda: 0)
    try:
        assert program.run() == 0
    finally:
        release()
    assert os.environ[LEVEL] == found
