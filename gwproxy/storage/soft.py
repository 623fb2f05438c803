"""Small files of what may be lost without harm: replaced whole, read back if they are good.

Nothing is synced: after a power cut there may be an older one, or none.
"""

import json
import os
from pathlib import Path
from typing import Any, Final

import orjson

LARGEST_BYTES: Final = 64 << 20


class Broken(Exception):
    """It cannot be read, or is not what was written."""


def read(path: Path) -> Any:
    """The value that was written; None where there is no file. Broken."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise Broken(f"{path}: is larger than anything that is written there")
        return orjson.loads(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Broken(f"{path}: {error}") from error


def write(path: Path, value: Any) -> None:
    """OSError, and what was there before is there still."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    # Not by orjson, which lets no other thread run meanwhile: with megabytes that is felt.
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(value, file, separators=(",", ":"))
    unfinished.replace(path)
