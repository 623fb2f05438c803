"""The price commands: what they print, and that setting a price changes nothing else in a file."""

import json
import os
import stat
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gwproxy import assets
from gwproxy.cli import main
from gwproxy.cli.prices import override
from gwproxy.cli.prices.toml_table import with_price
from gwproxy.config import load
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE

BOOK = PriceBook(assets.prices())
SHIPPED = Path(__file__).parent.parent / "config.toml"
LOCAL = '[upstream]\nflavour = "openai"\nbase_url = "http://127.0.0.1:9000/v1"\n'
CLOUDFLARE = {
    "CLOUDFLARE_ACCOUNT_ID": "acc0123",
    "CLOUDFLARE_GATEWAY_ID": "github-ai-agent",
    "CLOUDFLARE_API_TOKEN": "cf-token-that-nobody-may-see",
}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a folder in which the commands run, and no other one."""
    for variable in os.environ:
        if variable.startswith(("GWPROXY", "CLOUDFLARE", "AI_", "CIRCUIT_BREAKER")):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(LOCAL)
    path.chmod(0o640)
    return path


def run(*words: str) -> int:
    return main(["prices", *words])


def price_in(file: Path, name: str) -> dict[str, object] | None:
    price = load(file, {}, catalogue=CATALOGUE).prices.models.get(name)
    return price and price.row()


# -- show and list -------------------------------------------------------------------------------


def test_show_tells_tiers_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "anthropic/claude-sonnet-4-5-20250929") == 0
    out = capsys.readouterr().out
    assert "listed as claude-sonnet-4-5" in out
    assert "input above 200000 tokens" in out
    assert "22.50" in out
    assert BOOK.version in out


def test_show_takes_a_date(capsys: pytest.CaptureFixture[str]) -> None:
    for at, dollars in [("2025-06-09", "10.00"), ("2025-06-10", "2.00")]:
        assert run("show", "openai/o3", "--at", at, "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["tiers"][0]["input"] == dollars
        assert [(one["from"], one["holds"]) for one in shown["history"]] == [
            (None, dollars == "10.00"),
            ("2025-06-10", dollars == "2.00"),
        ]
    with pytest.raises(SystemExit) as stop:
        run("show", "openai/o3", "--at", "yesterday")
    assert stop.value.code == 2


def test_show_names_the_price_that_holds_beside_those_before_and_after(
    capsys: pytest.CaptureFixture[str],
) -> None:
    holds = {"--at 2025-06-09": ("before 2025-06-10", "then"), "": ("from 2025-06-10", "now")}
    for at, (label, word) in holds.items():
        assert run("show", "openai/o3", *at.split()) == 0
        rows = capsys.readouterr().out.splitlines()
        marked = [row for row in rows if row.endswith(("now", "then"))]
        assert len(marked) == 1 and marked[0].startswith(label) and marked[0].endswith(word)
        assert sum("2025-06-10" in row for row in rows) == 2
    assert run("show", "deepseek/deepseek-v4-pro", "--at", "2026-10-01T03:00") == 0
    assert "01:00 to 04:00 UTC" in capsys.readouterr().out


def test_show_says_how_to_price_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "mock/echo") == 1
    assert '[prices.models."mock/echo"]' in capsys.readouterr().err
    assert run("show", "echo") == 2


def test_list_gives_every_model_of_a_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--provider", "groq", "--json") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert sorted(models) == [f"groq/{name}" for name in BOOK.models("groq")]
    assert run("list", "--provider", "groq") == 0
    assert f"{len(models)} models" in capsys.readouterr().out
    assert run("list", "--provider", "nobody") == 1


def test_what_is_shown_and_listed_is_what_the_server_will_charge(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("set", "mock/echo", "--input", "1", "--output", "2") == 0
    capsys.readouterr()
    assert run("show", "mock/echo", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tiers"][0]["output"] == "2.00"
    assert run("list", "--provider", "mock") == 0
    assert "override" in capsys.readouterr().out
    file.write_text(file.read_text() + "[nonsense]\n")
    assert run("show", "mock/echo") == 1
    assert "Without the overrides of config.toml" in capsys.readouterr().err
    assert run("show", "mock/echo", "--config", str(file)) == 2
    assert "nonsense" in capsys.readouterr().err
    file.unlink()
    assert run("show", "openai/gpt-4o") == 0
    assert capsys.readouterr().err == ""


# -- build ---------------------------------------------------------------------------------------


def test_build_writes_the_same_table_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prices.json"
    assert run("build", "--out", str(out), "--check") == 1
    assert not out.exists()
    assert run("build", "--out", str(out), "--json") == 0
    first = out.read_bytes()
    assert run("build", "--out", str(out)) == 0
    assert run("build", "--out", str(out), "--check") == 0
    assert out.read_bytes() == first
    assert run("build", "--check") == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[1])["version"] == BOOK.version


# -- diff ----------------------------------------------------------------------------------------


def table(tmp_path: Path, name: str, **models: dict[str, Any]) -> str:
    path = tmp_path / f"{name}.json"
    rows = {model.replace("_", "-"): row for model, row in models.items()}
    shelf = {"one": {"models": {model: {"names": [model], **row} for model, row in rows.items()}}}
    path.write_text(json.dumps({"version": name, "aliases": {}, "providers": shelf}))
    return str(path)


def flat(usd: int, **more: Any) -> dict[str, Any]:
    return {**more, "tiers": [[0, *[usd * 10**6] * 4]]}


def test_diff_says_what_came_went_and_changed_and_from_when(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = table(
        tmp_path,
        "old",
        same={"prices": [flat(1)]},
        gone={"prices": [flat(2)]},
        dearer={"prices": [flat(3)]},
        dated={"prices": [flat(10), flat(5, **{"from": "2026-03-01"})]},
        longer={"prices": [flat(1)], "max_output": 4096},
        tiered={"prices": [{"tiers": [[0, 1, 1, 1, 1], [1000, 2, 2, 2, 2]]}]},
        nightly={"prices": [flat(4)]},
    )
    new = table(
        tmp_path,
        "new",
        same={"prices": [flat(1)]},
        came={"prices": [flat(7), flat(8, **{"from": "2027-01-01"})]},
        dearer={"prices": [flat(4)]},
        dated={"prices": [flat(10), flat(6, **{"from": "2026-03-01"})]},
        longer={"prices": [flat(1)], "max_output": 8192, "reasons": True},
        tiered={"prices": [{"tiers": [[0, 1, 1, 1, 1], [1000, 3, 2, 2, 2]]}]},
        nightly={"prices": [flat(4), flat(2, hours=["22:00", "06:00"])]},
    )
    assert run("diff", old, new) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"{old} (old) -> {new} (new)",
        "",
        "USD PER MILLION TOKENS INPUT CACHE READ CACHE WRITE OUTPUT",
        "+ one/came, before 2027-01-01 7.00 7.00 7.00 7.00",
        "+ one/came, from 2027-01-01 8.00 8.00 8.00 8.00",
        "~ one/dated, from 2026-03-01" + " 5.00 -> 6.00" * 4,
        "~ one/dearer" + " 3.00 -> 4.00" * 4,
        "- one/gone 2.00 2.00 2.00 2.00",
        "~ one/nightly, 22:00 to 06:00 UTC" + " 4.00 -> 2.00" * 4,
        "~ one/tiered, input above 1000 tokens 0.000002 -> 0.000003" + " 0.000002" * 3,
        "",
        "~ one/longer: maximum output 4096 -> 8192",
        "~ one/longer: hides reasoning no -> yes",
        "",
        "1 added, 1 removed, 5 changed",
    ]
    assert run("diff", old, new, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (sorted(found["added"]), sorted(found["removed"])) == (["one/came"], ["one/gone"])
    assert len(found["changed"]) == 5
    sides = found["changed"]["one/dated"]
    assert [one["from"] for one in sides["old"]["history"]] == [None, "2026-03-01"]
    assert sides["new"]["history"][1]["tiers"][0]["input"] == "6.00"


def test_diff_compares_a_price_that_is_new_with_what_held_until_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = [flat(9), flat(5, **{"from": "2026-03-01"}), flat(8, hours=["01:00", "02:00"])]
    old = table(tmp_path, "old", m={"prices": prices})
    later = [*prices[:2], flat(4, **{"from": "2026-12-01"}), prices[2]]
    assert run("diff", old, table(tmp_path, "new", m={"prices": later})) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("~")]
    assert [" ".join(row.split()) for row in rows] == [
        "~ one/m, from 2026-12-01" + " 5.00 -> 4.00" * 4
    ]
    assert run("diff", old, table(tmp_path, "new", m={"prices": prices[:2]})) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("~")]
    assert [" ".join(row.split()) for row in rows] == [
        "~ one/m, 01:00 to 02:00 UTC" + " 8.00 -> 5.00" * 4
    ]


def test_diff_shows_the_configurations_overrides_unless_told_otherwise(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff") == 0
    assert "agree" in capsys.readouterr().out
    for name in ("openai/gpt-4o", "mock/echo", "groq/*"):
        assert run("set", name, "--input", "1", "--output", "2") == 0
    capsys.readouterr()
    assert run("diff", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["added"]) == ["groq/*", "mock/echo"]
    every = {f"groq/{model}" for model in BOOK.models("groq")}
    assert found["changed"].keys() == {"openai/gpt-4o", *every}
    assert run("diff", "config", "built-in", "--json") == 1
    assert sorted(json.loads(capsys.readouterr().out)["removed"]) == ["groq/*", "mock/echo"]
    assert run("diff", "config", "config") == 0


def test_the_shipped_table_and_its_own_file_agree(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = Path(assets.__file__).parent / "data" / assets.PRICES
    assert run("diff", "built-in", str(shipped), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["added"], found["removed"], found["changed"]) == ({}, {}, {})


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', None])
def test_diff_refuses_what_is_not_a_price_table(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert run("diff", str(path)) == 2
    assert str(path) in capsys.readouterr().err


# -- set -----------------------------------------------------------------------------------------


def test_set_adds_a_table_at_the_end_and_says_what_was_and_what_is(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--input", "2", "--output", "8.5", "--cache-read", "0.125", "--cache-write", "3"]
    assert run("set", "openai/gpt-4o", *given) == 0
    assert file.read_text() == LOCAL + (
        '\n[prices.models."openai/gpt-4o"]\ninput = "2.00"\noutput = "8.50"\n'
        'cache_read = "0.125"\ncache_write = "3.00"\n'
    )
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "before 2.50 1.25 2.50 10.00 built-in" in rows
    assert "now 2.00 0.125 3.00 8.50 override" in rows
    assert "until it is restarted" in out


def test_set_keeps_the_comments_of_a_table_that_it_changes(file: Path) -> None:
    before, after = "# first\n\n", "\n# next\n[limits]  # of a client\nmax_connections = 7 # few"
    own = (
        '[prices.models."mock/echo"] # ours\n  input = "1"  # until May\n# or so\n'
        '  output = "2" # too\n  reasons = true # gone\n'
    )
    file.write_text(before + LOCAL + own + after)
    assert run("set", "mock/echo", "--input=3", "--output=4", "--max-output-tokens=99") == 0
    assert file.read_text() == before + LOCAL + (
        '[prices.models."mock/echo"] # ours\n  input = "3.00"  # until May\n# or so\n'
        '  output = "4.00" # too\n  max_output_tokens = 99\n'
    ) + (after)
    assert price_in(file, "mock/echo") == {
        "input": Decimal(3),
        "output": Decimal(4),
        "max_output_tokens": 99,
        "reasons": False,
    }


def test_unset_leaves_the_comments_and_the_empty_lines_that_part_them() -> None:
    before, own, after = "a = 1\n\n", "[prices.models.x]\ninput = 1\n", "\n[b]\n"
    for text, left in [
        (before + own + after, "a = 1\n" + after),
        (before + own + "# why\noutput = 2\n" + after, before + "# why\n" + after),
        (before + own + "[b]\n", before + "[b]\n"),
        ("a = 1\n" + own + after, "a = 1\n" + after),
    ]:
        assert with_price(text, "x", None) == left


def test_what_is_set_and_unset_again_leaves_no_trace(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("set", "mock/echo", "--input", "1", "--output", "2", "--reasons") == 0
    assert run("set", "mock/echo", "--unset", "--json") == 0
    assert file.read_text() == LOCAL
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["written"] and found["now"] is None
    assert found["before"]["hides_reasoning"] and found["before"]["tiers"][0]["output"] == "2.00"
    assert run("set", "mock/echo", "--unset") == 1
    assert "is not there" in capsys.readouterr().out


def test_a_price_that_is_set_already_leaves_the_file_alone(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("set", "mock/echo", "--input", "1", "--output", "2") == 0
    before = file.stat()
    assert run("set", "mock/echo", "--input", "1.0", "--output", "2.00") == 0
    assert file.stat() == before
    assert "says so already" in capsys.readouterr().out


def test_the_new_file_has_the_old_ones_mode_and_place_and_leaves_no_other_behind(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link.toml"
    link.symlink_to(file)
    inode = file.stat().st_ino
    assert run("set", "mock/echo", "--input", "1", "--output", "2", "--config", str(link)) == 0
    assert str(file) in capsys.readouterr().out
    assert link.is_symlink() and file.stat().st_ino != inode
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(tmp_path.iterdir()) == [file, elsewhere]


def refused(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before, folder = file.read_bytes(), sorted(file.parent.iterdir())
    assert run("set", *words) == 2
    assert file.read_bytes() == before
    assert sorted(file.parent.iterdir()) == folder
    return capsys.readouterr().err


PRICE = ("--input", "1", "--output", "2")


def test_set_refuses_what_the_environment_would_hide(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "GWPROXY__PRICES__MODELS__OPENAI_GPT_4O__CACHE_READ"
    file.write_text(LOCAL + '[prices.models."openai/gpt-4o"]\ninput = "1"\noutput = "1"\n')
    monkeypatch.setenv(variable, "3")
    assert variable in refused(file, capsys, "openai/gpt-4o", *PRICE)
    assert variable in refused(file, capsys, "openai/gpt-4o", "--unset")
    assert run("set", "openai/gpt-4", *PRICE) == 0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("google-ai-studio/gemini-2.5-flash", '"gemini/gemini-2.5-flash"'),
        ("Gemini/gemini-2.5-flash", '"gemini/gemini-2.5-flash"'),
        ("fast/llama", '"groq/llama"'),
        ("own/model", '"custom-own/model"'),
    ],
)
def test_set_refuses_a_name_under_which_no_request_would_find_the_price(
    file: Path, capsys: pytest.CaptureFixture[str], name: str, meant: str
) -> None:
    file.write_text(
        LOCAL + '[providers.fast]\nprefix = "groq"\n[providers.own]\nprefix = "custom-own"\n'
        '[providers.gemini]\nprefix = "google-ai-studio"\n'
        '[prices.models."gemini/gemini-2.5-flash"]\ninput = "1"\noutput = "1"\n'
    )
    assert meant in refused(file, capsys, name, *PRICE)
    for lawful in ("gemini/gemini-2.5-pro", "groq/llama", "custom-own/model", "mock/echo"):
        assert run("set", lawful, *PRICE) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('prices.models = { "a/b" = { input = "1", output = "1" } }\n' + LOCAL, "one value"),
        (LOCAL + '[prices]\nmodels = { "a/b" = { input = "1", output = "1" } }\n', "one value"),
        (LOCAL + "[nonsense]\n", "nonsense"),
        (LOCAL + "[[[\n", "not valid TOML"),
        ("", "CLOUDFLARE_ACCOUNT_ID"),
    ],
)
def test_set_refuses_a_file_that_it_cannot_edit_or_check(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    file.write_text(text)
    assert words in refused(file, capsys, "mock/echo", *PRICE)


def test_set_refuses_what_the_configuration_would(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["mock /echo", *PRICE], ["mock/echo", *PRICE, "--max-output-tokens", "0"]):
        told = refused(file, capsys, *words)
        assert told.startswith(f"{file}: prices.models."), "the draft's name is nobody's business"
    assert "--unset" in refused(file, capsys, "mock/echo", "--input", "1")
    assert "no prices" in refused(file, capsys, "mock/echo", "--unset", "--reasons")
    for wrong in ("-1", "free", "0.0000001", "1_0", "nan", "9" * 99):
        with pytest.raises(SystemExit) as stop:
            run("set", "mock/echo", f"--input={wrong}", "--output=1")
        assert stop.value.code == 2
    file.unlink()
    assert run("set", "mock/echo", *PRICE) == 2


def test_an_edit_that_would_change_anything_else_is_not_written(file: Path) -> None:
    config = load(file, {})
    row = {"input": Decimal(1), "output": Decimal(2), "reasons": False}
    own = '[prices.models."mock/echo"]\ninput = "1"\noutput = "2"\n'
    draft = file.with_name("draft.toml")
    draft.write_text(LOCAL + own)
    assert override._checked(draft, config, "mock/echo", row).prices.models.keys() == {"mock/echo"}
    for text in (
        LOCAL + own.replace("echo", "ohce"),
        LOCAL + own.replace("2", "3"),
        LOCAL.replace("9000", "9001") + own,
        LOCAL + own + own.replace("echo", "other"),
        LOCAL + own + "[limits]\nmax_connections = 7\n",
    ):
        draft.write_text(text)
        with pytest.raises(ValueError, match="by hand"):
            override._checked(draft, config, "mock/echo", row)


def test_a_file_that_somebody_else_changes_meanwhile_is_left_to_them(file: Path) -> None:
    config = load(file, {})

    def edit(draft: Path) -> Any:
        assert draft.parent == file.parent and draft.read_bytes() == b"ours"
        file.write_bytes(b"theirs")
        return config

    with pytest.raises(ValueError, match="somebody else"):
        override._replace(file, file.read_bytes(), b"ours", edit)
    assert file.read_bytes() == b"theirs"
    assert list(file.parent.iterdir()) == [file]


def test_the_shipped_file_takes_a_price_and_gives_it_back(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CLOUDFLARE.items():
        monkeypatch.setenv(name, value)
    file.write_bytes(SHIPPED.read_bytes())
    assert run("set", "gemini/gemini-2.5-flash", *PRICE) == 0
    assert file.read_bytes().startswith(SHIPPED.read_bytes())
    assert run("set", "gemini/gemini-2.5-flash", "--unset") == 0
    assert file.read_bytes() == SHIPPED.read_bytes()


# -- any file ------------------------------------------------------------------------------------

plain = st.text(st.characters(exclude_categories=["C"], exclude_characters="\u2028\u2029"))
names = st.one_of(
    st.sampled_from(["openai/gpt-4o", "mock", "@cf/x-1", "groq/*", 'a"b\\c', "it's", "a.b", "#"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
)
TRAP = '[prices.models."openai/gpt-4o"]\ninput = "9" # ]} [{\n[[prices]]\n'


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@st.composite
def spelt(draw: st.DrawFn, name: str) -> str:
    """A key in one of the ways in which TOML can write it."""
    ways = [quoted(name), '"' + "".join(f"\\U{ord(char):08x}" for char in name) + '"']
    if "'" not in name:
        ways.append(f"'{name}'")
    if name and all(char.isascii() and (char.isalnum() or char in "-_") for char in name):
        ways.append(name)
    return draw(st.sampled_from(ways))


comments = st.one_of(
    st.just(""),
    plain.map(lambda text: f"# {text}"),
    st.sampled_from(["#", "# [prices.models.mock]", "# = \"\"\" ''' [ {", '# input = "1"']),
)
scalars = st.one_of(
    st.sampled_from(
        [
            *("1", "-7.5e3", "true", "1979-05-27T07:32:00Z", "07:32:00", "0xff", "inf", "''"),
            *(f'"""\n{TRAP}"""', f"'''{TRAP}'''"),
            *('"""two at the end"""""', "'''one at the end''''", '"""\\"""\\\\"""', '""""""'),
            *('"""a\\\n   b"""', '"\\"#[" # ]', "'#[{' # }"),
        ]
    ),
    plain.map(quoted),
)
values = st.recursive(
    scalars.filter(lambda text: not text.endswith((" # ]", " # }"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(inner, max_size=3).map(
            lambda items: "[ # [\n" + "".join(f"  {one}, # ]'\"\n" for one in items) + "]"
        ),
        st.lists(inner, max_size=3).map(
            lambda items: f"{{{', '.join(f'k{n} = {one}' for n, one in enumerate(items))}}}"
        ),
    ),
    max_leaves=4,
)


@st.composite
def lines(draw: st.DrawFn, prefix: str = "") -> str:
    """Comments, empty lines and keys, each of which is there once."""
    text = ""
    for number in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([f"k{number}", f'"k{number} = \\"["', f"d{number} . 'x.y'"]))
        value = draw(st.one_of(values, scalars))
        text += f"{draw(st.sampled_from(['', '  ', chr(9)]))}{prefix}{key} = {value}"
        text += f" {comment}\n" if (comment := draw(comments)) and "#" not in value else "\n"
        text += draw(st.sampled_from(["", "\n", "\n\n"])) + draw(comments) + "\n"
    return text


@st.composite
def sections(draw: st.DrawFn, start: int) -> str:
    text = ""
    for number in range(start, start + draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["[t{}]", "[[t{}]]", "[ t{} . 'a]b' ]", "[t{}.prices.models]"]))
        text += f"{kind.format(number)} {draw(comments)}\n{draw(lines())}"
    return text


