"""Opens a model for a verb, runs a decoding and shows its text, and sums up the run in a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from jlayer.app import progress
from jlayer.app.ending import Interrupted, word_of
from jlayer.app.inputs import folder_of, name_of
from jlayer.app.streams import tell
from jlayer.app.words import time_words
from jlayer.engine.deciding import agree, leave
from jlayer.engine.hosts import DiffersError
from jlayer.errors import StorageError
from jlayer.interrupts import STOPS, released
from jlayer.plan.tiles import Tier
from jlayer.run_config import RunConfig
from jlayer.sizes import counted, human


@contextmanager
def opened(
    ref, *, offline: bool = False, compared: Mapping[str, object] | None = None, **options
) -> Iterator:
    """Yields the model that REF names, and closes it. `options`: those of `RunConfig`. `compared`:
    what else must be equal in all processes, where there are several.

    Raises what `AutoModel.from_pretrained` does, and UsageError where something differs.
    """
    RunConfig.from_options(**options)  # a usage error comes before a download
    if options.get("draft") is not None:
        options["draft"] = folder_of(options["draft"], offline=offline, option="draft")
    folder = folder_of(ref, offline=offline)
    with progress.opening() as watch:
        from jlayer.api import AutoModel

        with told_to_others():
            model = AutoModel.from_pretrained(folder, watch=watch, **options)
            agree(compared or {})
    with model, told_to_others():
        yield model


@contextmanager
def told_to_others():
    """Tells the other processes of the model, if there are some, why this one ends early."""
    try:
        yield
    except STOPS as stop:
        leave(word_of(stop))
        raise
    except Interrupted as stop:
        leave(str(stop))
        raise
    except StorageError as error:  # perhaps since another is lost
        leave(str(error), waits=True)
        raise
    except DiffersError:
        raise  # as in the others
    except Exception as error:
        leave(str(error))
        raise


def follow(
    model, decoding, show, *, view=None, before: str = "", after=None, verbose=False
) -> dict:
    """Runs a decoding to its end or to a signal, and returns its result.

    `show` takes text (None: no text is shown): that of a single sequence while it grows, that of
    several at the end; token ids where the model has no tokenizer. `view`: as in `progress.shown`.
    `before`: text to show first. `after`: called with the steps of each forward pass. `verbose`:
    more figures at the end. Raises Interrupted with the result so far.
    """
    has_text = model.text is not None
    for line in (describe(model, decoding), *model.notes, *decoding.notes):
        tell(line)
    live = show if len(decoding.lanes) == 1 else None
    before += decoding.lanes[0].text  # of a run that goes on
    stopped, n_shown = None, len(decoding.lanes[0].text)  # characters of the text
    with progress.shown(model, live, words=pass_words(decoding), view=view) as write:
        steps = iter(decoding)
        try:
            if write and before:
                write(before)
            for gained in steps:
                if write and has_text:
                    n_shown += len(gained[0].text)  # a signal comes once it is written
                    write(gained[0].text)
                if after is not None:
                    after(gained)
        except STOPS as stop:
            stopped = stop
        finally:
            steps.close()
    found = decoding.generations()
    if live and has_text:
        live(found[0].text[n_shown:] + "\n")  # a signal may come between a token and its text
    elif show:
        texts = [one.text if has_text else ",".join(map(str, one.token_ids)) for one in found]
        show("\n\n".join(texts) + "\n")
    tell(summary(found))
    for line in details(found[0]) if verbose else ():
        tell(line)
    result = found[0].as_dict()
    if len(found) > 1:
        result["sequences"] = [one.as_dict() for one in found]
    if stopped is not None:
        raise Interrupted(stopped, result)
    return result


def write_text(piece: str, stream: TextIO | None = None):
    """Writes to stdout, or to `stream`, at once. A reader may be slow: a signal ends the wait for
    it, and finds the text in the buffer."""
    stream = sys.stdout if stream is None else stream
    stream.write(piece)
    with released():
        stream.flush()


def pass_words(decoding):
    """What a forward pass computes: the next token, and how many each pass gave so far where some
    were guessed."""

    def words(number):
        stats = decoding.stats
        if not number or not stats.drafted:
            return progress.sweep_words(number)
        n_tokens = max(len(lane.token_ids) for lane in decoding.lanes)
        return f"token {n_tokens + 1}, {stats.tokens_per_sweep:.1f} a forward pass"

    return words


def describe(model, decoding=None) -> str:
    """Where a model runs, where its layers are kept, the predicted time of a token, and what
    guesses tokens in `decoding`."""
    plan = model.plan
    kept = [f"{plan.layers(tier)} {tier.value}" for tier in Tier if plan.layers(tier)]
    return (
        f"{model.engine.device_name}, {model.dtype}, layers: {', '.join(kept)}; "
        f"{human(plan.used_bytes)} a forward pass{_hosted(plan)}, "
        f"about {time_words(plan.sweep_seconds)}; "
        f"device at most {human(plan.device_peak_bytes)} of {human(plan.device.budget_bytes)}"
        f"{_guessing(model, decoding)}"
    )


def _hosted(plan):
    """What the host's cores multiply of it; empty for nothing."""
    n_bytes = plan.host_product_bytes
    return f" ({human(n_bytes)} of it multiplied by the host's cores)" if n_bytes else ""


