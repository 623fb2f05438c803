"""What systemd is told of this process: ready, alive, on its way out. See sd_notify(3).

One datagram for each word, to the socket that $NOTIFY_SOCKET names; without one nothing is sent.
Telling never blocks and never fails: whoever is asked to watch us must not be able to stop us.
"""

import contextlib
import socket
from collections.abc import Mapping
from typing import Final

BEATS_PER_PERIOD: Final = 3
"""The watchdog waits for one sign of life a period: two may come late before it acts."""


class Notify:
    """`environ` is the process's own, `pid` its number."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        # A name in the kernel's own table instead of a file's: systemd writes its first byte as @.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.every_s = _beat_s(environ, pid)
        """How often `alive` is expected; None: nobody watches."""

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self, now_s: float) -> None:
        """Until `ready` is said again; `now_s` on the monotonic clock, which is systemd's too."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={int(now_s * 1e6)}")

    def alive(self, status: str) -> None:
        self._tell("WATCHDOG=1", f"STATUS={status}")

    def stopping(self, status: str, within_s: float) -> None:
        """The end takes so long at most, whatever the unit's own limit."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}", f"STATUS={status}")

    def close(self) -> None:
        self._socket.close()

    def _tell(self, *lines: str) -> None:
        if self._address:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)


def _beat_s(environ: Mapping[str, str], pid: int) -> float | None:
    period = environ.get("WATCHDOG_USEC", "")
    # The variables are inherited: what another process was asked for is not meant for us.
    if (
        not period.isdecimal()
        or not int(period)
        or environ.get("WATCHDOG_PID", str(pid)) != str(pid)
    ):
        return None
    return int(period) / 1e6 / BEATS_PER_PERIOD
