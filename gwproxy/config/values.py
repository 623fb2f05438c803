"""Values with a type of their own, and a value as it was found before it has one.

Rule of the room: a value cannot change, and a secret is told by `reveal()` alone.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gwproxy.config.problems import Wrong, kind

T = TypeVar("T")


class Secret:
    """A token or key. Printing, formatting or logging it shows stars; only `reveal()` tells it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __str__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a secret is not pickled: it would leave the process unseen")


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a listener waits: `tcp` has host and port, `unix` a path, `fd` an inherited socket."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Place:
    """What a parser may ask about the world: the environment and the folders of relative paths."""

    environ: Mapping[str, str]
    folder: Path
    """Of the configuration file: secrets' files and certificates are named from here."""
    state_folder: Path
    """Of databases and journals."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A value as it was found: of any TOML type from the file, always text from the environment."""

    value: object
    variable: str | None
    place: Place

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise Wrong(f"must be text, not {kind(self.value)}", "put it in quotes")
        return self.value


Parse = Callable[[Raw], T]
