"""The page in a real browser, against a server that says what each test tells it to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from jlayer.serving.page import page
from tests.serving.browser import Page, chromium, needs_browser
from tests.serving.page_server import serving

ESCAPE = "\ue00c"
SHIFT_ENTER = "\ue008\ue007\ue000"
MODEL = ".message.assistant"
BEFORE, AFTER = "\u2039", "\u203a"  # what stands on the buttons between versions


class Elements(HTMLParser):
    """Every element with its attributes, and what stands in scripts and styles."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], {"script": [], "style": []}

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] in self.inside and data.strip():
            self.inside[self.found[-1][0]].append(data)


def test_the_policy_lets_only_what_stands_in_the_file_run():
    parser = Elements()
    parser.feed(page.html().decode())
    policy = dict(
        words.split(" ", 1) for words in page.headers()["Content-Security-Policy"].split("; ")
    )
    for tag in ("script", "style"):
        assert [name for name, _ in parser.found].count(tag) == 1
        digest = hashlib.sha256("".join(parser.inside[tag]).encode()).digest()
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert policy["default-src"] == "'self'"
    for name in ("frame-ancestors", "base-uri", "form-action"):
        assert policy[name] == "'none'"


def test_the_file_asks_nobody_else_and_makes_no_markup_of_strings():
    parser = Elements()
    parser.feed(page.html().decode())
    for tag, attributes in parser.found:
        assert tag not in ("link", "img", "iframe", "base", "object")
        assert not {"src", "style", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    (script,) = parser.inside["script"]
    for words in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert words not in script
    assert not re.search(r"url\(|@import", parser.inside["style"][0])


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture
def open_page(driver):
    """Opens the page of a stub; at the end nothing may have been complained of, or asked of
    another host."""
    pages, servers = [], []

    def opened(**options):
        servers.append(serving(**options))
        made = Page(driver, servers[-1].__enter__())
        pages.append(made.size(1280, 800))
        made.media()
        return made.open()

    yield opened
    for made, server in zip(pages, servers, strict=True):
        try:
            assert made.complaints() == []
            assert {
                each for each in made.addresses() if not each.startswith(made.stub.url)
            } == set()
        finally:
            driver.get("about:blank")
            server.__exit__(None, None, None)


@needs_browser
def test_an_answer_from_the_queue_to_the_last_word(open_page):
    page = open_page()
    page.send("How does it fit?")
    asked = page.stub.wait_for_request()
    assert asked.path == "/v1/chat/completions"
    assert asked.body["messages"] == [{"role": "user", "content": "How does it fit?"}]
    assert asked.body["model"] == "made-up-70b"
    assert asked.body["stream_options"] == {"include_usage": True, "jlayer_progress": True}
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab].{3}-.{12}", asked.key)

    # 199 sweeps of 2.4 s come after the first word.
    asked.progress("queued", place=2, eta_s=199 * 2.4 + 95)
    page.wait_text(f"{MODEL} .wait", "In the queue, place 2, about 95 s to the first word")
    asked.progress("prompt", layer=12, eta_s=199 * 2.4 + 40)
    page.wait_text(f"{MODEL} .wait", "Prompt: layer 12 of 80, about 40 s left")
    assert page.find(f"{MODEL} .track").get_attribute("aria-valuenow") == "15"

    asked.reason("Short is best.")
    page.wait(lambda: page.all(f"{MODEL} .reasoning summary"))
    assert page.find(f"{MODEL} .reasoning").get_attribute("open") is None
    asked.say("Layer ", "by **layer**, é", " 漢.")
    asked.progress("running", layer=44, tokens=7, eta_s=90)
    page.wait_text(f"{MODEL} .body", "Layer by layer, é 漢.")
    words = "Layer 44 of 80, 7 of at most 200 tokens, at most 90 s left"
    page.wait_text(f"{MODEL} .wait", words)
    assert page.find(MODEL).get_attribute("aria-busy") == "true"
    asked.end("length")
    page.wait_text(f"{MODEL} .foot", "42 of 8,192 tokens of context")
    assert "Ended at the limit of tokens" in page.text(f"{MODEL} .foot")
    assert page.find(MODEL).get_attribute("aria-busy") == "false"
    assert not page.find(f"{MODEL} .wait").is_displayed()
    page.find(f"{MODEL} .reasoning summary").click()
    assert page.text(f"{MODEL} .reasoning .text") == "Short is best."

    page.send("And then?")
    second = page.stub.wait_for_request(2)
    assert [each["content"] for each in second.body["messages"]] == [
        *("How does it fit?", "Layer by **layer**, é 漢.", "And then?")
    ]
    assert second.key != asked.key


