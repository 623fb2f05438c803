"""The upstream's own side: what was sent to it, what it said, and what it billed, in Decimal.

It shares no code with the gateway. What stands here happened, whatever a crash has made the gateway
forget.
"""

from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal


@dataclass(frozen=True)
class Tariff:
    """USD per million tokens, and how many tokens of its own the model makes of 1000 of ours."""

    input: Decimal
    output: Decimal
    factor: int = 1000
    most: int | None = None
    """The longest answer it gives."""
    hidden: bool = False
    """It thinks out of sight, and bills that."""


TARIFFS = {
    "alpha/small": Tariff(Decimal("150"), Decimal("600.137"), most=4000),
    "alpha/large": Tariff(Decimal("2500.5"), Decimal("10000.000001"), most=2000),
    "beta/llama": Tariff(Decimal("170.3"), Decimal("590"), factor=1050),
    "gamma/thinker": Tariff(Decimal("1100"), Decimal("4400.7"), most=1500, hidden=True),
    "gamma/free": Tariff(Decimal(0), Decimal(0), most=3000),
}
"""A thousand times dearer than real ones: a dozen requests use a budget up."""


def price(model: str, prompt: int, output: int) -> int:
    """Nano-USD, a fraction of one rounded upwards."""
    tariff = TARIFFS[model]
    exact = (prompt * tariff.input + output * tariff.output) * 1000
    return int(exact.to_integral_value(ROUND_CEILING))


def family(model: str, tokens: int) -> int:
    """What this model makes of so many tokens of the gateway's."""
    return -(-tokens * TARIFFS[model].factor // 1000)


def prompt_of(messages: int, words: int) -> int:
    """What the gateway should take the prompt for: three tokens for the reply and three for each
    message, and its words."""
    return 3 + 3 * messages + words


@dataclass
class Call:
    """One attempt that reached the upstream."""

    request_id: str
    number: int
    model: str
    prompt: int
    """What the gateway should take it for."""
    fate: str = "sent"
    """`sent` (and no answer yet), `refused` (an error status) or `answering`."""
    said: int = 0
    """Tokens of the answer so far that can be seen, as the gateway counts."""
    relayed: int = 0
    """Of those, what the client got."""
    usage: tuple[int, int] | None = None
    """What the upstream told of it: prompt and output."""
    limit: int | None = None
    """The maximum that it was sent; None: none."""
    ended: str = ""
    """How the gateway saw it end: `finished`, `left`, `cut`, `truncated`, or empty."""

    def cost(self) -> int:
        """What the ledger should show for it, if the process lived to settle it."""
        if self.fate == "refused":
            return 0
        if self.fate == "sent":
            return price(self.model, family(self.model, self.prompt), 0)
        seen = family(self.model, self.said)
        if self.usage is None:
            return price(self.model, family(self.model, self.prompt), seen)
        prompt, output = self.usage
        if self.ended != "finished":
            output = max(output, seen)
        return price(self.model, prompt, output)

    def least(self) -> int:
        """What the client has had of it costs this much."""
        if self.fate == "refused":
            return 0
        return price(self.model, family(self.model, self.prompt), family(self.model, self.relayed))


@dataclass
class Story:
    """One request as the world outside the gateway knows it."""

    request_id: str
    calls: list[Call] = field(default_factory=list)
    settled: bool = False
    """The gateway came to the end of it."""
    late: int = 0
    """What was posted afterwards, in nano-USD."""

    def bounds(self) -> tuple[int, int]:
        """What the ledger may show for it. Where the budget ended in the middle, what came last is
        not passed on; some of it may be charged."""
        most = sum(call.cost() for call in self.calls)
        least = sum(call.least() if call.ended == "cut" else call.cost() for call in self.calls)
        return least, most

    def unbidden(self) -> int:
        """What could be seen of it costs this much, where no maximum was sent that an upstream
        could go beyond, and its tokens are as many as the gateway counts."""
        if any(call.limit is not None or TARIFFS[call.model].factor != 1000 for call in self.calls):
            return 0
        return sum(
            price(call.model, call.prompt, call.said if call.ended == "finished" else call.relayed)
            for call in self.calls
            if call.fate != "refused"
        )


class Upstream:
    def __init__(self) -> None:
        self.stories: dict[str, Story] = {}

    def story(self, request_id: str) -> Story:
        return self.stories.setdefault(request_id, Story(request_id))

    def send(self, request_id: str, model: str, prompt: int) -> Call:
        story = self.story(request_id)
        call = Call(request_id, len(story.calls) + 1, model, prompt)
        story.calls.append(call)
        return call
