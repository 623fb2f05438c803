"""Who does things: clients and their requests, the operator, the weather, those who clean up.

Each is a coroutine that waits between its steps for as long as the seed says. What the proxy's own
rooms do with sockets is done here with the played upstream, in the same order.
"""

import asyncio
import json
from dataclasses import replace
from typing import Any

import orjson
from multidict import CIMultiDict

from gwproxy.core.chat import ChatRequest
from gwproxy.core.errors import GatewayError, InsufficientQuota, StorageUnavailable
from gwproxy.core.identity import FailureMode, OnExhausted, Status, UnboundedPolicy
from gwproxy.core.records import Adjust
from gwproxy.core.routing import Candidate, Provider
from gwproxy.core.trace import Attempt, Trace
from gwproxy.state.ledger import NotRecorded, RecordUncertain
from gwproxy.state.reservation import Outcome, Reservation
from tests.simulator.life import Life
from tests.simulator.oracle import check
from tests.simulator.upstream import TARIFFS, Call, family, prompt_of

PROVIDERS = {name: Provider(name, name, name) for name in ("alpha", "beta", "gamma")}

ORGS: dict[str, dict[str, Any]] = {
    "open": {"failure_mode": FailureMode.OPEN},
    "shut": {"failure_mode": FailureMode.CLOSED, "unbounded_policy": UnboundedPolicy.STRICT},
    "loose": {
        "failure_mode": FailureMode.OPEN,
        "on_exhausted": OnExhausted.FINISH,
        "fallback_daily_limit": 100_000_000,
    },
}
USERS = {"ann": "open", "bob": "open", "cec": "shut", "dan": "loose"}
KEYS = {"a1": "ann", "a2": "ann", "b1": "bob", "c1": "cec", "d1": "dan"}
USD = 1_000_000_000


async def pause(life: Life, longest_s: float) -> None:
    await asyncio.sleep(life.random.uniform(0, longest_s))


# -- the operator --------------------------------------------------------------------------------


async def directory(life: Life) -> None:
    """Organizations, users and keys, as far as they are not there yet."""
    assert life.store is not None
    random, keyring, admin = life.random, life.store.keyring, life.store.directory
    while True:
        try:
            for org_id, fields in ORGS.items():
                if keyring.organization(org_id) is None:
                    budget = random.choice((None, 3 * USD, 12 * USD))
                    if org_id == "open":
                        fields = {
                            **fields,
                            "on_exhausted": random.choice([*OnExhausted]),
                            "unbounded_policy": random.choice([*UnboundedPolicy]),
                        }
                    await admin.create_organization(
                        org_id=org_id,
                        monthly_budget=budget,
                        **fields,
                    )
            for user_id, org_id in USERS.items():
                if keyring.user(user_id) is None:
                    limit = random.choice((USD, 2 * USD, 5 * USD))
                    await admin.create_user(
                        user_id=user_id,
                        org_id=org_id,
                        monthly_limit=limit,
                    )
            for name, user_id in KEYS.items():
                known = life.world.keys.get(name)
                if known is None or keyring.key(known[0]) is None:
                    limit = random.choice((None, None, USD))
                    key, text = await admin.create_key(
                        user_id,
                        name=name,
                        monthly_limit=limit,
                    )
                    life.world.keys[name] = (key.key_id, text)
            return
        except GatewayError as error:
            life.world.say("set-up:", error)
            await pause(life, 2)


async def admin(life: Life) -> None:
    """Lower and raise limits, grant, reset, revoke, suspend."""
    assert life.store is not None
    random, store, world = life.random, life.store, life.world
    while True:
        await pause(life, 2)
        what = random.random()
        try:
            if what < 0.35:
                await _limit(life, random.choice(list(USERS)))
            elif what < 0.75:
                _adjust(life, random.choice(list(USERS)))
            elif what < 0.85:
                name = random.choice(list(KEYS))
                key_id = world.keys[name][0]
                world.say("revoke", name)
                world.refused_keys.add(key_id)  # a restriction holds whatever happens to it
                await store.directory.revoke_key(KEYS[name], key_id)
                del world.keys[name]
                await directory(life)
            else:
                user_id = random.choice(list(USERS))
                await store.directory.set_user_status(user_id, Status.SUSPENDED)
                check(
                    store.keyring.user(user_id).status is Status.SUSPENDED,
                    "suspended, and not in force",
                )
                await pause(life, 1)
                await store.directory.set_user_status(user_id, Status.ACTIVE)
        except GatewayError as error:
            world.say("admin:", type(error).__name__, error)