MARKDOWN = """# Head

One *two* **three** `four` [five](https://five.example/x?a=1) https://six.example.

- a
  - b

3. c

> quoted

```py
if x:
    <b>y</b>
```

| h | i |
|---|---|
| j | k |
"""


@needs_browser
def test_markdown_becomes_elements(open_page):
    page = open_page()
    page.send("?")
    page.stub.wait_for_request().say(MARKDOWN).end()
    page.wait(lambda: page.all(f"{MODEL} td"))
    found = page.run(
        "return Object.fromEntries(arguments[0].map((css) => [css, [...document.querySelectorAll("
        "`.assistant .body ${css}`)].map((each) => each.textContent)]))",
        ["h3", "em", "strong", "p > code", "a", "ul ul li", "ol li", "blockquote", "pre", "th"],
    )
    assert found == {
        "h3": ["Head"],
        "em": ["two"],
        "strong": ["three"],
        "p > code": ["four"],
        "a": ["five", "https://six.example"],
        "ul ul li": ["b"],
        "ol li": ["c"],
        "blockquote": ["quoted"],
        "pre": ["if x:\n    <b>y</b>"],
        "th": ["h", "i"],
    }
    links = [each.get_attribute("href") for each in page.all(f"{MODEL} a")]
    assert links == ["https://five.example/x?a=1", "https://six.example/"]
    assert {each.get_attribute("rel") for each in page.all("a[target]")} == {"noopener noreferrer"}
    assert page.find(f"{MODEL} ol").get_attribute("start") == "3"

    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.press("Copy", "figcaption")
    page.wait_text("figcaption button", "Copied")
    assert page.run("return navigator.clipboard.readText()") == "if x:\n    <b>y</b>"
    page.press("Copy", f"{MODEL} .foot")
    page.wait_text(f"{MODEL} .foot", "Copied")
    assert page.run("return navigator.clipboard.readText()") == MARKDOWN


HOSTILE = """<img src=x onerror="window.taken=1"><script>window.taken=1</script>
[a](javascript:window.taken=1) [b](JaVaScRiPt:taken=1) [c](data:text/html,x) [d](//evil.example)
![e](https://evil.example/e.png) <https://f.example/"onmouseover="taken=1> `<svg/onload=taken=1>`

```"><img src=x onerror=window.taken=1>
</code></pre><script>window.taken=1</script>
```

| <iframe src=x> | __proto__ |
|---|---|
| <style>*{display:none}</style> | [g](vbscript:x) |
"""


@needs_browser
def test_text_stays_text_wherever_it_comes_from(open_page):
    page = open_page()
    page.stub.tell(model=HOSTILE, phase=HOSTILE)
    page.run("arguments[0].value = arguments[1]", page.find("#draft"), HOSTILE)
    page.press("Send")
    asked = page.stub.wait_for_request()
    asked.reason(HOSTILE).say(HOSTILE).fail(HOSTILE)
    page.wait(lambda: page.all(".failure button"))
    page.stub.refusals.append((400, HOSTILE, HOSTILE))
    page.press("Retry")
    page.wait(lambda: len(page.all(".failure button")) == 1)
    assert page.find(".message.user .body").text.startswith("<img src=x onerror=")
    page.press(BEFORE)
    page.wait_text(f"{MODEL} .body", "[a](javascript:window.taken=1)")
    for css in ("img", "iframe", "svg", "body script ~ script", "main script", "main style"):
        assert page.all(css) == []
    for link in page.all("main a, aside a"):
        assert link.get_attribute("href").startswith("https://")
        assert link.get_attribute("onmouseover") is None
    assert page.run("return window.taken") is None


