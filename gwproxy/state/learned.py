"""What was learned, in a small file beside the database: read at the start, written now and then.

It may be lost without harm, so nobody waits for it, and a file that is not good is passed over.
"""

import asyncio
from pathlib import Path
from typing import Final

from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.log import Log
from gwproxy.storage import soft

VERSION: Final = 1


class Notebook:
    def __init__(self, file: Path, lengths: OutputLengths, factors: Factors, log: Log) -> None:
        self._file = file
        self._lengths = lengths
        self._factors = factors
        self._log = log

    def load(self) -> None:
        """Know what the file says, if there is one, and else nothing."""
        try:
            match soft.read(self._file):
                case None:
                    return
                case {
                    "version": int(version),
                    "lengths": lengths,
                    "answers": answers,
                    "prompts": prompts,
                } if version == VERSION:
                    self._lengths.load(lengths)
                    self._factors.answers.load(answers)
                    self._factors.prompts.load(prompts)
                    return
            fault = "it is of another version"
        except soft.Broken as broken:
            fault = str(broken)
        except ValueError as error:
            fault = f"{self._file}: {error}"
        self._log.event("warning", "what was learned is not read", cause=fault)

    async def save(self) -> None:
        lengths = self._lengths.snapshot()
        answers, prompts = self._factors.answers.dump(), self._factors.prompts.dump()

        def work() -> None:
            soft.write(
                self._file,
                {
                    "version": VERSION,
                    "lengths": lengths(),
                    "answers": answers,
                    "prompts": prompts,
                },
            )

        try:
            await asyncio.to_thread(work)
        except OSError as error:
            self._log.event("warning", "what was learned is not kept", errno=error.errno)
