"""Answers on the page: from the queue to the last word, stopped, failed, and taken up again."""

import re

import pytest

from tests.serving.page.browser import BEFORE, ENTER, ESCAPE, MODEL, SHIFT_ENTER, needs_browser


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
    asked.wait(lambda asked: asked.is_deleted)  # kept here, so the server need not keep it
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
def test_stop_reaches_an_order_that_is_still_on_its_way(open_page):
    page = open_page()
    page.stub.is_open.clear()
    page.send("Go on for ever")
    asked = page.stub.wait_for_request()
    page.press("Stop")
    page.wait_text(f"{MODEL} .foot", "Stopped")
    page.press("Retry", MODEL)
    second = page.stub.wait_for_request(2)
    page.stub.is_open.set()
    asked.wait(lambda asked: asked.is_deleted)
    second.say("The second.")
    page.wait_text(f"{MODEL} .body", "The second.")
    assert second.key != asked.key
    assert not second.is_deleted


@pytest.mark.slow
@needs_browser
def test_an_order_whose_receipt_is_lost_is_not_placed_twice(open_page):
    page = open_page(answers=lambda asked: asked.say("Once.").end(), n_lost=1)
    page.is_lost = True
    page.send("Hello")
    page.wait_text(f"{MODEL} .body", "Once.")
    assert len(page.stub.asked) == 1
    page.stub.n_lost = 9
    page.send("And now?")
    page.wait_text(".failure", "The server cannot be reached.")
    page.stub.n_lost = 0
    page.press("Retry")
    page.wait_text(f"{MODEL} .body", "Once.")
    page.wait(lambda: not page.all(".failure button"))
    assert len(page.stub.asked) == 2
    assert len(page.all(MODEL)) == 2


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
    assert asked.afters == [None, "3"]  # goes on after the third chunk
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
    assert asked.afters == [None, "3"]


@needs_browser
def test_a_key_is_asked_for_once_and_survives_a_reload(open_page):
    page = open_page(key="sesame", answers=lambda asked: asked.say("In.").end())
    page.wait(lambda: page.find("#dialog-input").is_displayed())
    page.find("#dialog-input").send_keys("wrong", ENTER)
    page.wait_text("#dialog-words", "That key was refused.")
    page.find("#dialog-input").send_keys("sesame", ENTER)
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
    page.find("#dialog-input").send_keys("sesame", ENTER)
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
    page.wait_text(".failure", "The queue is full. Try again in 12 s.")
    page.press("Retry")
    asked = page.stub.wait_for_request()
    asked.say("Half").fail("the disk failed")
    page.wait_text(".failure", "The disk failed.")
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
    page.wait_text(".failure", "It failed before a word.")
    page.press("Retry")
    page.stub.wait_for_request(4).say("At last").end()
    page.wait_text(f"{MODEL} .body", "At last")
    assert len(page.all(MODEL)) == 2


# What a model that went astray repeats, and what a careless pattern would take hours for.
ASTRAY = (
    "**a ",
    "`",
    "[a](",
    "* ",
    "> ",
    "#",
    "_a",
    "| - ",
    " ",
    "1. ",
    "\\(",
    "```\n",
    "https://",
)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("kind", ["one line", "many lines"])
def test_an_answer_of_nonsense_does_not_stop_the_page(open_page, kind):
    page = open_page()
    for number, words in enumerate(ASTRAY, 1):
        length = 19_000 if kind == "one line" else 100_000
        repeated = (words * length)[:length]
        if kind == "many lines":
            repeated = "\n".join(repeated[at : at + 300] for at in range(0, length, 300))
        page.send(f"{number}")
        page.stub.wait_for_request(number).say(repeated + "x").end()
        page.wait_text(f"{MODEL} .foot", "12 tokens")
        took = page.run(
            "const before = performance.now(); document.querySelector('#draft').focus();"
            "return performance.now() - before"
        )
        assert took < 1000
        page.find("#new").click()