@needs_browser
@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop_ends_the_work_and_keeps_what_came(open_page, by):
    page = open_page()
    page.send("Go on for ever")
    asked = page.stub.wait_for_request().say("Half a th")
    page.wait_text(f"{MODEL} .body", "Half a th")
    assert not page.find("#send").is_displayed()
    if by == "button":
        page.press("Stop")
    else:
        page.write("", ESCAPE)
    asked.wait(lambda asked: asked.is_deleted)
    page.wait_text(f"{MODEL} .foot", "Stopped")
    assert page.text(f"{MODEL} .body") == "Half a th"
    assert page.find("#send").is_displayed()
    page.open(is_empty=False)
    page.wait_text(f"{MODEL} .foot", "Stopped")
    assert len(asked.afters) == 1  # a stopped answer is not asked for again


@needs_browser
def test_a_reload_brings_back_the_draft_and_the_running_answer(open_page):
    page = open_page()
    page.send("Tell me")
    asked = page.stub.wait_for_request().say("One, ", "two, ")
    page.wait_text(f"{MODEL} .body", "One, two,")
    page.write("not sent y")
    page.write("", SHIFT_ENTER)
    page.write("et")
    page.open(is_empty=False)
    assert page.find("#draft").get_attribute("value") == "not sent y\net"
    page.wait_text(f"{MODEL} .body", "One, two,")
    asked.say("three.")
    page.wait_text(f"{MODEL} .body", "One, two, three.")
    assert asked.afters == [None, "2"]  # goes on after the second chunk
    # What comes while nobody looks is not lost either.
    page.driver.get("about:blank")
    asked.say(" Four.").end()
    page.open(is_empty=False)
    page.wait_text(f"{MODEL} .foot", "12 tokens")
    assert page.text(f"{MODEL} .body") == "One, two, three. Four."
    assert len(page.stub.asked) == 1


@needs_browser
def test_a_connection_that_breaks_is_taken_up_where_it_was(open_page):
    page = open_page()
    page.send("Tell me")
    asked = page.stub.wait_for_request().say("One, ", "two, ")
    page.wait_text(f"{MODEL} .body", "One, two,")
    asked.cut()
    page.wait_text(f"{MODEL} .wait", "The connection broke. Trying again in")
    asked.say("three.").end()
    page.wait_text(f"{MODEL} .foot", "12 tokens")
    assert page.text(f"{MODEL} .body") == "One, two, three."
    assert asked.afters == [None, "2"]


@needs_browser
def test_edited_and_repeated_messages_are_branches(open_page):
    page = open_page(answers=lambda asked: asked.say(f"Answer {asked.id}").end())
    page.send("First")
    page.wait_text(MODEL, "Answer req_1")
    page.press("Retry", MODEL)
    page.wait_text(f"{MODEL} .body", "Answer req_2")
    page.wait_text(f"{MODEL} .branch", "2/2")
    page.press(BEFORE, MODEL)
    page.wait_text(f"{MODEL} .body", "Answer req_1")

    page.press("Edit", ".message.user")
    area = page.find(".editing textarea")
    area.clear()
    area.send_keys("Better", "\ue007")
    page.wait_text(f"{MODEL} .body", "Answer req_3")
    assert page.stub.asked[2].body["messages"] == [{"role": "user", "content": "Better"}]
    assert page.text(".message.user .branch").split() == [BEFORE, "2/2", AFTER]
    page.press(BEFORE, ".message.user")
    page.wait_text(f"{MODEL} .body", "Answer req_1")  # the answer that was chosen there
    assert page.driver.switch_to.active_element.get_attribute("aria-label") == "The next version"

    page.press("Edit", MODEL)
    page.find(".editing textarea").send_keys(", corrected", "\ue007")
    page.wait_text(f"{MODEL} .branch", "3/3")
    page.send("More")
    page.wait_text(f"{MODEL} .body", "Answer req_4")
    said = [each["content"] for each in page.stub.asked[3].body["messages"]]
    assert said == ["First", "Answer req_1, corrected", "More"]
    page.open(is_empty=False)
    page.wait_text(f"{MODEL} .body", "Answer req_4")


