"""The report as one HTML file: markup, style, scripts and data put together so that no text in it can become code.

Two walls stand between a text and the browser's script engine. Data enter as JSON in which `<`, `>` and `&` are escaped, in
`<script type="application/json">`, and the page's scripts make text nodes of them (js/dom.js). And the page's Content
Security Policy runs no script but those whose hashes it names, and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from bokeh.resources import Component, Resources

from alignment.records import to_json

HERE = Path(__file__).parent
SCRIPTS = ("dom", "store", "detail", "scatter", "curves", "tables", "main")  # in this order
BOKEH_COMPONENTS: list[Component] = ["bokeh", "bokeh-api"]
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(title: str, data: dict, texts: dict) -> str:
    """The whole file. `data` and `texts` are JSON values; NaN is an error."""
    bokeh = "\n".join(Resources(mode="inline", components=BOKEH_COMPONENTS).js_raw)
    own = "\n".join((HERE / "js" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    scripts = [script_text(bokeh), script_text(f'"use strict";\n(() => {{\n{own}}})();\n')]
    parts = {
        "title": html.escape(title),
        "policy": content_policy(scripts),
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "data": script_json(data),
        "texts": script_json(texts),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    # in one pass: what was put in is not searched for further places
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def script_json(value: object) -> str:
    """JSON that neither ends a script element nor opens a comment in it, and is the same value when it is parsed."""
    return re.sub("[<>&]", lambda match: _ESCAPES[match.group()], to_json(value))


def script_text(code: str) -> str:
    """JavaScript that may stand in a script element: the three sequences that the HTML parser heeds are written otherwise."""
    code = code.replace("\r\n", "\n").replace("\r", "\n")  # as the parser reads it, or the hash would differ
    return re.sub(r"<(?=!--|/?script)", r"\\x3C", code, flags=re.IGNORECASE)


def content_policy(scripts: list[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
