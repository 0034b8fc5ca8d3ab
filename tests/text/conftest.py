import json
from datetime import datetime

import pytest

from jlayer.text import sandbox
from tests.text.samples import LARGE, SMALL, bundled, load


@pytest.fixture(params=[*LARGE, *SMALL])
def tokenizer(request):
    return load(request.param)


@pytest.fixture
def llama2():
    return load("llama2")


@pytest.fixture
def llama3():
    return load("llama3")


@pytest.fixture
def fable():
    return bundled()


@pytest.fixture
def here(monkeypatch):
    """Templates run in this process: the same code, without the start of another."""

    def render(template, variants, marks):
        now = datetime(2024, 2, 29, 12).isoformat()
        payload = {"template": template, "variants": variants, "marks": marks, "now": now}
        found = sandbox.render_variants(json.loads(json.dumps(payload)), limit=1 << 20)
        return sandbox.read_answer(found)

    monkeypatch.setattr(sandbox, "render", render)
