"""`gwproxy prices list` and `show`: look into the price table."""

import argparse
import json
import sys
import time

from gwproxy.cli.prices.table import (
    FINE,
    HEAD,
    NOTHING_THERE,
    WRONG_USAGE,
    as_json,
    cells,
    configured_book,
    dated_json,
    figures,
    held_when,
    print_table,
    print_traits,
    rate_rows,
)


def list_prices(args: argparse.Namespace) -> int:
    book = configured_book(args)
    at_s = time.time() if args.at is None else args.at
    rates = {
        f"{provider}/{model}": rate
        for provider in ([args.provider] if args.provider else book.providers())
        for model in book.models(provider)
        if (rate := book.rate(provider, model, at_s)) is not None
    }
    if args.json:
        models = {name: as_json(rate) for name, rate in rates.items()}
        print(json.dumps({"version": book.version, "models": models}))
        return FINE if rates else NOTHING_THERE
    if not rates:
        print(f"No priced models at {args.provider}.", file=sys.stderr)
        return NOTHING_THERE
    rows: list[tuple[str, ...]] = [HEAD]
    for name, rate in rates.items():
        notes = ["tiers"] if len(rate.tiers) > 1 else []
        notes += ["override"] if rate.overridden else []
        rows.append((name, *cells(figures(rate, 0)), ", ".join(notes)))
    print_table(rows)
    print(f"\n{len(rates)} models, prices {book.version}")
    return FINE


def show_price(args: argparse.Namespace) -> int:
    provider, slash, model = args.model.partition("/")
    if not slash or not provider or not model:
        print("The model's name is PROVIDER/MODEL, such as openai/gpt-4o-mini.", file=sys.stderr)
        return WRONG_USAGE
    book = configured_book(args)
    rate = book.rate(provider, model, time.time() if args.at is None else args.at)
    history = book.history(provider, model)
    if rate is None:
        print(
            f"{args.model} has no price. Give it one in the configuration, under "
            f'[prices.models."{args.model}"]: gwproxy prices set {args.model} --input USD '
            "--output USD",
            file=sys.stderr,
        )
        return NOTHING_THERE
    if args.json:
        dated = [
            {**when, "holds": price.rate is rate}
            for when, price in zip(dated_json(history), history, strict=True)
        ]
        found = {"model": args.model, "version": book.version, **as_json(rate), "history": dated}
        print(json.dumps(found))
        return FINE
    origin = "overridden" if rate.overridden else f"listed as {rate.listed_as}"
    print(f"{args.model}, {origin}\n")
    rows: list[tuple[str, ...]] = [HEAD]
    holds = "now" if args.at is None else "then"
    for price in history:
        note = holds if len(history) > 1 and price.rate is rate else ""
        rows += rate_rows(held_when(price, history), price.rate, note)
    print_table(rows)
    print_traits(rate)
    print(f"price table        {book.version}")
    return FINE
