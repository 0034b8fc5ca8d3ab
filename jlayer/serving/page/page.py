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
# Layers, one of them lit.
_ICON = b"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" \
fill="#1f2430"/><path d="M3 5h10M3 11h10" stroke="#8a94a8" stroke-width="2"/><path d="M3 8h10" \
stroke="#f2b134" stroke-width="2"/></svg>
"""


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


def icon() -> bytes:
    """What a browser asks for at /favicon.ico by itself: an SVG."""
    return _ICON


def icon_headers() -> dict[str, str]:
    return {
        "Content-Type": "image/svg+xml",
        "Content-Security-Policy": "default-src 'none'",
        "Cache-Control": "max-age=86400",
    }


def headers() -> dict[str, str]:
    """The headers that the page must be sent with, besides its length."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
