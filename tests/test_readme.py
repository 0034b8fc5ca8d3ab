"""README.md and docs/: short, generated where they can be, and true of the code."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

from benchmarks import described, table
from jlayer import errors
from jlayer.engine.report import Stats
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
PAGES = {path: path.read_text() for path in table.PAGES}
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def cells(page, head):
    """The rows of the one table of a page whose first cell of the head is `head`."""
    rows = re.search(rf"^\| {head} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()]


def test_the_generated_parts_are_up_to_date():
    """Run `python benchmarks/table.py` where this is red."""
    new = table.rewritten(PAGES)
    assert [path.name for path in PAGES if new[path] != PAGES[path]] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_ci_runs_the_two_commands_at_the_top_of_the_readme():
    found = re.findall(r"^    (pip install .*)$", README, re.MULTILINE)[:2]
    assert found == ["pip install -e . && jlayer demo", 'pip install -e ".[test]" && pytest']
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    for command in found:
        assert command in lines


def sweep_seconds(*words):
    plan = described.printed(["plan", "llama-3.1-8b-instruct", "--json", *words])
    return json.loads(plan)["sweep"]["seconds"]


def test_the_speeds_that_a_plan_assumes_are_those_of_the_docs():
    text = " ".join((DOCS / "memory.md").read_text().split())
    assert "assumes 2 GB/s for the disk and 25 GB/s for the link," in text
    disk = ["--host-memory", "2GiB"]  # nothing is kept
    assert sweep_seconds(*disk) == sweep_seconds(*disk, "--disk-speed", "2GB/s")
    assert sweep_seconds() == sweep_seconds("--link-speed", "25GB/s")


@pytest.mark.parametrize("n_cores", [1, 2, 64])
def test_the_arithmetic_that_a_plan_assumes_of_a_cpu_is_that_of_the_docs(monkeypatch, n_cores):
    text = " ".join((DOCS / "memory.md").read_text().split())
    assert "7 GB/s of weights for the arithmetic of each core, and 120 GB/s at most" in text
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(n_cores))
    cpu = ["--device", "cpu", "--host-memory", "64GiB"]
    speed = f"{min(7 * n_cores, 120)}GB/s"
    assert sweep_seconds(*cpu) == sweep_seconds(*cpu, "--link-speed", speed)


def test_every_figure_of_a_run_is_described():
    rows = cells((DOCS / "performance.md").read_text(), "field of `stats`")
    named = {name for row in rows for cell in row for name in INLINE.findall(cell)}
    assert set(Stats().as_dict()) == named - {"direct", "buffered"}


def test_every_figure_of_a_plan_s_lanes_is_described():
    plan = json.loads(described.printed(["plan", "llama-3.1-8b-instruct", "--json"]))
    rows = cells((DOCS / "memory.md").read_text(), "field of `lanes`")
    assert list(plan["lanes"]) == [name for row in rows for name in INLINE.findall(row[0])]


def test_every_card_has_a_figure_for_every_disk():
    rows = cells(README, "machine")
    assert len(rows) == len(described.RUNS)
    for row in rows:
        memory, seconds = row[2:4], row[4:]
        assert all(re.fullmatch(r"[\d.]+ GiB", cell) for cell in memory), row
        assert float(seconds[0]) >= float(seconds[1]) > 0, row


def test_every_option_of_every_command_is_described():
    """Held against the text of --help, which the page is not made from."""
    page = (DOCS / "cli.md").read_text()
    names = list(described.commands())
    assert {"demo", "convert", "plan", "generate"} <= set(names)
    for name in [*names, "eval perplexity", "eval compare", "eval harness"]:
        text = described.printed_help(name)
        section = page.split(f"## jlayer {name}\n")[1].split("\n## ")[0]
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text.split("options:")[1]))
        assert options, name
        for option in options - {"--help"}:
            assert f"`{option}`" in section, option


def test_the_map_names_every_file():
    page = (DOCS / "architecture.md").read_text()
    for top in described.CODE:
        for path in (REPOSITORY / top).rglob("*.py"):
            name = path.relative_to(REPOSITORY).as_posix().removesuffix("__init__.py")
            assert f"`{name}`: " in page, name
    for name in re.findall(r"^(?:- )?`((?:jlayer|convert)/[^`]*)`: ", page, re.MULTILINE):
        assert (REPOSITORY / name).exists(), name


def test_the_exit_codes_are_those_of_the_errors():
    rows = {row[0]: row[1] for row in cells((DOCS / "errors.md").read_text(), "code")}
    codes = {"0": "", "1": "", "130": "", "143": ""}
    for kind in vars(errors).values():
        if isinstance(kind, type) and kind.__module__ == errors.__name__ and kind.exit_code != 1:
            name = f"`{kind.__name__}`"
            code = str(kind.exit_code)
            codes[code] = f"{codes[code]}, {name}" if codes.get(code) else name
    assert rows == codes


def test_the_words_of_refusals_stand_in_the_code():
    said = "\n".join(
        node.value
        for top in described.CODE
        for path in (REPOSITORY / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = cells((DOCS / "errors.md").read_text(), "words in the line")
    assert len(rows) > 10
    for row in rows:
        for words in INLINE.findall(row[0]):
            assert words in said, words


def test_links_and_paths_lead_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
        for words in INLINE.findall(text):
            if re.fullmatch(r"(jlayer|convert|tests|benchmarks|configs|docs)/[\w./-]*", words):
                assert (REPOSITORY / words).exists(), f"{path.name}: {words}"


def test_options_in_the_text_exist():
    options = {"--help"}
    for name in [*described.commands(), "eval perplexity", "eval compare", "eval harness"]:
        options |= set(re.findall(r"--[a-z][a-z0-9-]+", described.printed_help(name)))
    for path, text in PAGES.items():
        for words in INLINE.findall(text):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", words):
                assert option in options, f"{path.name}: {words}"
            if words.startswith("jlayer "):
                command = words.split()[1]
                assert command in {*described.commands(), "COMMAND"}, f"{path.name}: {words}"


def test_every_page_of_the_docs_is_linked_from_the_readme():
    for path in Path(DOCS).glob("*.md"):
        assert f"(docs/{path.name})" in README, path.name
