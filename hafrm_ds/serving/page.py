"""The page at / (serve.py --page): one file, which asks this server's routes and nobody else."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

STYLE = "/* hafrm_ds/style.css */"
"""The place in the page where style.css, the look of all pages, is put in."""


async def page(request: Request) -> Response:
    text = page_text()
    headers = {
        "Content-Security-Policy": policy_of(text),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def page_text() -> str:
    package = files("hafrm_ds")
    text = (package / "serving" / "page.html").read_text(encoding="utf-8")
    return text.replace(STYLE, (package / "style.css").read_text(encoding="utf-8"))


def policy_of(text: str) -> str:
    """What the page may do: run its own script and styles, which are known by their hashes, and ask its own server."""
    hashes = {}
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
