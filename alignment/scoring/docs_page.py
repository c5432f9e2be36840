"""The scorer's /docs: one HTML page made from the OpenAPI description, without scripts or anything from elsewhere."""

from __future__ import annotations

import json
from html import escape

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f3f3f3;padding:.7rem;overflow:auto}td,th{text-align:left;vertical-align:top;padding:.1rem 1rem .1rem 0}"
    "h2 code{background:#e8f0fa;padding:.1rem .4rem}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}pre{background:#222}h2 code{background:#234}}"
)


def docs_page(openapi: dict) -> str:
    """HTML of all endpoints: what they do, take and answer."""
    parts = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if schema is not None:
                parts.append(
                    f"<p>{escape(schema.get('description', ''))}</p>{fields_table(schema)}{example(path, schema)}"
                )
            rows = "".join(
                f"<tr><td>{code}</td><td>{reply_text(reply, openapi)}</td></tr>"
                for code, reply in sorted(operation["responses"].items())
            )
            parts.append(f"<table><tr><th>status</th><th>answer</th></tr>{rows}</table>")
    title = escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>The same as a machine reads it: <a href='openapi.json'>openapi.json</a></p>"
        f"{''.join(parts)}</body></html>"
    )


def fields_table(schema: dict) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind(field))}</td>"
        f"<td>{'needed' if name in schema.get('required', ()) else 'may be left out'}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{rows}</table>"


def kind(field: dict) -> str:
    """A JSON schema's type in words: "list of string or null"."""
    if "anyOf" in field:
        return " or ".join(kind(one) for one in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {kind(field['items'])}"
    return field.get("type", "object")


def example(path: str, schema: dict) -> str:
    body = {name: ["..."] for name in schema.get("required", ())}
    command = f"curl -s \"$URL{path}\" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    return f"<pre>{escape(command)}</pre>"


def reply_text(reply: dict, openapi: dict) -> str:
    """The answer's fields, or its description where it has none."""
    schema = reply.get("content", {}).get("application/json", {}).get("schema", {})
    model = openapi.get("components", {}).get("schemas", {}).get(schema.get("$ref", "").rpartition("/")[2], schema)
    names = ", ".join(f"<code>{escape(name)}</code>" for name in model.get("properties", ()))
    return names or escape(reply.get("description", ""))
