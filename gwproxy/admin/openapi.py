"""The admin API's own description, OpenAPI 3.1, made of the table of routes and of the very types
that check what is sent and write what is answered."""

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from gwproxy import __version__
from gwproxy.admin.ask import Answer, Ask, Route

_REF: Final = "#/components/schemas/{name}"
_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_JSON: Final = "application/json"


class Trouble(msgspec.Struct):
    """`param` names the field, the parameter or the header that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """Every refusal has this form."""

    error: Trouble


_WORDS: Final = {
    200: "As asked.",
    201: "Created.",
    204: "Done; there is nothing to show.",
    400: "Something in it is wrong; `param` names it.",
    401: "No admin key, or one that is not valid.",
    403: "This admin key may read only.",
    404: "There is none with this id.",
    408: "The body took too long to arrive.",
    409: "It is there already, or cannot be as things stand.",
    412: "It has another version by now than `If-Match` names.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    417: "An `Expect` other than 100-continue.",
    429: "Too many wrong admin keys from this address.",
    503: "Nothing can be recorded or read at the moment.",
}

_ANY_ROUTE: Final = (400, 401, 429, 503)
_WITH_BODY: Final = (408, 413, 415, 417)


class OpenApi:
    """`routes` are all others: the table is complete only when this is its last line."""

    def __init__(self, routes: Iterable[Route]) -> None:
        own = Route(
            method="GET",
            path="/admin/openapi.json",
            do=self.show,
            summary="This document.",
        )
        self.routes = (own,)
        self._table = (*routes, own)
        self._made: dict[str, Any] | None = None

    async def show(self, ask: Ask) -> Answer:
        if self._made is None:
            self._made = document(self._table)
        return Answer(self._made)


def document(routes: Iterable[Route]) -> dict[str, Any]:
    table = list(routes)
    shown = [each for route in table for each in (route.body, route.answers) if each is not None]
    shown += [each for route in table if route.streams is not None for each in route.streams.rows]
    _, schemas = msgspec.json.schema_components([Error, *shown], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, table)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gwproxy administration",
            "version": __version__,
            "description": "Amounts come in as decimal strings or JSON numbers, read digit by "
            "digit and never through a binary float; they go out as decimal strings.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                str(status): {"description": words, "content": _content(Error)}
                for status, words in _WORDS.items()
                if status >= 400
            },
            "securitySchemes": {"admin_key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"admin_key": []}],
    }


def _operation(route: Route, table: list[Route]) -> dict[str, Any]:
    names = _PARAMETER.findall(route.path)
    operation: dict[str, Any] = {
        "operationId": _name(route),
        "summary": route.summary,
        "tags": [route.path.split("/")[2]],
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": _ID} for name in names),
            *_query(route.query),
            *_headers(route),
        ],
        "responses": _responses(route, bool(names)),
    }
    if links := _links(route, table):
        operation["responses"][str(route.status)]["links"] = links
    if route.body is not None:
        needs = any(field.required for field in msgspec.structs.fields(route.body))
        operation["requestBody"] = {"required": needs, "content": _content(route.body)}
    if route.streams is not None and route.streams.takes:
        kinds = " or ".join(each.__name__ for each in route.streams.rows)
        operation["requestBody"] = {
            "description": f"One {kinds} a line; in CSV the first line names the fields.",
            "required": True,
            "content": _text(route.streams.takes),
        }
    return operation


def _name(route: Route) -> str:
    return re.sub(r"\W+", "_", route.do.__qualname__).lower()


def _links(route: Route, table: list[Route]) -> dict[str, Any]:
    """What can be done with that which was created: the operations whose paths go on from here."""
    if route.status != 201 or route.answers is None:
        return {}
    links = {}
    for other in table:
        names = _PARAMETER.findall(other.path)
        known = set(names) <= {*route.answers.__struct_fields__}
        if known and other.path.startswith(f"{route.path}/{{"):
            parameters = {name: f"$response.body#/{name}" for name in names}
            links[_name(other)] = {"operationId": _name(other), "parameters": parameters}
    return links


def _query(shape: type[msgspec.Struct] | None) -> list[dict[str, Any]]:
    if shape is None:
        return []
    _, schemas = msgspec.json.schema_components([shape], ref_template=_REF)
    parameters = []
    for name, schema in schemas[shape.__name__]["properties"].items():
        schema = _inlined(schema, schemas)
        if "anyOf" in schema and schema.pop("default", 0) is None:
            # A parameter is left out, it is never null.
            [kept] = [each for each in schema.pop("anyOf") if each != {"type": "null"}]
            schema |= kept
        parameter = {"name": name, "in": "query", "schema": schema}
        if "description" in schema:
            parameter["description"] = schema.pop("description")
        parameters.append(parameter)
    return parameters


def _inlined(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return dict(schemas[schema["$ref"].rpartition("/")[2]])
    found = dict(schema)
    if "anyOf" in found:
        found["anyOf"] = [_inlined(each, schemas) for each in found["anyOf"]]
    return found


def _headers(route: Route) -> list[dict[str, Any]]:
    headers = []
    if route.conditional:
        headers.append(
            {
                "name": "If-Match",
                "in": "header",
                "description": "The ETag of the version that the change is meant for.",
                "schema": {"type": "string", "pattern": r'^(\*|"[0-9]{1,9}")$'},
            }
        )
    if route.repeatable:
        headers.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "Sent again under the same key, a request is made once.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 200},
            }
        )
    return headers


def _responses(route: Route, about_one: bool) -> dict[str, Any]:
    good: dict[str, Any] = {"description": _WORDS[route.status]}
    if route.streams is not None and route.streams.gives:
        good["content"] = _text(route.streams.gives)
    elif route.status != 204:
        good["content"] = _content(route.answers)
    refusals = {*_ANY_ROUTE, *route.refusals}
    if route.writes:
        refusals.add(403)
    if about_one:
        refusals.add(404)
    if route.conditional:
        refusals.add(412)
    if route.repeatable:
        refusals.add(409)
    if route.body is not None or route.streams is not None:
        refusals.update(_WITH_BODY)
    bad = {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(refusals)}
    return {str(route.status): good, **bad}


def _text(media_types: Iterable[str]) -> dict[str, Any]:
    return {each: {"schema": {"type": "string"}} for each in media_types}


def _content(shape: type[msgspec.Struct] | None) -> dict[str, Any]:
    if shape is None:
        return {_JSON: {"schema": {"type": "object"}}}
    return {_JSON: {"schema": {"$ref": _REF.format(name=shape.__name__)}}}
