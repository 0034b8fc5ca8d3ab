"""/metrics: what the server counts, in the text form that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# field of a status -> (name, kind, help)
FIELDS = {
    "requests_total": ("requests_total", "counter", "Requests that were taken."),
    "cancelled_total": ("requests_cancelled_total", "counter", "Requests that were cancelled."),
    "tokens_total": ("tokens_total", "counter", "Tokens that were drawn."),
    "passes_total": ("sweeps_total", "counter", "Forward passes over all layers."),
    "riders": ("riders", "gauge", "Texts that ride in the forward pass under way."),
    "queued": ("queued", "gauge", "Requests of people that wait."),
    "queued_batch": ("queued_batch", "gauge", "Requests of batches that wait."),
    "seconds_a_pass": ("sweep_seconds", "gauge", "A forward pass, the median of the last ones."),
    "tokens_per_s": ("tokens_per_second", "gauge", "Tokens a second over the last half minute."),
    "uptime_s": ("uptime_seconds", "gauge", "Since the model was opened."),
}


def text(status: Mapping | None, answered: Counter, *, connections: int) -> str:
    """`status`: None while there is no model. `answered`: by (path, status)."""
    lines = []
    for field, (name, kind, words) in FIELDS.items():
        value = None if status is None else status[field]
        if value is not None:
            lines += _family(name, kind, words, [("", value)])
    is_up = int(bool(status and status["is_alive"]))
    lines += _family("up", "gauge", "Whether requests are answered.", [("", is_up)])
    if status is not None:
        rows = [
            (f'{{side="{side}",what="{what}"}}', value)
            for side, by_what in status["memory"].items()
            for what, value in by_what.items()
        ]
        lines += _family("memory_bytes", "gauge", "Memory, held and promised.", rows)
        tiers = Counter(status["tiers"])
        rows = [(f'{{tier="{tier}"}}', tiers[tier]) for tier in ("device", "host", "disk")]
        lines += _family("layers", "gauge", "Layers by where they lie between passes.", rows)
    rows = [
        (f'{{path="{path}",status="{code}"}}', count)
        for (path, code), count in sorted(answered.items())
    ]
    lines += _family("http_answers_total", "counter", "Answers by path and status.", rows)
    rows = [("", connections)]
    lines += _family("http_running", "gauge", "Requests that are being answered.", rows)
    return "\n".join(lines) + "\n"


def _family(name, kind, words, rows):
    name = f"jlayer_{name}"
    return [
        f"# HELP {name} {words}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value}" for labels, value in rows),
    ]