@needs_browser
def test_a_key_is_asked_for_once_and_survives_a_reload(open_page):
    page = open_page(key="sesame", answers=lambda asked: asked.say("In.").end())
    page.wait(lambda: page.find("#dialog-input").is_displayed())
    page.find("#dialog-input").send_keys("wrong", "\ue007")
    page.wait_text("#dialog-words", "That key was refused.")
    page.find("#dialog-input").send_keys("sesame", "\ue007")
    page.wait_text("#model", "made-up-70b")
    page.send("Open")
    page.wait_text(f"{MODEL} .body", "In.")
    page.open(is_empty=False)
    page.wait_text("#model", "made-up-70b")
    assert not page.find("#dialog").is_displayed()
    assert "sesame" not in page.run("return JSON.stringify(localStorage)")
    assert "sesame" not in page.run("return document.documentElement.outerHTML")

    page.run("sessionStorage.clear()")
    page.open(is_empty=False)
    page.wait(lambda: page.find("#dialog-input").is_displayed())
    page.press("Cancel", "#dialog")
    page.wait_text("#notice-key", "This server needs a key.")
    page.press("Enter the key")
    page.find("#dialog-input").send_keys("sesame", "\ue007")
    page.wait_text("#model", "made-up-70b")


@needs_browser
def test_a_model_without_a_template_continues_a_text(open_page):
    page = open_page()
    page.stub.refusals.append(
        (400, "this model has no chat template: use /v1/completions", "no_chat_template")
    )
    page.send("Once upon")
    page.wait_text(".failure", "no chat template")
    page.press("Continue as plain text")
    asked = page.stub.wait_for_request()
    assert asked.path == "/v1/completions"
    assert (asked.body["prompt"], asked.body["max_tokens"]) == ("Once upon", 256)
    asked.say(" a *time*").end()
    page.wait_text(f"{MODEL} .body", "a *time*")
    page.press("Continue")  # nothing new written: the text goes on
    page.stub.wait_for_request(2).say(" there was").end()
    page.wait_text(f"{MODEL} .body", "there was")
    page.send(" a")
    assert page.stub.wait_for_request(3).body["prompt"] == "Once upon a *time* there was a"


@needs_browser
def test_errors_are_shown_and_can_be_tried_again(open_page):
    page = open_page()
    page.stub.refusals.append((429, "The queue is full.", "queue_full"))
    page.send("Hello")
    page.wait_text(".failure", "The queue is full. (Try again in 12 s.)")
    page.press("Retry")
    asked = page.stub.wait_for_request()
    asked.say("Half").fail("the disk failed")
    page.wait_text(".failure", "the disk failed")
    assert page.text(f"{MODEL} .body") == "Half"
    page.press("Retry")
    second = page.stub.wait_for_request(2)
    assert second.key != asked.key
    second.say("Whole").end()
    page.wait_text(f"{MODEL} .body", "Whole")
    page.wait_text(f"{MODEL} .branch", "2/2")
    page.send("Again")
    third = page.stub.wait_for_request(3)
    third.wait(lambda asked: asked.afters)
    third.fail("it failed before a word")
    page.wait_text(".failure", "before a word")
    page.press("Retry")
    page.stub.wait_for_request(4).say("At last").end()
    page.wait_text(f"{MODEL} .body", "At last")
    assert len(page.all(MODEL)) == 2


