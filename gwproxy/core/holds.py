"""How much to set aside for a request before it is sent: by what it declares, else by policy.

Pure. A request that names no maximum must be neither blocked by what it could cost at the very
worst nor let through without a bound, so each kind has its own way between the two.
"""

from typing import Final

import msgspec

from gwproxy.core.identity import UnboundedPolicy
from gwproxy.core.pricing import Rate

FIRST_OUTPUT: Final = 1024
"""Output tokens held for a stream of which nothing was learned yet."""

LEAST_OUTPUT: Final = 64
"""A hold for less than this is not worth an answer."""

LEAST_LOWERED: Final = 256
"""What was learned of short answers does not lower a maximum below this."""

STEP_OUTPUT: Final = 256
"""A watermark moves by this much at least: each move is a record."""


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What a request asks for, as far as its price goes."""

    prompt: int
    """Input tokens at the most."""
    declared: int | None
    """Output tokens of each choice, where the caller said so."""
    choices: int
    stream: bool
    hidden: bool
    """The model reasons out of sight: what is seen of a stream says nothing about its cost."""
    learned: int | None
    """What such calls usually take, for all choices together; None: nobody knows yet."""


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What is held for one candidate."""

    cost: int
    """Nano-USD."""
    output: int
    """Output tokens of all choices that the hold allows for."""
    lowered: int | None = None
    """The maximum of each choice to be sent in the caller's place; None: as the caller has it."""
    grows: bool = False
    """The hold is a first one, to be extended as the stream goes on."""


class Short(msgspec.Struct, frozen=True, gc=False):
    """It does not fit."""

    needed: int
    """Nano-USD that would have to be left."""
    fits: int
    """The largest maximum for each choice that would fit; 0: none would."""


def plan(
    ask: Ask, rate: Rate, policy: UnboundedPolicy, left: int | None, default_output: int
) -> Plan | Short:
    """The hold for one candidate, where `left` nano-USD are left; None: there is no limit."""
    choices = ask.choices
    if left is not None and left < 0 and rate.worst_case(ask.prompt, FIRST_OUTPUT) == 0:
        left = None  # what costs nothing always fits
    if ask.declared is not None:
        # A maximum that the caller chose is never lowered: it fits, or he is told what would.
        return _all_of(ask, rate, ask.declared * choices, left, None)
    most = rate.max_output_tokens
    if policy is UnboundedPolicy.STRICT:
        each = default_output if most is None else most
        return _all_of(ask, rate, each * choices, left, each if most is None else None)
    if ask.stream and not ask.hidden:
        first = FIRST_OUTPUT * choices if ask.learned is None else ask.learned
        return _first_of(ask, rate, max(first, LEAST_OUTPUT), left)
    if policy is UnboundedPolicy.BOUNDED and not ask.hidden:
        usual = default_output * choices if ask.learned is None else ask.learned
        return _first_of(ask, rate, max(usual, LEAST_OUTPUT), left)
    if left is None:
        return _all_of(ask, rate, (most or default_output) * choices, None, None)
    if most is not None and rate.worst_case(ask.prompt, most * choices) * 4 <= left:
        return _all_of(ask, rate, most * choices, left, None)
    lowered = default_output if most is None else min(most, default_output)
    if ask.learned is not None:
        lowered = min(lowered, max(2 * ask.learned // choices, LEAST_LOWERED))
    fitting = rate.affordable_output(ask.prompt, left)
    if fitting is not None and fitting // choices < lowered:
        least = min(lowered, LEAST_OUTPUT)
        lowered = fitting // choices
        if lowered < least:
            return _short(ask, rate, least * choices, fitting)
    return Plan(rate.worst_case(ask.prompt, lowered * choices), lowered * choices, lowered=lowered)


def _all_of(
    ask: Ask, rate: Rate, output: int, left: int | None, lowered: int | None
) -> Plan | Short:
    cost = rate.worst_case(ask.prompt, output)
    if left is None or cost <= left:
        return Plan(cost, output, lowered=lowered)
    fitting = rate.affordable_output(ask.prompt, left)
    assert fitting is not None, "free output cannot be what does not fit, unless its input does not"
    return _short(ask, rate, output, fitting)


def _first_of(ask: Ask, rate: Rate, output: int, left: int | None) -> Plan | Short:
    if rate.max_output_tokens is not None:
        output = min(output, rate.max_output_tokens * ask.choices)
    if left is not None:
        fitting = rate.affordable_output(ask.prompt, left)
        if fitting is not None and fitting < output:
            least = min(output, LEAST_OUTPUT)
            if fitting < least:
                return _short(ask, rate, least, fitting)
            output = fitting
    return Plan(rate.worst_case(ask.prompt, output), output, grows=True)


def _short(ask: Ask, rate: Rate, output: int, fitting: int) -> Short:
    return Short(rate.worst_case(ask.prompt, output), max(0, fitting // ask.choices))


def step(hold_output: int) -> int:
    """How far ahead of what was relayed the next watermark is set, in output tokens."""
    return max(STEP_OUTPUT, hold_output // 8)
