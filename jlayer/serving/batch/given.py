"""Requests that come from elsewhere than a file, and answers that go elsewhere than to one: what
`run` takes in the place of `Lines` and a `Journal`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jlayer.errors import UsageError
from jlayer.serving.batch.journal import is_refused
from jlayer.serving.batch.lines import Line, line_of


class GivenLines:
    """Requests as lines of an input, each without its end. Raises UsageError where one is none, or
    two have one custom_id."""

    def __init__(self, lines: Sequence[str]):
        self._lines: dict[str, Line] = {}
        for number, text in enumerate(lines, 1):
            try:
                line = line_of(text.encode(errors="surrogatepass"), number=number)
            except UsageError as error:
                raise UsageError(f"request {number} of {len(lines)}: {error}") from None
            if line.custom_id in self._lines:
                before = self._lines[line.custom_id].number
                raise UsageError(
                    f"request {number} of {len(lines)}: custom_id {line.custom_id!a:.80} is that "
                    f"of request {before} already"
                )
            self._lines[line.custom_id] = line

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())


class KeptAnswers:
    """Answers that stay in memory. `finished`: by custom_id. `n_refused`: of them with an error."""

    def __init__(self):
        self.finished: dict[str, dict] = {}
        self.n_refused = 0

    def add(self, lines: Iterable[dict]) -> None:
        for line in lines:
            self.finished[line["custom_id"]] = line
            self.n_refused += is_refused(line)
