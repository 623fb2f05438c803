"""The admin API's description: it covers exactly what there is, and what there is keeps to it."""

import asyncio
import re
import sys
from typing import Any

import jsonschema_rs
import pytest

from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, ADMIN_KEY
from tests.plane import Plane

METHODS = {"get", "post", "patch", "put", "delete"}


async def fetch(front: Front) -> dict[str, Any]:
    answer = await front.client.get("/admin/openapi.json", headers=ADMIN)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    found: dict[str, Any] = await answer.json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


async def test_the_document_covers_exactly_the_routes_that_there_are(front: Front) -> None:
    app = front.gateway.app
    assert app is not None
    served = {
        (route.method, route.path)
        for each in app._fronts
        for route in each.router.routes
        if route.path.startswith("/admin")
    }
    described = [(method, path) for method, path, _ in operations(await fetch(front))]
    assert len(described) == len(set(described))
    assert set(described) == served
    assert len(served) > 30


async def test_the_document_is_whole(front: Front) -> None:
    document = await fetch(front)
    assert document["openapi"].startswith("3.1")
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    for _, path, operation in operations(document):
        declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert declared == set(re.findall(r"\{(\w+)\}", path))
        assert operation["summary"].endswith(".")
        assert {"401", "429", "503"} <= set(operation["responses"])
    for reference in references(document):
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert isinstance(found, dict)
    new = document["components"]["schemas"]["NewUser"]
    assert new["additionalProperties"] is False
    assert new["properties"]["monthly_limit_usd"]["anyOf"][0]["type"] == "string"
    assert "digest" not in str(document)
    body = document["paths"]["/admin/import"]["post"]["requestBody"]
    assert set(body["content"]) == {"application/x-ndjson", "text/csv"}
    for kind, key in (("UserRow", "user_id"), ("OrganizationRow", "org_id")):
        assert kind in body["description"]
        assert {key, "kind", "created_at"} <= set(
            document["components"]["schemas"][kind]["properties"]
        )


@pytest.mark.parametrize(
    ("amount", "may"),
    [
        *((each, True) for each in ("1", "10", "50", "0.5", "100.05", "0.000000001", "123456789")),
        *((each, True) for each in ("999999999.999999999", "1000000000", "1000000000.0", 0.5, 10)),
        *((each, False) for each in ("0", "0.0", "000", "", ".", "-1", "1e2", "1.", ".5", "1,5")),
        *((each, False) for each in ("0.0000000001", "1000000000.1", "10000000000", 0, -1, None)),
    ],
)
async def test_the_document_allows_just_the_amounts_that_a_grant_takes(
    plane: Plane, amount: Any, may: bool
) -> None:
    _, document, _ = await plane.call("GET", "/admin/openapi.json")
    schema = document["components"]["schemas"]["Grant"]["properties"]["amount_usd"]
    assert jsonschema_rs.is_valid(schema, amount) is may
    await plane.call("POST", "/admin/users", {"user_id": "ann"})
    sent = {"amount_usd": amount, "reason": "x"}
    status, answer, _ = await plane.call("POST", "/admin/users/ann/grants", sent)
    if may:
        assert status == 201
    else:
        assert (status, answer["error"]["param"]) == (400, "amount_usd")


@pytest.mark.parametrize(
    ("name", "may"),
    [
        *((each, True) for each in ("Acme", "M\u00fcller & Co", "\u4eac\u90fd\u3000\u652f\u5e97")),
        ("\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f", True),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", True),
        *(
            (f"a{each}b", False)
            for each in "\0\t\n\x7f\x85\xa0\u200b\u200e\u2028\u202e\u2066\ufeff"
        ),
        *((each, False) for each in ("", "x" * 201, 5)),
    ],
)
async def test_the_document_allows_just_the_names_that_are_taken(
    plane: Plane, name: Any, may: bool
) -> None:
    _, document, _ = await plane.call("GET", "/admin/openapi.json")
    schema = document["components"]["schemas"]["NewOrganization"]["properties"]["name"]
    assert jsonschema_rs.is_valid(schema, name) is may
    status, answer, _ = await plane.call("POST", "/admin/organizations", {"name": name})
    assert (status, answer.get("name")) == (201, name) if may else status == 400


@pytest.mark.parametrize(
    ("rate", "may"),
    [
        *((each, True) for each in ("0", "2.50", "0.000001", "1000000", "1000000.00", 1.5)),
        *((each, False) for each in ("1e3", "-0", "0.0000001", "1000000.1", "02000000", -1)),
    ],
)
async def test_the_document_allows_just_the_prices_that_are_taken(
    plane: Plane, rate: Any, may: bool
) -> None:
    _, document, _ = await plane.call("GET", "/admin/openapi.json")
    schema = document["components"]["schemas"]["NewPrice"]["properties"]["input"]
    assert jsonschema_rs.is_valid(schema, rate) is may
    sent = {"prices": {"mock/echo": {"input": rate, "output": "1"}}}
    assert (await plane.call("POST", "/admin/organizations", sent))[0] == (201 if may else 400)


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for child in value.values() for each in references(child)]
    if isinstance(value, list):
        return [each for child in value for each in references(child)]
    return []


CHECKS = ",".join(
    (
        *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
        *("response_headers_conformance", "response_schema_conformance", "unsupported_method"),
    )
)


async def schemathesis(front: Front, *options: str) -> None:
    """Let it try all operations against the running server; what it finds is the failure."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{front.url}/admin/openapi.json"),
        *("--header", f"Authorization: Bearer {ADMIN_KEY}", "--checks", CHECKS),
        *("--no-color", "--generation-database", "none", "--request-timeout", "20", *options),
        cwd=front.gateway.database.parent,  # it leaves a folder of its own
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()


async def test_a_stranger_finds_no_fault_in_any_operation(start_gateway: StartGateway) -> None:
    front = await start_gateway()
    await schemathesis(front, "--phases", "fuzzing", "--max-examples", "2", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_patient_stranger_finds_no_fault_either(start_gateway: StartGateway) -> None:
    front = await start_gateway()
    await schemathesis(front, "--max-examples", "40", "--max-time", "60")
