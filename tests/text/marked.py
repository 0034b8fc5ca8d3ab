"""The bundled tokenizer with the marks of calls and reasoning as tokens, and answers in pieces."""

import functools
import tempfile
from pathlib import Path

from jlayer.text.stream import TextStream
from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED
from tests.text.samples import edited

PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "[THINK]", "[/THINK]")
SPECIAL += ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]")


@functools.cache
def marked_tokenizer():
    """As Qwen has it, the first marks are tokens that no decoding leaves out; the others are."""
    rows = [*((text, False) for text in PLAIN), *((text, True) for text in SPECIAL)]
    added = {
        str(4096 + at): {"content": text, "special": special}
        for at, (text, special) in enumerate(rows)
    }
    with tempfile.TemporaryDirectory() as folder:
        config = {"added_tokens_decoder": added}
        return Tokenizer.from_folder(edited(Path(folder), BUNDLED, tokenizer_config=config))


def answer_of(tokenizer, template, messages, **options):
    """(the prompt, what the template writes after it for the last message, without its end)."""
    asked = {"chat_template": template, **options}
    prompt = tokenizer.render_chat(messages[:-1], add_generation_prompt=True, **asked)
    whole = tokenizer.render_chat(messages, add_generation_prompt=False, **asked)
    if not whole.startswith(prompt):  # some write the line break only where a text follows
        prompt = prompt.removesuffix("\n")
    assert whole.startswith(prompt)
    answer = whole[len(prompt) :]
    ends = [
        answer.find(end)
        for end in ("<|im_end|>", "<|eot_id|>", tokenizer.named_tokens["eos_token"])
    ]
    ends = [end for end in ends if end >= 0]
    return prompt, answer[: min(ends)] if ends else answer


def streamed(tokenizer, ids, shown):
    """The pieces in which the text of some ids arrives."""
    stream = TextStream(tokenizer, continues=True, shown=shown)
    return [*map(stream.step, ids), stream.finish()]


def divided(text, rng, n=6):
    """A text whole, by character, and in some random pieces."""
    yield [text]
    yield list(text)
    for _ in range(n):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 12)))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
