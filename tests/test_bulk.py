"""Export and import: what comes back is what went out, all of it or nothing, whatever is in it."""

import asyncio
import csv
import io
import json
import shutil
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.admin import rows
from gwproxy.admin.bulk import Line, Outcome
from gwproxy.admin.rows import BadRow, Columns, Cutter, Format, csv_line, csv_row, neutral, restored
from gwproxy.core.errors import InvalidRequest
from gwproxy.core.identity import User
from gwproxy.log import Log
from gwproxy.state.directory import NOBODY
from gwproxy.state.imports import Draft
from gwproxy.state.keyring import Keyring
from gwproxy.state.store import Kept, opened
from gwproxy.storage.segments import JournalRefused
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, bearer, chat, make_key
from tests.office import Disk
from tests.scene import until

NDJSON, CSV = {"Content-Type": "application/x-ndjson"}, {"Content-Type": "text/csv"}


async def load(front: Front, data: Any, how: dict[str, str] = NDJSON, query: str = "") -> Any:
    if not isinstance(data, bytes):
        data = b"".join(json.dumps(row).encode() + b"\n" for row in data)
    response = await front.client.post(
        f"/admin/import?{query}", data=data, headers={**ADMIN, **how}
    )
    return response.status, await response.json()


async def dump(front: Front, query: str = "") -> bytes:
    response = await front.client.get(f"/admin/export?{query}", headers=ADMIN)
    assert response.status == 200, await response.text()
    assert response.headers["Cache-Control"] == "no-store"
    return await response.read()


async def user(front: Front, user_id: str) -> Any:
    response = await front.client.get(f"/admin/users/{user_id}", headers=ADMIN)
    return (await response.json()) if response.status == 200 else None


PEOPLE = [
    {"kind": "organization", "org_id": "acme", "name": "Acme", "monthly_budget_usd": "100"},
    {"user_id": "ann", "org_id": "acme", "email": "ann@example.org", "rpm": 5},
    {"kind": "user", "email": "bob@example.org", "monthly_limit_usd": "0.5"},
]


async def test_a_file_comes_into_force_whole_and_twice_changes_nothing(front: Front) -> None:
    status, dry = await load(front, PEOPLE, query="dry_run=1")
    assert (status, dry["dry_run"], dry["committed"]) == (200, True, False)
    assert dry["counts"] == {"created": 3, "updated": 0, "unchanged": 0, "wrong": 0}
    assert await user(front, "ann") is None

    status, report = await load(front, PEOPLE)
    assert (status, report["committed"]) == (200, True)
    assert [row["result"] for row in report["rows"]] == ["created"] * 3
    assert [row["line"] for row in report["rows"]] == [1, 2, 3]
    assert (await user(front, "ann"))["org_id"] == "acme"
    bob = report["rows"][2]["id"]
    assert (await user(front, bob))["monthly_limit_usd"] == "0.500000000"

    store = front.gateway.app._store  # type: ignore[union-attr]
    lsn = store.ledger.state.lsn
    status, again = await load(front, PEOPLE)
    assert again["counts"] == {"created": 0, "updated": 0, "unchanged": 3, "wrong": 0}
    assert store.ledger.state.lsn == lsn
    status, changed = await load(front, [{"email": "BOB@example.org", "status": "suspended"}])
    assert changed["rows"] == [{"line": 1, "result": "updated", "kind": "user", "id": bob}]
    assert (await user(front, bob))["monthly_limit_usd"] == "0.500000000"

    # Each row is on record, with who imported it.
    await store.catch_up(2.0)
    async with store.database.reader() as reader:
        found = await reader.read("SELECT * FROM audit WHERE lsn = ? ORDER BY noun, id", (lsn,))
    assert [row["noun"] for row in found] == ["import", "organization", "user", "user"]
    assert {row["action"] for row in found} == {"import"}
    assert all(row["request_id"].startswith("req_") and row["actor"] for row in found)