@needs_browser
def test_the_lane_shows_where_layers_are_and_where_the_sweep_is(open_page):
    page = open_page()
    page.wait_text("#state", "Sweep 1,204, layer 31 of 80")
    classes = [each.get_attribute("class").split()[0] for each in page.all("#lane i")]
    assert classes == page.stub.status["tiers"]
    assert [len(page.all(f"#lane .{name}")) for name in ("past", "now")] == [31, 1]
    heights = [page.find(f"#lane .{tier}").size["height"] for tier in ("device", "host", "disk")]
    assert heights == sorted(set(heights), reverse=True)  # not told by colour alone
    assert page.find("#lane").get_attribute("aria-label") == (
        "80 layers: 10 on the device, 42 in host memory, 28 on disk"
    )
    assert page.text("#legend").split("\n") == ["10 device", "42 host memory", "28 disk"]
    facts = page.text("#facts").split("\n")
    assert sorted(facts) == sorted(
        ["2.4 s", "a sweep", "1.3", "tokens a second", "3", "riders", "2", "in the queue"]
    )
    meter = page.find("#meter-device")
    assert meter.get_attribute("aria-valuetext") == "3.10 of 4.00 GiB"
    assert page.find("#meter-device .track span").size["width"] == pytest.approx(
        0.775 * page.find("#meter-device .track").size["width"], abs=1
    )
    page.stub.tell(layer=60, riders=1)
    page.wait(lambda: len(page.all("#lane .past")) == 60)
    page.stub.tell(phase="compiling block")
    page.wait_text("#state", "Compiling block")
    page.stub.tell(phase=None, riders=0)
    page.wait_text("#state", "Idle")
    assert page.all("#lane .now") == []
    page.stub.tell(riders=1, seconds_a_pass=0.02)  # a faster sweep would only flicker
    page.wait_text("#facts", "20 ms")
    assert page.all("#lane .now") == []
    page.stub.tell(is_alive=False)
    page.wait_text("#notices", "The engine has stopped")


@needs_browser
def test_a_hidden_tab_closes_its_events(open_page):
    page = open_page()
    page.stub.wait(lambda stub: stub.n_watchers == 1)
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.stub.wait(lambda stub: stub.n_watchers == 0)
    page.driver.close()
    page.driver.switch_to.window(first)
    page.stub.wait(lambda stub: stub.n_watchers == 1)
    page.stub.tell(layer=70)
    page.wait_text("#state", "layer 70 of 80")


WIDE = f"""{"x" * 400} `{"y" * 300}`

```
{"z" * 300}
```

| {" | ".join(f"column{n}" for n in range(30))} |
|{"---|" * 30}
"""


@needs_browser
@pytest.mark.parametrize("width", [390, 320, 1280])
def test_nothing_scrolls_sideways(open_page, width):
    page = open_page().size(width, 844)
    page.send("W" * 300)
    page.stub.wait_for_request().reason("r" * 300).say(WIDE).fail("e" * 300)
    page.wait(lambda: page.all(".failure button"))
    page.run(
        "for (const each of document.querySelectorAll('details')) each.open = true;"
        "document.querySelector('#log').scrollLeft = 50; scrollTo(50, 0)"
    )
    sizes = page.run(
        "const log = document.querySelector('#log'); const all = document.documentElement;"
        "return [all.scrollWidth, log.scrollWidth - log.clientWidth, log.scrollLeft, scrollX]"
    )
    assert sizes == [width, 0, 0, 0]
    outside = page.run(
        "return [...document.querySelectorAll('main button, main p, main dd, main .body')]"
        ".filter((each) => each.getBoundingClientRect().right > innerWidth + 1)"
        ".filter((each) => !each.closest('pre, .table')).map((each) => each.outerHTML.slice(0, 80))"
    )
    assert outside == []


@needs_browser
def test_keys_alone_are_enough(open_page):
    page = open_page(answers=lambda asked: asked.say("Yes.").end())
    assert page.driver.switch_to.active_element.get_attribute("id") == "draft"
    page.write("one", SHIFT_ENTER)
    page.write("two")
    assert page.stub.asked == []
    page.write("", "\ue007")
    assert page.stub.wait_for_request().body["messages"][0]["content"] == "one\ntwo"
    page.wait_text(f"{MODEL} .body", "Yes.")
    assert page.driver.switch_to.active_element.get_attribute("id") == "draft"
    page.write("", "\ue007")  # nothing to send
    seen = []
    page.run("document.activeElement.blur()")
    for _ in range(20):
        page.find("body").send_keys("\ue004")  # the Tab key
        seen.append(
            page.run(
                "const own = document.activeElement; return own === document.body ? ['', true]"
                " : [own.textContent || own.id,"
                " getComputedStyle(own).outlineStyle !== 'none' || own.id === 'draft']"
            )
        )
    words = [each[0] for each in seen]
    for name in ("To the message box", "New conversation", "Rename", "Copy", "Retry", "draft"):
        assert name in words
    assert [words for words, is_visible in seen if not is_visible] == []
    assert len(page.stub.asked) == 1
    log = page.find("#log")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, textarea, select')]"
        ".filter((each) => !(each.textContent.trim() || each.ariaLabel || each.labels?.length"
        " || each.getAttribute('aria-labelledby'))).map((each) => each.id)"
    )
    assert [each for each in unnamed if not each.startswith("dialog")] == []


