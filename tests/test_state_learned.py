"""What was learned outlives the process, and a file that is not good does no harm."""

import asyncio
import io
import json
from pathlib import Path

import pytest

from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.log import Log
from gwproxy.state.learned import Notebook
from tests.conftest import StartGateway
from tests.harness import Upstream, chat


class Pupil:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "learned"
        self.lengths, self.factors = OutputLengths(), Factors()
        self.words = io.StringIO()
        self.log = Log(self.words, "debug")
        self.log.start()
        self.notebook = Notebook(self.file, self.lengths, self.factors, self.log)

    def figures(self) -> object:
        return self.lengths.dump(), self.factors.answers.dump(), self.factors.prompts.dump()

    def said(self) -> list[str]:
        self.log.stop()
        return [json.loads(line)["event"] for line in self.words.getvalue().splitlines()]


def taught(folder: Path) -> Pupil:
    pupil = Pupil(folder)
    for tokens in (10, 20, 400):
        pupil.lengths.observe("key_1", "gpt-4o", tokens)
    for _ in range(30):
        pupil.factors.answers.observe("gpt-4o", 100, 120)
        pupil.factors.prompts.observe("gpt-4o", 100, 110)
    return pupil


async def test_what_was_learned_is_known_in_the_next_life(tmp_path: Path) -> None:
    first = taught(tmp_path)
    await first.notebook.save()
    assert first.file.stat().st_mode & 0o777 == 0o600
    second = Pupil(tmp_path)
    second.notebook.load()
    assert second.figures() == first.figures()
    assert second.lengths.p95("key_1", "gpt-4o") == 400
    assert second.factors.answers.per_mille("gpt-4o") == 1200
    assert second.said() == []


async def test_lessons_go_on_while_they_are_saved(tmp_path: Path) -> None:
    pupil = taught(tmp_path)
    saving = asyncio.gather(pupil.notebook.save())
    for number in range(1000):
        pupil.lengths.observe(f"key_{number}", "gpt-4o", number)
        if number % 100 == 0:
            await asyncio.sleep(0)
    await saving
    Pupil(tmp_path).notebook.load()


def test_without_a_file_nothing_is_known_and_nothing_said(tmp_path: Path) -> None:
    pupil = Pupil(tmp_path)
    pupil.notebook.load()
    assert pupil.lengths.p95("key_1", "gpt-4o") is None
    assert pupil.said() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        '{"version": 2}',
        '{"version": 1, "lengths": {}, "answers": [], "prompts": []}',
        '{"version": 1, "lengths": {"pairs": [["a", "b", "zz"]], "models": []}, "answers": [],'
        ' "prompts": []}',
    ],
)
async def test_a_broken_file_is_passed_over_with_one_line(tmp_path: Path, text: str) -> None:
    pupil = Pupil(tmp_path)
    pupil.file.write_text(text, encoding="latin-1")
    pupil.notebook.load()
    assert pupil.lengths.p95("a", "b") is None
    await pupil.notebook.save()
    pupil.notebook.load()
    assert pupil.said() == ["what was learned is not read"]


async def test_where_it_cannot_be_written_it_is_said_and_all_goes_on(tmp_path: Path) -> None:
    pupil = taught(tmp_path)
    (tmp_path / "learned").mkdir()
    await pupil.notebook.save()
    assert pupil.said() == ["what was learned is not kept"]


async def test_a_gateway_keeps_what_it_has_learned(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    for _ in range(3):
        answer = await front.client.post(
            "/v1/chat/completions",
            json=chat(),
            headers={"Authorization": f"Bearer {front.key}"},
        )
        assert answer.status == 200
    app = front.gateway.app
    await app._notebook.save()
    file = app.config.storage.path.with_name("gwproxy.db.learned")
    pairs = json.loads(file.read_bytes())["lengths"]["pairs"]
    assert [len(bytes.fromhex(packed)) for _, _, packed in pairs] == [12]