async def test_what_was_exported_can_be_imported_elsewhere(
    front: Front, start_gateway: StartGateway
) -> None:
    odd = {
        "kind": "organization",
        "org_id": "odd",
        "name": "=HYPERLINK(\"x\"), 'quoted' \N{PILE OF POO}",
        "monthly_budget_usd": None,
        "failure_mode": "open",
        "fallback_daily_limit_usd": "0",
        "allowed_features": ["audio", "speed"],
        "prices": {"mock/echo": {"input": "1.5", "output": "2.00"}},
        "cache": True,
        "created_at": "2020-01-01T00:00:00Z",
    }
    assert (await load(front, [*PEOPLE, odd]))[0] == 200
    other = await start_gateway()
    whole = await dump(front)
    status, report = await load(other, whole)
    assert (status, report["counts"]["wrong"]) == (200, 0)
    assert told(await dump(other)) == told(whole)
    third = await start_gateway()
    for kind in ("organization", "user"):
        table = await dump(front, f"format=csv&kind={kind}")
        assert b"\r\n" in table
        status, report = await load(third, table, CSV, f"kind={kind}")
        assert (status, report["counts"]["wrong"]) == (200, 0), report
    assert told(await dump(third)) == told(whole)


async def test_what_was_exported_can_be_imported_again_after_an_organization_is_deleted(
    front: Front, start_gateway: StartGateway
) -> None:
    assert (await load(front, PEOPLE))[0] == 200
    deleted = await front.client.delete("/admin/organizations/acme", headers=ADMIN)
    assert deleted.status == 204
    whole, table = await dump(front), await dump(front, "kind=user&format=csv")
    assert b'"ann"' not in whole and b"ann," not in table
    for place in (front, await start_gateway()):
        status, report = await load(place, whole)
        assert (status, report["counts"]["wrong"]) == (200, 0), report
    status, report = await load(front, table, CSV, "kind=user")
    assert (status, report["counts"]["updated"]) == (200, 0), report
    assert (await user(front, "ann"))["org_id"] == "acme"


def told(export: bytes) -> list[dict[str, Any]]:
    """Without the times of those who had been there before."""
    rows = [json.loads(line) for line in export.splitlines()]
    for row in rows:
        if "default" in (row.get("org_id"), row.get("user_id")):
            del row["created_at"]
    return rows


async def test_one_wrong_row_keeps_out_all_and_each_is_named(front: Front) -> None:
    rows = [
        {"user_id": "fine"},
        {"user_id": "no good"},
        {"user_id": "x1", "rpm": -1},
        {"user_id": "x2", "monthly_limit_usd": 1e30},
        {"user_id": "x3", "monthly_limit_usd": "-5"},
        {"user_id": "x4", "colour": "red"},
        {"user_id": "x5", "org_id": "nowhere"},
        {"user_id": "fine"},
        {"user_id": "x6", "email": "a@example.org"},
        {"user_id": "x7", "email": "A@example.org"},
        {"rpm": 5},
        {"kind": "organization"},
        {"kind": "planet", "org_id": "earth"},
        {"kind": "organization", "org_id": "o", "name": "a\u202eb"},
        {"user_id": "x8", "created_at": "yesterday"},
    ]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    data += b'{"user_id": "x9"\n\xff\xfe{}\n[]\n'
    status, report = await load(front, data)
    assert status == 400
    assert report["error"]["code"] == "invalid_rows"
    assert "nothing was imported" in report["error"]["message"]
    assert not report["committed"]
    wrong = {row["line"]: row["message"] for row in report["rows"] if row["result"] == "wrong"}
    assert set(wrong) == {2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18}
    words = {2: "user_id", 3: "rpm", 4: "monthly_limit_usd", 5: "negative", 6: "colour"}
    words |= {7: "org_id", 8: "twice", 10: "twice", 11: "user_id", 12: "org_id", 14: "name"}
    words |= {15: "created_at", 16: "JSON", 17: "UTF-8", 18: "JSON"}
    for line, word in words.items():
        assert word in wrong[line], (line, wrong[line])
    assert await user(front, "fine") is None
    status, report = await load(front, data, query="dry_run=1")
    assert (status, report["counts"]["wrong"]) == (200, 16)


