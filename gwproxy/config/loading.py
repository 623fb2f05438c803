"""Finding the file, reading it, and the way from it to the Config.

Rule of the room: the one place of the package that opens the configuration file.
"""

import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from gwproxy.config.problems import ConfigError, Problem
from gwproxy.config.reader import Reader
from gwproxy.config.tables import Config
from gwproxy.config.variables import FAMILIES, family

CONFIG_PATHS: Final = (Path("config.toml"), Path("/etc/gwproxy/config.toml"))
FILE_LIMIT_BYTES: Final = 1 << 20
_NAME_ONE: Final = "name one by --config FILE or GWPROXY_CONFIG"

_STAND_IN: Final = "0" * 32
"""It has the form of an account's id, and of any token."""


def find_config(explicit: str | Path | None, environ: Mapping[str, str]) -> Path:
    """The file to read: as named, else $GWPROXY_CONFIG, else the first of CONFIG_PATHS."""
    if explicit is not None:
        return Path(explicit)
    if named := environ.get("GWPROXY_CONFIG"):
        return Path(named)
    for path in CONFIG_PATHS:
        if path.is_file():
            return path
    what = f"there is no configuration file, and no {CONFIG_PATHS[1]} either"
    raise ConfigError(
        Problem(str(CONFIG_PATHS[0]), "", what, f"{_NAME_ONE}; `make run` needs none")
    )


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    catalogue: Mapping[str, str] = MappingProxyType({}),
    local: bool = False,
) -> Config:
    """Reads the file (None: the environment alone) and raises ConfigError with all problems.

    `local`: for whoever asks nobody upstream, so that variables which only that would need may be
    missing.

    `catalogue` has the names under which providers are known, each with the prefix it stands for:
    a chain may use them, also without a table of their own.
    """
    tree = {} if path is None else _read_toml(path)
    if local:
        environ = {**_stand_ins(tree, environ), **environ}
    return Reader(path, tree, environ, catalogue).config()


def _stand_ins(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Values for the variables of the upstream that are not set: nobody will see them."""
    families = [names for names in FAMILIES.values() if not any(map(environ.get, names))]
    missing = {names[0]: _STAND_IN for names in families}
    tables = [tree.get("upstream"), *_tables(tree.get("providers"))]
    for table in tables:
        for value in table.values() if isinstance(table, dict) else ():
            if isinstance(value, str) and value.startswith("env:"):
                name = value.removeprefix("env:")
                if not any(map(environ.get, family(name))):
                    missing[name] = _STAND_IN
    return missing


def _tables(found: Any) -> list[Any]:
    return [*found.values()] if isinstance(found, dict) else []


def _read_toml(path: Path) -> dict[str, Any]:
    def error(what: str, cure: str, line: int | None = None) -> ConfigError:
        return ConfigError(Problem(str(path), f"line {line}" if line else "", what, cure))

    try:
        with path.open("rb") as stream:
            data = stream.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise error("the file does not exist", _NAME_ONE) from None
    except OSError as cause:
        what = f"the file cannot be read ({cause.strerror})"
        raise error(what, "check its path and permissions") from None
    if len(data) > FILE_LIMIT_BYTES:
        raise error("the file is larger than 1 MiB", "check that it is the right one")
    try:
        text = data.decode()
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise error("the file is not UTF-8", "save it as UTF-8", line) from None
    try:
        # Money is read exactly: a binary float never sees it.
        return tomllib.loads(text, parse_float=Decimal)
    except (ValueError, InvalidOperation, RecursionError) as cause:
        said = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(cause))
        cure = "see https://toml.io for how it is written"
        if said is None:
            raise error("the file is not valid TOML", cure) from None
        line = int(said[2]) if said[2] else text.count("\n") + 1
        raise error(f"the file is not valid TOML ({said[1]})", cure, line) from None
