import functools
import json
from datetime import datetime

import pytest

from jlayer.text import jinja, sandbox
from tests.text.samples import LARGE, SMALL, bundled, load

NOW = datetime(2024, 2, 29, 12)
COMPILED = functools.lru_cache(50)(jinja.compile_template)


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
        payload = {"template": template, "variants": variants, "marks": marks}
        payload["now"] = NOW.isoformat()
        found = sandbox.render_variants(json.loads(json.dumps(payload)), limit=1 << 20)
        return sandbox.read_answer(found)

    monkeypatch.setattr(sandbox, "render", render)
    monkeypatch.setattr(jinja, "compile_template", COMPILED)