async def test_addresses_and_ids_that_are_taken_are_refused(front: Front) -> None:
    await load(front, [{"user_id": "ann", "email": "ann@example.org"}, {"user_id": "gone"}])
    await front.client.delete("/admin/users/gone", headers=ADMIN)
    status, report = await load(
        front,
        [
            {"user_id": "ann", "email": "new@example.org"},
            {"user_id": "eve", "email": "ann@example.org"},
            {"user_id": "gone"},
        ],
    )
    assert status == 400
    assert [row["result"] for row in report["rows"]] == ["updated", "wrong", "wrong"]


async def test_a_flag_that_is_none_is_said_to_be_0_or_1(front: Front) -> None:
    status, answer = await load(front, PEOPLE, query="dry_run=yes")
    assert (status, answer["error"]["param"]) == (400, "dry_run")
    assert answer["error"]["message"] == "`dry_run` must be 0 or 1."


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"user_id,colour\nann,red\n", "colour"),
        (b"user_id,emial\nann,red\n", "emial"),
        (b"status,rpm\nactive,5\n", "user_id"),
        (b"user_id,rpm,rpm\nann,5,5\n", "rpm"),
        ("user_id\nann\n".encode("utf-16"), None),
        (b'"user_id\nann\n' + b"x" * rows.LONGEST_ROW_BYTES, None),
    ],
)
async def test_a_header_that_cannot_be_used_is_refused(
    front: Front, data: bytes, param: str | None
) -> None:
    status, answer = await load(front, data, CSV)
    assert status == 400
    assert answer["error"]["param"] == param


async def test_csv_as_spreadsheets_write_it(front: Front) -> None:
    data = (
        "\ufeffuser_id;email;monthly_limit_usd;rpm\r\n"
        'ann;"ann@example.org";12.50;\r\n'
        "\r\n"
        '"bob";;;7\r\n'
    ).encode()
    status, report = await load(front, data, CSV)
    assert status == 200, report
    ann, bob = await user(front, "ann"), await user(front, "bob")
    assert (ann["monthly_limit_usd"], ann["rpm"], ann["org_id"]) == (
        "12.500000000",
        None,
        "default",
    )
    assert (bob["email"], bob["rpm"]) == (None, 7)
    assert [row["line"] for row in report["rows"]] == [2, 4]
    # A column that is missing leaves what is there; an empty field of a limit takes it away.
    status, report = await load(front, b"user_id,monthly_limit_usd\nann,\n", CSV)
    ann = await user(front, "ann")
    assert (ann["monthly_limit_usd"], ann["email"]) == (None, "ann@example.org")
    for bad, words in (
        (b"user_id,rpm\nann,5,6\n", "2 columns, and 3"),
        (b'user_id,rpm\nann,"5"x\n', "quotes"),
        (b"user_id,rpm\nann,five\n", "rpm"),
        (b"user_id,rpm\nann," + b"9" * 5000 + b"\n", "rpm"),
    ):
        status, report = await load(front, bad, CSV)
        assert status == 400
        assert words in report["rows"][0]["message"]


async def test_a_body_of_another_kind_is_refused(front: Front) -> None:
    for kind, status in (("application/json", 415), ("text/plain", 415)):
        assert (await load(front, b"{}", {"Content-Type": kind}))[0] == status
    response = await front.client.get("/admin/export?format=csv", headers=ADMIN)
    assert response.status == 400
    for method, path in (("GET", "export"), ("POST", "import")):
        for headers in ({}, bearer(front.key)):
            answer = await front.client.request(method, f"/admin/{path}", headers=headers)
            assert answer.status == 401


