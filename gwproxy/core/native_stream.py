"""What the streams of the providers' own APIs have in common: events that are JSON objects, each of
which is metered, may commit the answer, or fails it. Pure."""

from typing import Any

from gwproxy.core.meter import FINISH, TEXT, TOOL, USAGE, Meter
from gwproxy.core.stream import UNREADABLE, EventStream, parse_event

_WORDS = TEXT | TOOL
_COMMIT = _WORDS | FINISH
"""Usage alone does not commit: where it comes before the first word, a provider that is overloaded
may still say so after it."""


class NativeMeter(Meter):
    """Counts each part's text as if it had been tokenised at once."""

    __slots__ = ()

    def _observe_object(self, event: dict[str, Any]) -> int:
        """What one event of a stream has in it, as a sum of the meter's flags."""
        raise NotImplementedError

    def _observe_output(self, answer: dict[str, Any]) -> int:
        """The same of all the parts of a whole answer."""
        raise NotImplementedError

    def _keep_usage(self, usage: dict[str, Any]) -> None:
        """What a usage object says, after those before it."""
        self._usage = usage

    def observe_event(self, event: object) -> int:
        """Reads one event of a stream and returns what was in it, as a sum of the meter's flags."""
        if type(event) is not dict:
            return 0
        flags = self._observe_object(event)
        if flags & _WORDS:
            self.has_output = True
        return flags

    def observe_answer(self, answer: object) -> int:
        if type(answer) is not dict:
            return 0
        flags = self._observe_output(answer)
        if flags:
            self.has_output = True
        return flags | self._take_usage(answer)

    def _take_usage(self, holder: object) -> int:
        """The usage of whatever has one."""
        usage = holder.get("usage") if type(holder) is dict else None
        if not usage or type(usage) is not dict:
            return 0
        self._keep_usage(usage)
        return USAGE


class NativeStream(EventStream):
    """A stream of an API whose events say what kind they are."""

    __slots__ = ()

    meter: NativeMeter

    def _heed(self, event: Any, flags: int) -> None:
        """What an event that was metered means for the stream: its end, or its failure."""
        raise NotImplementedError

    def _event(self, payload: bytes) -> bool:
        value = parse_event(payload)
        if value is UNREADABLE:
            self.meter.observe_unparsed(len(payload))
            return True
        flags = self.meter.observe_event(value)
        if flags & _COMMIT:
            self.committed = True
        elif not flags and self._is_foreign_error(value):
            return False
        if type(value) is dict:
            self._heed(value, flags)
        return True
