"""The proof that a journal is lawful: each decision in it is made again and compared.

Pure. `apply` trusts what it is given; this does not.
"""

from collections.abc import Iterator

from gwproxy.core.ledger import State
from gwproxy.core.records import AnyRecord, Attempt, Held, Mark, Reserve


def unlawful(state: State, record: AnyRecord) -> Iterator[str]:
    """What is wrong with a record that is about to be applied to `state`, in words."""
    before: tuple[Held, ...] = ()
    if isinstance(record, Mark | Attempt):
        hold = state.holds.get(record.r)
        if hold is None:
            yield f"record {record.lsn} is about reservation {record.r}, which is not open"
            return
        before = hold.holds
    elif not isinstance(record, Reserve):
        return
    own = {(held.account, held.period): held.hold for held in before}
    for held in record.holds:
        key = (held.account, held.period)
        balance = state.balances.get(key)
        already = own.get(key, 0)
        total = held.hold - already
        if balance is not None:
            total += balance.spent + balance.held
        where = f"record {record.lsn}: {held.account} {held.period}"
        if held.hold < 0:
            yield f"{where} holds {held.hold}"
        if total != held.total:
            yield f"{where} says {held.total} spent and held, and it is {total}"
        # A lawful lower limit may leave more held than it allows: only a raise has to fit.
        if held.limit is not None and total > held.limit and held.hold > already:
            yield f"{where} has {total} spent and held of {held.limit}"


def differences(one: State, other: State) -> Iterator[str]:
    """Where two states that should be the same are not: the first is the one from the journal."""
    for key in sorted(one.balances.keys() | other.balances.keys()):
        mine, theirs = one.balances.get(key), other.balances.get(key)
        figures = mine.figures() if mine else (0, 0, 0, 0)
        wanted = theirs.figures() if theirs else (0, 0, 0, 0)
        if figures != wanted:
            yield (
                f"{key[0]} {key[1]}: spent, credited, requests and held are {figures} by the "
                f"journal and {wanted} by the database"
            )
    for reservation in sorted(one.holds.keys() ^ other.holds.keys()):
        where = "journal" if reservation in one.holds else "database"
        yield f"reservation {reservation} is open in the {where} only"