async def test_keys_go_on_and_are_in_their_users_new_organization(front: Front) -> None:
    assert (await front.chat(chat())).status == 200
    move = [{"kind": "organization", "org_id": "acme"}, {"user_id": "alice", "org_id": "acme"}]
    assert (await load(front, move))[0] == 200
    assert (await front.chat(chat())).status == 200
    acme = await front.client.get("/admin/organizations/acme/usage", headers=ADMIN)
    assert (await acme.json())["request_count"] == 1
    members = await front.client.get("/admin/organizations/acme/users", headers=ADMIN)
    assert [row["user_id"] for row in (await members.json())["data"]] == ["alice"]
    assert (await load(front, [{"user_id": "alice", "status": "suspended"}]))[0] == 200
    assert (await front.chat(chat())).status == 403


async def test_no_secret_leaves_with_an_export(front: Front) -> None:
    key = await make_key(front.client, "bob", name="laptop")
    await front.chat(chat())
    for query in ("", "format=csv&kind=user", "kind=usage", "kind=usage&format=csv"):
        found = await dump(front, query)
        assert b"bob" in found or b"alice" in found
        for secret in (key, front.key, key[17:49]):
            assert secret.encode() not in found


async def test_a_months_use_is_exported_with_its_corrections_and_its_total(front: Front) -> None:
    assert (await front.chat(chat())).status == 200
    found = [json.loads(line) for line in (await dump(front, "kind=usage")).splitlines()]
    assert [row["kind"] for row in found] == ["usage", "total"]
    assert found[0]["cost_usd"] == found[1]["cost_usd"] == "0.000015000"
    assert (found[1]["request_count"], found[1]["behind"]) == (1, 0)
    table = csv.DictReader(io.StringIO((await dump(front, "kind=usage&format=csv")).decode()))
    [row] = table
    assert (row["user_id"], row["input_tokens"]) == ("alice", "11")
    assert await dump(front, "kind=usage&format=csv&month=2020-02") != b""
    response = await front.client.get("/admin/export?kind=usage&month=2020-13", headers=ADMIN)
    assert response.status == 400


# -- while others work ---------------------------------------------------------------------------


async def test_what_somebody_else_changes_meanwhile_stays(front: Front) -> None:
    """An import that is half sent: one user more, one that it has itself, and a second import."""
    go_on = asyncio.Event()

    async def slowly(*lines: bytes) -> Any:
        yield lines[0]
        await go_on.wait()
        for line in lines[1:]:
            yield line

    async def send(*lines: bytes) -> Any:
        response = await front.client.post(
            "/admin/import", data=slowly(*lines), headers={**ADMIN, **NDJSON}
        )
        return response.status, await response.json()

    store = front.gateway.app._store  # type: ignore[union-attr]

    async def while_it_runs(*lines: bytes, change: dict[str, Any]) -> Any:
        go_on.clear()
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(send(*lines))
            await until(lambda: store.imports.under_way and store.imports.under_way.users)
            assert (await load(front, [{"user_id": "other"}]))[0] == 409
            made = await front.client.post("/admin/users", json=change, headers=ADMIN)
            assert made.status == 201
            go_on.set()
        return sending.result()

    lines = (b'{"user_id":"a1"}\n', b'{"user_id":"a2","email":"a2@example.org"}\n')
    status, _ = await while_it_runs(*lines, change={"user_id": "between"})
    assert status == 200
    listed = await front.client.get("/admin/users", headers=ADMIN)
    ids = [row["user_id"] for row in (await listed.json())["data"]]
    assert ids == ["a1", "a2", "alice", "between"]
    lines = (b'{"user_id":"b1"}\n{"user_id":"b2"}\n', b"\n")
    status, answer = await while_it_runs(*lines, change={"user_id": "b2"})
    assert status == 409
    assert "user b2" in answer["error"]["message"]
    assert await user(front, "b1") is None
    lines = (b'{"user_id":"c1","email":"c@example.org"}\n', b"\n")
    status, _ = await while_it_runs(*lines, change={"user_id": "c2", "email": "C@example.org"})
    assert status == 409


