"""The HTTP interface described: an OpenAPI document, and a page that shows it without anything from elsewhere."""

from typing import Any, Final

MAX_BODY_BYTES: Final = 4 << 20
"""Of a request: room for 60,000 chunks."""

_CHUNKS: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["chunks"],
    "properties": {"chunks": {"type": "array", "items": {"type": "string", "description": "hexadecimal digest"}}},
}
_QUOTA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["pages"],
    "properties": {"pages": {"type": "integer", "minimum": 0}},
}

OPERATIONS: Final[tuple[tuple[str, str, str, dict[str, Any] | None], ...]] = (
    ("get", "/healthz", "Whether the request loop turns; 503 where it does not within a second.", None),
    ("get", "/metrics", "Every counter, gauge and histogram, in the Prometheus text format.", None),
    ("get", "/status", "Arena, tiers, instances and their members, recorder, journal.", None),
    ("get", "/config", "The settings in force.", None),
    ("get", "/chunks/{chunk}", "The tier in which a chunk can be matched; 404 where there is none.", None),
    ("post", "/chunks", "The tier of each of many chunks, null for none.", _CHUNKS),
    ("post", "/clear", "Drop the chunks named, or everything where the body is empty.", _CHUNKS),
    (
        "post",
        "/pin",
        "Keep chunks in L1 until they are unpinned; says how many are not there. 404 where none is.",
        _CHUNKS,
    ),
    ("post", "/unpin", "Give chunks back to the eviction policy.", _CHUNKS),
    (
        "put",
        "/quotas/{salt}",
        "Limit a tenant to so many pages of L1. A salt may hold slashes; without one it is the tenant of no salt.",
        _QUOTA,
    ),
    ("delete", "/quotas/{salt}", "Lift a tenant's limit.", None),
)
"""Method, path, what it does, and the schema of its body."""


_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}, "kind": {"type": "string"}},
}
_ERRORS: Final = {
    "400": "what was asked cannot be read; or the server listens on loopback, and was asked under another host's name",
    "403": "a page of another origin asks",
    "404": "it is nowhere",
    "413": f"the body has more than {MAX_BODY_BYTES} bytes",
    "500": "a fault of the server's",
    "503": "the request loop does not answer",
}


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary, body in OPERATIONS:
        operation: dict[str, Any] = {"summary": summary, "responses": _responses(method, path, body is not None)}
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if body is not None:
            about = f"At most {MAX_BODY_BYTES} bytes."
            operation["requestBody"] = {"description": about, "content": {"application/json": {"schema": body}}}
        paths.setdefault(path, {})[method] = operation
    return {"openapi": "3.1.0", "info": {"title": "kvcore serve", "version": "1"}, "paths": paths}


def _responses(method: str, path: str, has_body: bool) -> dict[str, Any]:
    """Return what an operation answers, by status."""
    applies = {
        "403": method != "get",
        "404": path in ("/chunks/{chunk}", "/pin"),
        "413": has_body,
    }
    content = {"application/json": {"schema": _ERROR}}
    errors = {
        status: {"description": about, "content": content}
        for status, about in _ERRORS.items()
        if applies.get(status, True)
    }
    return {"200": {"description": "done"}, **errors}


PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>kvcore serve</title>
<style>body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}
td{padding:.3em .8em;border-top:1px solid #ccc;vertical-align:top}code{white-space:nowrap}</style>
<h1>kvcore serve</h1><p>The same as <a href="/openapi.json">OpenAPI</a>.</p><table id="t"></table>
<script>fetch("/openapi.json").then(r=>r.json()).then(d=>{const t=document.getElementById("t");
for(const [path,ops] of Object.entries(d.paths))for(const [method,op] of Object.entries(ops)){
const row=t.insertRow();const code=document.createElement("code");code.textContent=method.toUpperCase()+" "+path;
row.insertCell().append(code);row.insertCell().textContent=op.summary;
const body=op.requestBody?Object.keys(op.requestBody.content["application/json"].schema.properties).join(", "):"";
row.insertCell().textContent=body}});</script></html>
"""
