"""What a supervisor hears, as datagrams on a real socket of either kind."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gwproxy.notify import Notify

PID = 4711


@pytest.fixture(params=["file", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens, and its name as systemd writes it."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(5)
        if request.param == "abstract":
            listening.bind("\0" + name)
            name = "@" + name
        else:
            listening.bind(name)
        yield listening, name


def test_each_word_is_a_datagram_of_its_own(ear: tuple[socket.socket, str]) -> None:
    listening, name = ear
    notify = Notify({"NOTIFY_SOCKET": name}, PID)
    notify.ready("0 requests open")
    notify.reloading(12.5)
    notify.alive("7 requests open")
    notify.stopping("draining: 7 requests open", 50.5)
    notify.close()
    assert [listening.recv(1000).decode() for _ in range(4)] == [
        "READY=1\nSTATUS=0 requests open",
        "RELOADING=1\nMONOTONIC_USEC=12500000",
        "WATCHDOG=1\nSTATUS=7 requests open",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=50500000\nSTATUS=draining: 7 requests open",
    ]


@pytest.mark.parametrize(
    ("environ", "every_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "15000000"}, 5.0),
        ({"WATCHDOG_USEC": "15000000", "WATCHDOG_PID": str(PID)}, 5.0),
        ({"WATCHDOG_USEC": "15000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_a_watchdog_is_fed_three_times_in_its_period(
    environ: dict[str, str], every_s: float | None
) -> None:
    notify = Notify(environ, PID)
    assert notify.every_s == every_s
    notify.close()


def test_nobody_who_listens_is_nobody_who_is_told(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        notify = Notify(environ, PID)
        notify.ready("x")
        notify.close()


def test_an_ear_that_is_full_holds_up_nobody(ear: tuple[socket.socket, str]) -> None:
    _, name = ear
    notify = Notify({"NOTIFY_SOCKET": name}, PID)
    for _ in range(10_000):  # far more than a socket's buffer holds
        notify.alive("x" * 200)
    notify.close()