# -- across a crash ------------------------------------------------------------------------------


def at(folder: Path) -> Kept:
    return Kept(folder / "gwproxy.db", folder / "journal", segment_bytes=1 << 20)


def quiet() -> Log:
    return Log(io.StringIO(), "error")


async def everything(folder: Path) -> list[User]:
    async with opened(at(folder), quiet(), files=Disk()) as store:
        await store.catch_up(5.0)
        stored = await store.database.read("SELECT user_id, email FROM user ORDER BY user_id")
        known = [*store.keyring.users_after("")]
        assert [tuple(row) for row in stored] == [(each.user_id, each.email) for each in known]
        return known


class Snapshots(Disk):
    """A disk that keeps a copy of the folder as it is before each call that changes it."""

    def __init__(self, folder: Path, into: Path) -> None:
        super().__init__()
        self.folder, self.into, self.armed, self.count = folder, into, False, 0

    def _snap(self) -> None:
        if self.armed:
            shutil.copytree(self.folder, self.into / str(self.count))
            self.count += 1

    def create(self, path: Path, /) -> int:
        self._snap()
        return Disk.create(self, path)

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        self._snap()
        return Disk.pwrite(self, fd, data, offset)

    def fsync(self, fd: int, /) -> None:
        self._snap()


async def test_a_process_killed_at_any_step_has_imported_all_or_nothing(tmp_path: Path) -> None:
    folder, into = tmp_path / "state", tmp_path / "snapshots"
    folder.mkdir()
    disk = Snapshots(folder, into)
    async with opened(at(folder), quiet(), files=disk) as store:
        await store.directory.create_user(user_id="first", email="first@example.org")
        await store.catch_up(5.0)
        with store.imports.draft() as draft:
            for number in range(700):
                draft.put_user(f"u{number:03}", {"email": f"u{number}@example.org"}, None)
            draft.put_user("first", {"email": "second@example.org"}, None)
            disk.armed = True
            await store.imports.commit(draft, NOBODY)
            disk._snap()
            disk.armed = False
        expected = [*store.keyring.users_after("")]
        assert len(expected) == 701
        # A new row's address is known at once, the old one is free.
        assert store.keyring.user_with_email("SECOND@example.org") is not None
        assert store.keyring.user_with_email("first@example.org") is None
    assert disk.count >= 4
    seen = set()
    for number in range(disk.count):
        found = await everything(into / str(number))
        seen.add(len(found))
        assert len(found) == 1 or found == expected
        left = [*(into / str(number) / "journal").glob("import-*")]
        assert len(left) == (len(found) > 1), "a file without a record goes at the next start"
    assert seen == {1, 701}
    # And once more, after the database had it.
    assert await everything(folder) == expected


async def test_rows_that_are_gone_or_damaged_are_noticed_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    copy = tmp_path / "copy"
    async with opened(at(folder), quiet(), files=Disk()) as store:
        await store.catch_up(5.0)
        store.writer._database = _Lost()  # the journal alone has it
        with store.imports.draft() as draft:
            draft.put_user("ann", {}, None)
            await store.imports.commit(draft, NOBODY)
            shutil.copytree(folder, copy)
        store.writer._database = store.database
    [file] = (copy / "journal").glob("import-*")
    good = file.read_bytes()
    file.write_bytes(good.replace(b"ann", b"eve"))
    with pytest.raises(JournalRefused, match="damaged"):
        await everything(copy)
    file.unlink()
    with pytest.raises(JournalRefused, match="put the file back"):
        await everything(copy)
    file.write_bytes(good)
    assert [each.user_id for each in await everything(copy)] == ["ann"]


class _Lost:
    def __getattr__(self, name: str) -> Any:
        raise sqlite3.OperationalError("disk I/O error")


