"""The page at /: one file, and headers that let a browser run nothing but what stands in it.

Pure data for whoever answers requests. The hashes are taken from the file itself, so editing it
cannot leave them behind.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

_HTML = (files("jlayer.serving.page") / "index.html").read_bytes()


def _source(tag: str) -> str:
    """What a policy calls the page's only element of that kind: its hash."""
    (content,) = re.findall(f"<{tag}(?: [^>]*)?>(.*?)</{tag}>".encode(), _HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


_POLICY = "; ".join(
    (
        "default-src 'self'",
        f"script-src {_source('script')}",
        f"style-src {_source('style')}",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)


def html() -> bytes:
    """The page, as UTF-8."""
    return _HTML


def headers() -> dict[str, str]:
    """The headers that the page must be sent with, besides its length."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