OLD = {"input": '"1"', "output": "2.5", "reasons": "true"}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, str, str]:
    """A name, and a TOML text in three parts, of which the middle one is all that prices it."""
    name = draw(names)
    key = draw(spelt(name))
    other = draw(st.sampled_from([key[:0], "'other/model'", "another"]))
    if other.strip("'") == name:
        other = ""
    old = draw(st.dictionaries(st.sampled_from(list(OLD)), st.none(), min_size=1))
    style = draw(st.sampled_from(["absent", "table", "dotted", "inline", "far", "root"]))
    before, after = draw(lines()), draw(sections(10))
    tables = draw(sections(0))

    def dotted(prefix: str) -> str:
        return "".join(f" {prefix}{key}. {field} = {OLD[field]} # kept?\n" for field in old)

    match style:
        case "absent":
            before, own = before + tables, ""
            after = ""
        case "table":
            before += tables
            if other:
                before += f"[prices.models.{other}]\n{draw(lines())}"
            own = f"[ prices. models . {key} ] # mine\n"
            own += "".join(f"{field}={OLD[field]} # kept?\n" for field in old)
            after = draw(st.sampled_from(["", "# a comment\n", "\n"])) + after
        case "dotted" | "inline":
            before += tables + "[prices.models] # all\n"
            before += f"{other} = {{ input = 1 }}\n" if other else ""
            pairs = ", ".join(f"{field} = {OLD[field]}" for field in old)
            own = dotted("") if style == "dotted" else f"{key} = {{ {pairs} }} # kept?\n"
            after = draw(lines()) + after
        case "far":
            before += tables + "[prices]\n"
            own, after = dotted("models."), draw(lines()) + after
        case "root":
            own, after = dotted("prices.models."), draw(lines("z.")) + tables + after
    if draw(st.booleans()) and own + after:
        after = after.rstrip("\n") or after
    parts = [before, own, after]
    if draw(st.booleans()):
        parts = [part.replace("\n", "\r\n") for part in parts]
    return name, *parts