async def test_a_row_is_written_once_though_the_directory_is_read_anew(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    async with opened(at(folder), quiet(), files=Disk()) as store:
        with store.imports.draft() as draft:
            draft.put_organization("acme", {"name": "Acme"}, None)
            draft.put_user("ann", {"org_id": "acme"}, None)
            await store.imports.commit(draft, NOBODY)
    for _ in range(2):
        assert len(await everything(folder)) == 1
    with closing(sqlite3.connect(folder / "gwproxy.db")) as connection:
        rows = connection.execute("SELECT noun, id, before FROM audit ORDER BY noun").fetchall()
    assert [row[0] for row in rows] == ["import", "organization", "user"]


# -- rows out of bytes ---------------------------------------------------------------------------

cells = st.lists(st.text(max_size=8), min_size=2, max_size=4)


@given(table=st.lists(cells, min_size=1, max_size=5), cuts=st.lists(st.integers(1, 9), max_size=40))
def test_csv_is_read_back_as_it_was_written_however_it_is_cut(table, cuts) -> None:
    table = [[cell.replace("\0", "") for cell in row] for row in table]
    data = b"a,b\r\n" + b"".join(csv_line(row) for row in table)
    cutter, found = Cutter(Format.CSV), []
    for size in [*cuts, len(data)]:
        found += [row for _, row in cutter.feed(data[:size])]
        data = data[size:]
    found += [row for _, row in cutter.end()]
    assert found[0] == b"a,b\r\n"
    columns = Columns("a,b", ["a", "b"])
    written = [row for row in table if csv_line(row).strip()]
    assert len(found) - 1 == len(written)
    for row, raw in zip(written, found[1:], strict=True):
        if len(row) != 2:
            with pytest.raises(BadRow):
                columns.read(raw.decode())
        else:
            assert [*columns.read(raw.decode()).values()] == row


@given(st.text())
def test_no_cell_begins_a_formula_and_none_is_changed_by_that(text: str) -> None:
    safe = neutral(text)
    assert not safe.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert restored(safe) == text


@given(
    st.text(alphabet="'=+-@\t\r1", max_size=5),
    st.decimals(allow_nan=False, allow_infinity=False, places=9),
)
def test_text_comes_back_whatever_apostrophes_it_has_and_an_amount_stays_a_number(
    text: str, amount: Decimal
) -> None:
    assert restored(neutral(text)) == text
    [[name, written]] = csv.reader(
        [csv_row(("name", "amount_usd"), (text, f"{amount:f}")).decode()]
    )
    assert (restored(name), written) == (text, f"{amount:f}")


def test_a_row_without_an_end_is_refused_before_it_fills_the_memory() -> None:
    for form in Format:
        cutter = Cutter(form)
        with pytest.raises(InvalidRequest, match="longer than"):
            for _ in range(10):
                [*cutter.feed(b'"' + b"x" * 100_000)]


def test_what_an_import_held_is_let_go_in_slices() -> None:
    draft = Draft(Keyring(), lambda below: 0, 1)
    outcome = Outcome(dry_run=False)
    draft.put_organization("acme", {}, None)
    for number in range(5_000):
        fields = {"email": f"{number}@example.org", "org_id": "acme"}
        result, name = draft.put_user(f"u-{number}", fields, None)
        outcome.add(Line(number, result, "user", name))
    left = []
    for _ in draft.let_go():
        left.append(len(draft.users) + len(draft.emails))
    assert left[0] == 8_000 and left == sorted(left, reverse=True) and left[-1] == 0
    assert len(left) > 5
    parts, lines = [], []
    for part in outcome.json():
        parts.append(part)
        lines.append(len(outcome.lines))
    assert lines == [5_000, 4_000, 3_000, 2_000, 1_000, 0, 0]
    rows = orjson.loads(b"".join(parts))["rows"]
    assert [row["line"] for row in rows] == [*range(5_000)]
