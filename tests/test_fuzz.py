"""The fuzzer's targets: each rule holds on Hypothesis' bytes and on whatever was found before, and
each is a rule that can be broken."""

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import TARGETS
from fuzz.__main__ import ROOT
from fuzz.cuts import seeded

QUICK = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

FOUND: dict[str, list[bytes]] = {
    **{name: [] for name in TARGETS},
    # A body came to an exchange that had heard of no head.
    "upstream": [
        seeded(b"HTTP/1.1 010 Hm\r\n\r\n{}"),
        seeded(b"HTTP/1.1 199 Hm\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n\r\n"),
    ],
    # Numbers that are longer when they are sent than when they came: too low a bound was held.
    "requests": [
        b'\0{"model":"a","messages":[{"content":"x"}],"tools":[{"type":"function","x":[%b]}]}'
        % b",".join([b"1e15"] * 100)
    ],
}
"""Inputs that broke a rule once."""


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"fuzz.{request.param}")


def test_what_was_found_is_found_no_more(target: ModuleType) -> None:
    for data in [*target.SEEDS, *FOUND[target.__name__.rpartition(".")[2]], b"", b"\0"]:
        target.check(data)


@QUICK
@given(data=st.data())
def test_no_bytes_break_a_rule(target: ModuleType, data: st.DataObject) -> None:
    """Noise, and what is nearly right: a seed with some of its bytes replaced."""
    near = list(data.draw(st.sampled_from(target.SEEDS)))
    changes = st.lists(st.tuples(st.integers(0, len(near) - 1), st.integers(0, 255)), max_size=8)
    for place, byte in data.draw(changes):
        near[place] = byte
    target.check(bytes(near))
    target.check(data.draw(st.binary(max_size=200)))


def test_every_target_says_its_rule(target: ModuleType) -> None:
    assert target.__doc__ and target.SEEDS
    assert callable(target.check)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_the_fuzzer_runs_and_finds_nothing(name: str) -> None:
    pytest.importorskip("atheris", reason="`make fuzz` installs it where there is a wheel of it")
    command = [sys.executable, "-m", "fuzz", name, "--seconds", "5"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stat::number_of_executed_units" in done.stderr
