"""The journal's upkeep: what it says of a disk that does not do what it is asked."""

import io
import json
from errno import EIO, ENOENT

from gwproxy.log import Log
from gwproxy.state.upkeep import Upkeep
from tests.test_journal import FOLDER, Disk, Faulty, Owner, refill, refuse


async def test_a_segment_that_cannot_be_removed_is_told_once_with_its_name() -> None:
    """It is tried four times a second, for as long as the folder is away."""
    files = Faulty(Disk())
    owner = Owner(files, FOLDER)
    refill(owner, 50)
    owner.sync()
    first, second, *_ = owner.segments()
    written = io.StringIO()
    log = Log(written)
    upkeep = Upkeep(owner.journal, log, lambda: 0.0)
    files.faults["fsync_directory"] = refuse(OSError(ENOENT, "away"))
    for _ in range(3):
        await upkeep.drop(50)
    del files.faults["fsync_directory"]
    files.at[len(files.calls) + 3] = lambda name: refuse(OSError(EIO, "broken"))
    for _ in range(2):
        await upkeep.drop(50)
    refill(owner, 50)
    owner.sync()
    third = owner.segments()[0]
    files.faults["unlink"] = refuse(OSError(EIO, "broken"))
    for _ in range(2):
        await upkeep.drop(100)
    upkeep.close()
    log.start()
    log.stop()
    told = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(one["event"], one["file"], one["errno"]) for one in told] == [
        ("journal segment not removed", name, code)
        for name, code in ((first, ENOENT), (second, EIO), (third, EIO))
    ]
