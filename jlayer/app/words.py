"""Times as a person reads them."""

from __future__ import annotations

# Longer than a minute: (seconds, unit, the unit of the rest, its seconds).
_LONG = ((3600.0, "h", "min", 60.0), (60.0, "min", "s", 1.0))
_CALENDAR = ((365.25 * 86400, "year"), (86400.0, "day"))


def time_words(seconds: float) -> str:
    """A time with two or three figures: 4.7 ms, 9.4 s, 6 min 37 s, 2 h 5 min, 15 years."""
    if seconds < 59.95:
        for unit, size in (("s", 1.0), ("ms", 1e-3)):
            if seconds >= size:
                return f"{seconds / size:.3g} {unit}"
        return f"{seconds * 1e6:.3g} µs"
    for size, unit in _CALENDAR:
        if seconds >= size:
            count = round(seconds / size)
            return f"{count:,} {unit}{'s' * (count != 1)}"
    size, unit, smaller, part = _LONG[seconds < 3600]
    whole, rest = divmod(round(seconds / part), round(size / part))
    return f"{whole} {unit}" + (f" {rest} {smaller}" if rest else "")
