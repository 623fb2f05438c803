"""`gwproxy prices set`: override a price in the configuration, and touch nothing else there."""

import argparse
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from gwproxy.cli.prices.table import (
    BUILT_IN,
    FINE,
    HEAD,
    NOTHING_THERE,
    Refused,
    Row,
    as_json,
    configured,
    named,
    print_table,
    print_traits,
    rate_rows,
)
from gwproxy.cli.prices.toml_table import with_price
from gwproxy.config import Config, ConfigError, Prices, find_config, load
from gwproxy.core.money import format_rate, parse_rate
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE
from gwproxy.storage.files import OS_FILES


def set_price(args: argparse.Namespace) -> int:
    row = _wanted(args)
    name: str = args.model
    # The file itself, where its name is a link: it is replaced by another one in its folder.
    path = find_config(args.config, os.environ).resolve()
    before = load(path, os.environ, catalogue=CATALOGUE)
    old = configured(before)
    if variables := _standing(name):
        raise Refused(
            f"{', '.join(variables)} in the environment would win over the file: unset it first"
        )
    if row is not None:
        _check_name(name, before, old)
    try:
        raw = path.read_bytes()
        edited = with_price(raw.decode(), name, row and _as_toml(row)).encode()
        if edited == raw:
            after = before
        else:
            after = _replace(path, raw, edited, lambda draft: _checked(draft, before, name, row))
    except ValueError as error:
        raise Refused(f"{path} stays as it is: {error}") from None
    except OSError as error:
        raise Refused(f"{path} stays as it is: {error.strerror}") from None
    _tell(args, path, old, configured(after), written=edited != raw)
    return NOTHING_THERE if row is None and edited == raw else FINE


def _wanted(args: argparse.Namespace) -> Row | None:
    """The override as the command line says it; None to take it out."""
    given = ("input", "output", "cache_read", "cache_write", "max_output_tokens")
    row = {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    if args.unset:
        if row or args.reasons:
            raise Refused("--unset takes the whole override out: give it no prices")
        return None
    if not {"input", "output"} <= row.keys():
        raise Refused(
            "a price needs --input and --output, in USD per million tokens; --unset takes it out"
        )
    return {**row, "reasons": args.reasons}


def _as_toml(row: Row) -> dict[str, str]:
    """Prices go into quotes, as in the shipped file, so that no tool rounds them."""
    written = {}
    for key, value in row.items():
        if isinstance(value, Decimal):
            written[key] = f'"{format_rate(parse_rate(value))}"'
        elif value is not False:
            written[key] = json.dumps(value)
    return written


def _standing(name: str) -> list[str]:
    """The variables that price this model. Case, dashes and slashes are lost in their names."""

    def flat(text: str) -> str:
        return re.sub(r"[^a-z0-9]+", "_", text.lower())

    found = []
    for variable in sorted(os.environ):
        *table, model, _ = ["", "", *variable.upper().split("__")]
        if table[2:] == ["GWPROXY", "PRICES", "MODELS"] and flat(model) == flat(name):
            found.append(variable)
    return found


def _check_name(name: str, config: Config, book: PriceBook) -> None:
    """Refused where no request would ever take the price from under this name."""
    for other in config.prices.models:
        if other != name and book.canonical(other) == book.canonical(name):
            raise Refused(
                f'{config.file} prices this model as "{other}": change that one, or take it out '
                "with --unset first"
            )
    head, slash, model = name.partition("/")
    if slash and head in config.providers:
        prefix = config.providers[head].prefix or ""
        # The same rule by which the routes find a provider's prices.
        slug = CATALOGUE.get(prefix) or CATALOGUE.get(head) or prefix or head
        if book.canonical(f"{slug}/{model}") != book.canonical(name):
            raise Refused(
                f'[providers.{head}] is "{slug}" upstream, and prices go by that: write '
                f'"{slug}/{model}"'
            )


def _checked(draft: Path, before: Config, name: str, row: Row | None) -> Config:
    """The configuration in `draft`, which differs from `before` in this one price alone."""

    def others(config: Config) -> Config:
        models = {key: price for key, price in config.prices.models.items() if key != name}
        return replace(config, file=None, prices=Prices(models), warnings=())

    try:
        after = load(draft, os.environ, catalogue=CATALOGUE)
    except ConfigError as error:
        raise Refused(str(error).replace(str(draft), str(before.file))) from None
    found = after.prices.models.get(name)
    if others(after) != others(before) or (found and found.row()) != row:
        raise ValueError(f'[prices.models."{name}"] cannot be edited here; do it by hand')
    return after


def _replace(path: Path, raw: bytes, edited: bytes, check: Callable[[Path], Config]) -> Config:
    """Put `edited` in the place of `raw` once `check` has passed it; whoever reads the file, and
    whatever happens to the machine, finds either the old one or the new one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(edited)
            owner = path.stat()
            # A server that runs as somebody else must still be able to read it.
            os.fchown(stream.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(stream.fileno(), stat.S_IMODE(owner.st_mode))
            stream.flush()
            os.fsync(stream.fileno())
        config = check(draft)
        if path.read_bytes() != raw:
            raise ValueError("somebody else has just changed it; try again")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    OS_FILES.fsync_directory(path.parent)
    return config


def _tell(
    args: argparse.Namespace, path: Path, old: PriceBook, new: PriceBook, *, written: bool
) -> None:
    was, now = (book.rate(*named(args.model), time.time()) for book in (old, new))
    if args.json:
        found = {
            "model": args.model,
            "file": str(path),
            "written": written,
            "before": was and as_json(was),
            "now": now and as_json(now),
        }
        print(json.dumps(found))
        return
    outcome = "taken out" if args.unset else "written"
    if not written:
        outcome = "is not there" if args.unset else "says so already"
    print(f'{path}: [prices.models."{args.model}"] {outcome}\n')
    rows: list[tuple[str, ...]] = [HEAD]
    for label, rate in (("before", was), ("now", now))[not written :]:
        if rate is None:
            rows.append((f"{label}: no price", "-", "-", "-", "-", ""))
        else:
            rows += rate_rows(label, rate, "override" if rate.overridden else BUILT_IN)
    print_table(rows)
    if now is not None:
        print_traits(now)
    if written:
        print("\nA server that is running keeps its prices until it is restarted.")
