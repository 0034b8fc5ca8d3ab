"""Conversations on the page: branches, what the browser keeps, files, settings."""

import json

from tests.serving.page.browser import AFTER, BEFORE, ENTER, MODEL, needs_browser


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
    area.send_keys("Better", ENTER)
    page.wait_text(f"{MODEL} .body", "Answer req_3")
    assert page.stub.asked[2].body["messages"] == [{"role": "user", "content": "Better"}]
    assert page.text(".message.user .branch").split() == [BEFORE, "2/2", AFTER]
    page.press(BEFORE, ".message.user")
    page.wait_text(f"{MODEL} .body", "Answer req_1")  # the answer that was chosen there
    assert page.driver.switch_to.active_element.get_attribute("aria-label") == "The next version"

    page.press("Edit", MODEL)
    page.find(".editing textarea").send_keys(", corrected", ENTER)
    page.wait_text(f"{MODEL} .branch", "3/3")
    page.send("More")
    page.wait_text(f"{MODEL} .body", "Answer req_4")
    said = [each["content"] for each in page.stub.asked[3].body["messages"]]
    assert said == ["First", "Answer req_1, corrected", "More"]
    page.open(is_empty=False)
    page.wait_text(f"{MODEL} .body", "Answer req_4")


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
    page.find("#dialog-input").send_keys("<b>Two</b>", ENTER)
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


@needs_browser
def test_an_adapter_is_chosen_as_a_model(open_page):
    page = open_page(models=("made-up-70b", "poet", "lawyer"))
    page.find("#settings summary").click()
    page.wait_text("#which-model", "poet")
    assert page.text("#set-model").split() == ["made-up-70b", "poet", "lawyer"]
    page.find("#set-model option[value=poet]").click()
    page.send("Hi")
    page.stub.wait_for_request().say("A verse.").end()
    assert page.stub.asked[0].body["model"] == "poet"
    page.wait_text(f"{MODEL} .foot", "12 tokens")
    page.stub.models = ("made-up-70b", "lawyer")  # another server, which has it no more
    page.open(is_empty=False)
    page.wait_text("#settings-words", "poet")
    page.find("#settings summary").click()
    page.wait_text("#which-model", "poet (not served)")
    page.stub.refusals = [(404, "'poet': not served here", "model_not_found")]
    page.send("Again")
    page.wait_text(f"{MODEL} .failure", "'poet': not served here")


@needs_browser
def test_one_model_is_no_choice(open_page):
    page = open_page()
    page.find("#settings summary").click()
    page.wait_text("#model", "made-up-70b")
    assert not page.find("#which-model").is_displayed()


@needs_browser
def test_two_tabs_show_the_same_conversations(open_page):
    page = open_page()
    page.send("First")
    asked = page.stub.wait_for_request().say("Half, ")
    page.wait_text(f"{MODEL} .body", "Half,")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open(is_empty=False)
    page.wait_text(f"{MODEL} .body", "Half,")
    asked.say("whole.").end()
    page.wait_text(f"{MODEL} .foot", "12 tokens")
    page.send("Second")
    page.stub.wait_for_request(2).say("From the other tab.").end()
    page.wait_text(f"{MODEL} .foot", "12 tokens")
    assert page.complaints() == []
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait_text(f"{MODEL} .body", "From the other tab.")
    assert page.find(f"{MODEL} .body").text == "Half, whole."
    assert len(page.stub.asked) == 2
    (kept,) = page.stored()
    assert [each["text"] for each in kept["nodes"]] == [
        *("First", "Half, whole.", "Second", "From the other tab.")
    ]


@needs_browser
def test_the_draft_of_a_new_conversation_is_found_again(open_page):
    page = open_page(answers=lambda asked: asked.say("Yes.").end())
    page.send("First")
    page.wait_text(f"{MODEL} .body", "Yes.")
    page.press("New conversation")
    page.write("a thought")
    page.press("First", "#list")
    page.wait_text(f"{MODEL} .body", "Yes.")
    assert page.find("#draft").get_attribute("value") == ""
    page.open(is_empty=False)
    page.press("New conversation")
    assert page.find("#draft").get_attribute("value") == "a thought"