async def _limit(life: Life, user_id: str) -> None:
    """A new limit for a user, as the directory would set it."""
    assert life.store is not None
    row = life.store.keyring.user(user_id)
    assert row is not None
    limit = life.random.choice((0, USD // 2, 2 * USD, 6 * USD))
    lower = row.monthly_limit is not None and limit < row.monthly_limit
    account = f"user:{user_id}"
    in_force = life.world.oracle.in_force

    def decide() -> Any:
        return replace(row, monthly_limit=limit, version=row.version + 1)

    try:
        await life.store.directory._record("update", decide)
    except StorageUnavailable:
        now = life.store.keyring.user(user_id)
        assert now is not None
        if lower:
            check(now.monthly_limit == limit, "a lower limit is not in force")
        in_force[account] = (now.monthly_limit, now.version)
        raise


def _adjust(life: Life, user_id: str) -> None:
    """A grant or a reset. It is recorded or it is not."""
    assert life.store is not None
    random, ledger = life.random, life.store.ledger
    month, _ = ledger.periods()
    account = (f"user:{user_id}", month)
    balance = ledger.state.balances.get(account)
    life.world.serial += 1
    if random.random() < 0.5 or balance is None:
        kind, delta = "grant", random.choice((USD // 10, USD))
    else:
        kind, delta = "reset", -balance.spent
    ledger.pay()
    ledger.post(
        Adjust(
            **ledger.stamp(),
            accounts=(account,),
            delta=delta,
            type=kind,
            actor="operator",
            reason="drill",
            idempotency_key=f"adjust-{life.world.serial}",
        )
    )


# -- the weather ---------------------------------------------------------------------------------


async def weather(life: Life) -> None:
    """Spells in which the disk, the database or both do badly."""
    random, world = life.random, life.world
    plan = world.plan
    while True:
        await pause(life, 8)
        disk, file = world.disk.weather, world.file.weather
        if plan.disk_faults:
            if random.random() < 0.5:
                disk.sync = random.choice((0.3, 1.0))
            if random.random() < 0.5:
                disk.pwrite = random.choice((0.05, 0.5, 1.0))
            if random.random() < 0.5:
                disk.short = random.choice((0.1, 0.6))
            if random.random() < 0.4:
                disk.truncate = random.choice((0.3, 1.0))
            disk.full = random.random() < 0.3
            if random.random() < 0.2:
                disk.read = 0.3
            if random.random() < 0.2:
                disk.directory = 0.5
        if plan.database_faults:
            for name in ("busy", "io", "commit", "rollback"):
                if random.random() < 0.4:
                    setattr(file, name, random.choice((0.05, 0.5, 1.0)))
            if random.random() < 0.15 and not life.swapped:
                life.swapped = True  # a second one within the hour is left to the operator
                world.say("somebody swaps the database's file")
                world.file.swap()
        life.loop.slow_threads = plan.slow and random.random() < 0.5
        world.say("weather:", vars(disk), vars(file))
        await pause(life, 8)
        disk.clear()
        file.clear()
        life.loop.slow_threads = False


async def clock(life: Life) -> None:
    """Wall clocks that leap, and nights that pass."""
    random, world = life.random, life.world
    while world.plan.clocks:
        await pause(life, 12)
        if random.random() < 0.2:
            world.say("a long time passes")
            asleep_s = random.choice((3600, 86400, 20 * 86400))
            life.loop.now_s += asleep_s
            world.jumped_s += asleep_s
        else:
            world.skew_s = random.choice((90_000.0, -600.0, -90_000.0, 40 * 86400.0, 30.0))
            world.say("the wall clock is off by", world.skew_s)
            await pause(life, 20)
            world.skew_s = 0.0


# -- clients -------------------------------------------------------------------------------------


async def client(life: Life) -> None:
    for _ in range(life.random.randint(2, 9)):
        await pause(life, 2)
        await request(life)


async def request(life: Life) -> None:
    """One request, by the seven verbs."""
    assert life.store is not None
    random, world, store = life.random, life.world, life.store
    name = random.choice(list(world.keys))
    _, text = world.keys[name]
    try:
        principal = store.keyring.authenticate(
            CIMultiDict({"Authorization": f"Bearer {text}"}), world.true_s()
        )
    except GatewayError:
        return
    check(principal.key_id not in world.refused_keys, "a revoked key was let in")
    models = random.sample(list(TARIFFS), random.randint(1, 3))
    words, messages = random.choice((5, 60, 400)), random.randint(1, 3)
    stream = random.random() < 0.75
    body: dict[str, Any] = {
        "model": "auto",
        "stream": stream,
        "messages": [{"role": "user", "content": " w" * words}]
        + [{"role": "user", "content": "w"}] * (messages - 1),
    }
    if random.random() < 0.5:
        body["max_tokens"] = random.choice((20, 200, 900))
    chat = ChatRequest.parse(orjson.dumps(body))
    chain = [
        Candidate(PROVIDERS[model.partition("/")[0]], model.partition("/")[2], model, model)
        for model in models
    ]
    world.serial += 1
    trace = Trace(f"req-{world.serial}", world.true_s())
    try:
        quote = await life.books.quote(principal, chat, chain)
        if world.defect == "forward-before-record":
            world.upstream.send(trace.request_id, models[0], 0).fate = "refused"
        await pause(life, 0.05)
        async with life.books.reserve(principal, quote, trace) as reservation:
            await converse(life, reservation, trace, prompt_of(messages, words))
    except (GatewayError, ConnectionError, asyncio.CancelledError) as error:
        world.say(trace.request_id, type(error).__name__, str(error)[:80])
        if isinstance(error, asyncio.CancelledError) and "left" not in error.args:
            raise
    if trace.outcome:
        world.upstream.story(trace.request_id).settled = True
    if trace.outcome == "unknown" and random.random() < 0.5:
        await reconcile(life, reservation)


async def converse(life: Life, reservation: Reservation, trace: Trace, prompt: int) -> None:
    """Walk the chain until somebody answers, then relay."""
    random, world = life.random, life.world
    failed = False
    for following in reservation.chain:
        planned = following
        if failed:
            held = await reservation.next(following, "failed")
            if held is None:
                continue
            planned = held
        candidate = planned.priced.candidate
        model = candidate.sent
        record = Attempt(candidate.provider.name, candidate.model)
        trace.attempts.append(record)
        trace.provider, trace.provider_model = candidate.provider.name, candidate.model
        meter = reservation.attempt(planned)
        await pause(life, 0.1)
        if random.random() < 0.1:
            failed = True  # could not connect
            continue
        reservation.sent()
        world.point()
        recorded = world.oracle.fold.open.get(reservation.lsn)
        check(recorded is not None, trace.request_id, "is sent, and not recorded")
        assert recorded is not None
        check(recorded.provider == candidate.provider.name, "an attempt that is not recorded")
        call = world.upstream.send(trace.request_id, model, prompt)
        world.say(trace.request_id, "goes to", model)
        await pause(life, 1)
        if random.random() < 0.08:
            raise asyncio.CancelledError("left")
        fate = random.random()
        if fate < 0.12:
            call.fate = "refused"
            reservation.refused()
            failed = True
            continue
        if fate < 0.2:
            reservation.unanswered()
            failed = True
            continue
        call.fate = "answering"
        reservation.answering()
        limit = planned.plan.lowered or reservation.quote.request.max_output_tokens
        call.limit = limit
        if reservation.quote.request.stream:
            await relay(life, reservation, call, meter, limit)
        else:
            whole(life, reservation, call, meter, limit)
        return
    raise ConnectionError("every provider failed")


def _length(life: Life, limit: int | None, model: str) -> int:
    """How long an answer gets: within its limit, as a rule."""
    length = life.random.choice((3, 60, 300, 900, 2500))
    if limit is not None and life.random.random() < 0.95:
        length = min(length, limit * 1000 // TARIFFS[model].factor)
    most = TARIFFS[model].most
    return length if most is None else min(length, most)


def _usage(life: Life, call: Call) -> dict[str, Any]:
    """What the upstream says that it used."""
    random = life.random
    output = family(call.model, call.said)
    if TARIFFS[call.model].hidden:
        output += random.choice((0, 50, 400))
    if random.random() < 0.05:
        output += 300  # and nobody saw it
    call.usage = (call.prompt + random.choice((0, 0, 4)), output)
    prompt, output = call.usage
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def whole(life: Life, reservation: Reservation, call: Call, meter: Any, limit: int | None) -> None:
    """An answer in one piece: it is settled before its head goes out."""
    call.said = _length(life, limit, call.model)
    answer: dict[str, Any] = {"choices": [{"message": {"content": " w" * call.said}}]}
    if life.random.random() < 0.9:
        answer["usage"] = _usage(life, call)
    if not meter.observe_usage(answer) or meter.usage is None:
        meter.observe_answer(answer)
    call.ended = "finished"
    reservation.settle()


async def relay(
    life: Life, reservation: Reservation, call: Call, meter: Any, limit: int | None
) -> None:
    """Event by event: nothing is passed on above the watermark."""
    random = life.random
    rest = _length(life, limit, call.model)
    leaves_after = random.randrange(rest) if random.random() < 0.15 else None
    dies_after = random.randrange(rest) if random.random() < 0.1 else None
    while rest > 0:
        await pause(life, 0.3)
        if leaves_after is not None and call.said >= leaves_after:
            call.ended = "left"
            raise asyncio.CancelledError("left")
        if dies_after is not None and call.said >= dies_after:
            call.ended = "truncated"
            reservation.outcome = Outcome.TRUNCATED
            return
        count = min(rest, random.choice((1, 7, 40, 150)))
        rest -= count
        call.said += count
        meter.observe({"choices": [{"index": 0, "delta": {"content": " w" * count}}]})
        if meter.bound() > reservation.mark:
            try:
                reservation.extend()
            except GatewayError as error:
                call.ended = "cut"
                quota = isinstance(error, InsufficientQuota)
                reservation.outcome = Outcome.CUT if quota else Outcome.TRUNCATED
                return
        call.relayed = call.said
        life.world.point()
        recorded = life.world.oracle.fold.open[reservation.lsn]
        story = life.world.upstream.story(call.request_id)
        least = sum(each.least() for each in story.calls)
        check(least <= recorded.if_orphaned(), call, "is above its watermark", recorded)
    if random.random() < 0.85:
        meter.observe({"choices": [], "usage": _usage(life, call)})
    call.ended = "finished"
    reservation.outcome = Outcome.COMPLETED


async def reconcile(life: Life, reservation: Reservation) -> None:
    """The upstream's own log says later what a request without an answer was billed."""
    assert life.store is not None
    await pause(life, 5)
    ledger, lsn = life.store.ledger, reservation.lsn
    request = ledger.recent.find(reservation.trace.request_id)
    if request is None or request.cost is None or lsn in ledger.state.holds:
        return
    own = tuple(zip(reservation.principal.accounts, [reservation.periods[0]] * 3, strict=True))
    try:
        ledger.pay()
        ledger.post(
            Adjust(
                **ledger.stamp(),
                accounts=own,
                delta=life.random.choice((-request.cost, 12_345)),
                type="late",
                actor="reconcile",
                reason="the upstream's log",
                r=lsn,
                idempotency_key=f"late-{lsn}",
            )
        )
    except (NotRecorded, RecordUncertain) as error:
        life.world.say("late usage:", error)


def request_of(payload: bytes, history: list[bytes]) -> set[str]:
    """Whose record this is: the request's id, if it is about one."""
    record = json.loads(payload)
    if record["k"] == "reserve":
        return {record["id"]}
    if record.get("r") is not None:
        return {json.loads(history[record["r"] - 1])["id"]}
    return set()