WANTED = {
    "input": '"3.00"',
    "output": '"4.00"',
    "cache_read": '"0.10"',
    "max_output_tokens": "9",
}
MEANT = {"input": "3.00", "output": "4.00", "cache_read": "0.10", "max_output_tokens": 9}


def read(text: str) -> dict[str, Any]:
    return tomllib.loads(text, parse_float=lambda digits: f"float {digits}")


def apart(tree: dict[str, Any], name: str) -> tuple[object, dict[str, Any]]:
    """The price of one model, and all the rest without the empty tables around it."""
    prices = dict(tree.get("prices", {}))
    models = dict(prices.pop("models", {}))
    own = models.pop(name, None)
    if models:
        prices["models"] = models
    rest = {key: value for key, value in tree.items() if key != "prices"}
    return own, {**rest, "prices": prices}


@given(files())
@example(("a/b", "", "", ""))
@example(("openai/gpt-4o", f'x = """\n{TRAP}"""\n', "", ""))
@example(("openai/gpt-4o", f"x = '''{TRAP}'''\n", "", ""))
@example(("m", 'x = [ """a"""", "[" ]\n', "[prices.models.m]\ninput = 1\n", ""))
@example(("a/b", "x = 1", "", ""))
@example(("a/b", "\n", '[prices.models."a/b"]', ""))
@example(("a/b", "\n\n", '[prices.models."a/b"]\ninput = "1"', ""))
@example(("a/b", "[prices.models]\n", '"a/b" = { input = 1 } # }\n', "# end"))
def test_any_file_stays_as_it_is_but_for_that_one_table(parts: tuple[str, str, str, str]) -> None:
    name, before, own, after = parts
    text = before + own + after
    _, rest = apart(read(text), name)

    written = with_price(text, name, WANTED)
    assert apart(read(written), name) == (MEANT, rest)
    assert written.startswith(before) and written.endswith(after)
    assert with_price(written, name, WANTED) == written
    assert written.count("# kept?") <= own.count("# kept?") <= written.count("# kept?") + len(OLD)

    if "\r\n" in text:
        assert written.count("\r\n") == written.count("\n")

    without = with_price(text, name, None)
    assert apart(read(without), name) == (None, rest)
    parted = before.removesuffix("\n").removesuffix("\r")  # by an empty line, now of no use
    assert without in (before + after, parted + after)
    if not own and (not text or text.endswith("\n")):
        assert with_price(written, name, None) == text