def _guessing(model, decoding):
    """The draft model, its bytes, and how many tokens are guessed by what; empty for none."""
    draft, words = model.engine.draft, ""
    if draft is not None:
        n_bytes = human(model.plan.device.draft_bytes)
        words = f", {n_bytes} of it for the draft {name_of(draft.folder)}"
    if decoding is not None and decoding.n_guesses:
        mode = decoding.options.speculate
        by = {"draft": "the draft", "lookup": "lookup"}.get(mode, "the draft and lookup")
        by = "lookup" if draft is None else by
        each = " for each text" if len(decoding.lanes) > 1 else ""
        words += f"; {by} may guess {counted(decoding.n_guesses, 'token')} a forward pass{each}"
    return words


def summary(found) -> str:
    """A finished run in one line, with the predicted and the measured time of a token."""
    stats, predicted = found[0].stats, found[0].plan["sweep"]["decode_seconds"]
    decoded = stats["decode_sweeps"]
    took = time_words(stats["decode_s"] / decoded) if decoded > 0 else "nothing"
    reasons = ", ".join(sorted({one.finish_reason for one in found}))
    drawn = "greedy" if found[0].seed is None else f"seed {found[0].seed}"
    return (
        f"{counted(sum(len(one.token_ids) for one in found), 'token')} ({reasons}), {drawn}, "
        f"{stats['tokens_per_s']:.2f} tokens/s, "
        f"{counted(stats['sweeps'], 'forward pass', 'forward passes')}, "
        f"{_guessed(stats)}{_each(stats, took, time_words(predicted))}, "
        f"{human(stats['put_bytes'])} moved, load {stats['load_s']:.2f} s, "
        f"prefill {stats['prefill_s']:.2f} s, waited {stats['stall_s']:.2f} s for weights"
    )


def details(found) -> list[str]:
    """More figures of a finished run: its guesses, its programs, the memory."""
    stats, memory = found.stats, found.memory
    lines = [
        f"{side}: at most {human(memory[f'{side}_peak_bytes'])} of "
        f"{human(memory[f'{side}_budget_bytes'])} ({memory[f'{side}_peak_how']})"
        for side in ("device", "host")
    ]
    if stats["host_product_bytes"]:
        n_bytes = human(stats["host_product_bytes"] // max(1, stats["sweeps"]))
        lines.append(f"host's cores: {n_bytes} a forward pass, {found.plan['host_share']:.0%}")
    if used := stats["experts_used"]:
        on_device, in_host = stats["experts_on_device"], stats["experts_in_host"]
        lines.append(
            f"experts: {used} used, {on_device / used:.0%} of them on the device and "
            f"{in_host / used:.0%} in host memory when they were asked for{_foreseen(stats)}"
        )
    lines.append(f"programs compiled: {sum(stats['compiles'].values())}")
    if stats["drafted"]:
        depths = ", ".join(map(str, stats["accepted_by_depth"])) or "none"
        sharpness = stats["sharpness"]
        learnt = "" if sharpness is None else f"; s {sharpness:.2f}"
        lines.append(
            f"guesses: {stats['drafted']} drafted in {stats['draft_s']:.2f} s, "
            f"{stats['verified']} verified in {stats['sweep_s']:.2f} s of forward passes, "
            f"accepted by depth: {depths}{learnt}"
        )
    return lines


def _foreseen(stats):
    """How many experts were put by guess, and in vain; empty where none were."""
    if not (guessed := stats["experts_guessed"]):
        return ""
    return f"; {guessed} put by guess, {stats['experts_wasted'] / guessed:.0%} of them in vain"


def _each(stats, took, predicted):
    """The measured and the predicted time of a forward pass after the prompt's."""
    if stats["drafted"]:
        return f"one with its guesses {took} ({predicted} predicted without guesses)"
    return f"one of a token {took} (predicted {predicted})"


def _guessed(stats):
    """What guessing tokens gained, and took; empty where none were guessed."""
    if not stats["drafted"]:
        return ""
    each = stats["drafted"] / stats["sweeps"]
    return (
        f"{stats['tokens_per_sweep']:.1f} tokens a forward pass ({each:.0f} drafted each, "
        f"{stats['draft_s']:.2f} s of drafting), "
    )