@needs_browser
def test_conversations_are_kept_renamed_exported_imported_and_deleted(open_page, tmp_path):
    page = open_page(answers=lambda asked: asked.say(f"Answer {asked.id}").end())
    page.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.send("First")
    page.wait_text(f"{MODEL} .body", "Answer req_1")
    page.press("New conversation")
    assert page.all(MODEL) == []
    page.send("Second")
    page.wait_text(f"{MODEL} .body", "Answer req_2")
    page.press("Rename")
    page.find("#dialog-input").send_keys("<b>Two</b>", "\ue007")
    page.wait_text("#list .now", "<b>Two</b>")
    page.press("First", "#list")
    page.wait_text(f"{MODEL} .body", "Answer req_1")

    page.press("JSON")
    page.press("Markdown")
    page.wait(lambda: (tmp_path / "First.json").exists() and (tmp_path / "First.md").exists())
    words = (tmp_path / "First.md").read_text()
    assert words == "# First\n\n**You**\n\nFirst\n\n**The model**\n\nAnswer req_1\n"
    page.press("Delete")
    page.press("Delete", "#dialog")
    page.wait(lambda: "First" not in page.text("#list"))
    assert [each["title"] for each in page.stored()] == ["<b>Two</b>"]
    page.find("#file").send_keys(str(tmp_path / "First.json"))
    page.wait_text(f"{MODEL} .body", "Answer req_1")
    (tmp_path / "bad.json").write_text('{"nodes": [{"id": "a", "parent": "a", "role": "user"}]}')
    page.find("#file").send_keys(str(tmp_path / "bad.json"))
    page.wait_text("#notices", "bad.json holds no conversations")
    page.open(is_empty=False)
    assert sorted(page.text("#list").split("\n"))[0:1] == ["<b>Two</b>"]
    assert json.loads((tmp_path / "First.json").read_text())["version"] == 1


@needs_browser
def test_a_full_storage_is_said(open_page):
    page = open_page()
    page.run("localStorage.setItem('other', 'x'.repeat(5_242_880 - 1500 - 5))")
    page.send("y" * 900)
    page.wait_text("#notices", "This browser keeps no more")
    page.stub.wait_for_request().say("It still answers.").end()
    page.wait_text(f"{MODEL} .body", "It still answers.")
    page.run("localStorage.removeItem('other')")
    page.send("more")
    page.stub.wait_for_request(2).say("Room again.").end()
    page.wait(lambda: not page.all("#notice-storage"))
    assert page.stored()[0]["nodes"][1]["text"] == "It still answers."


@needs_browser
def test_settings_reach_the_server(open_page):
    page = open_page()
    page.find("#settings summary").click()
    for name, value in (("temperature", "hot"), ("seed", "7"), ("max_tokens", "50")):
        page.find(f"#set-{name}").send_keys(value)
    page.find("#set-system").send_keys("Be brief.")
    page.send("Hi")
    assert page.stub.asked == []
    assert page.driver.switch_to.active_element.get_attribute("id") == "set-temperature"
    page.find("#set-temperature").clear()
    page.find("#set-temperature").send_keys("0.5")
    page.send("")
    body = page.stub.wait_for_request().body
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 50)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.open(is_empty=False)
    assert "temperature 0.5" in page.text("#settings-words")
