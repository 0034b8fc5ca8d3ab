"""The page: what its file holds, and how the machine and the whole look in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from jlayer.serving.page import page
from tests.serving.page.browser import ENTER, MODEL, SHIFT_ENTER, TAB, needs_browser


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


@needs_browser
def test_the_lane_shows_where_layers_are_and_where_the_sweep_is(open_page):
    page = open_page()
    page.wait_text("#state", "Forward pass 1,204, layer 31 of 80")
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
        ["2.4 s", "a pass", "1.3", "tokens a second", "3", "riders", "2", "in the queue"]
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
@pytest.mark.parametrize("width", [390, pytest.param(320, marks=pytest.mark.slow), 1280])
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
    for css in ("pre", ".table"):  # what is wider scrolls inside its own box
        inner = f"document.querySelector('.assistant {css}')"
        assert page.run(f"{inner}.scrollLeft = 50; return {inner}.scrollLeft") == 50
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
    page.write("", ENTER)
    assert page.stub.wait_for_request().body["messages"][0]["content"] == "one\ntwo"
    page.wait_text(f"{MODEL} .body", "Yes.")
    assert page.driver.switch_to.active_element.get_attribute("id") == "draft"
    page.write("", ENTER)  # nothing to send
    seen = []
    page.run("document.activeElement.blur()")
    for _ in range(20):
        page.find("body").send_keys(TAB)
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


CONTRASTS = """
const [text, paper] = [new Map(), new Map()];
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function light([r, g, b]) {
  const [x, y, z] = [r, g, b].map((each) => each / 255)
    .map((each) => (each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}
function behind(element) {
  for (let each = element; each; each = each.parentElement) {
    const found = rgba(getComputedStyle(each).backgroundColor);
    if (found[3] === 255) return found;
  }
}
const found = [];
for (const each of document.querySelectorAll("body *")) {
  const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !each.checkVisibility() || each.disabled || each.matches("script, style")) continue;
  const [one, other] = [light(rgba(getComputedStyle(each).color)), light(behind(each))];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  found.push([ratio, each.textContent.slice(0, 40)]);
}
return found;
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_can_be_read_in_both_schemes(open_page, scheme):
    page = open_page()
    page.media(**{"color-scheme": scheme, "reduced-motion": "reduce"})
    page.send("?")
    words = "[a](https://b.example) `c`\n\n> d\n\n```\ne\n```"
    page.stub.wait_for_request().reason("why").say(words).fail("it failed")
    page.wait(lambda: page.all(".failure button"))
    page.run("for (const each of document.querySelectorAll('details')) each.open = true;")
    found = page.run(CONTRASTS)
    assert len(found) > 30
    assert [each for each in found if each[0] < 4.5] == []
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(250, 249, 246)", "dark": "rgb(21, 23, 25)"}[scheme]
    moves = page.run(
        "return getComputedStyle(document.querySelector('#lane i')).transitionDuration"
    )
    assert moves == "0s"
