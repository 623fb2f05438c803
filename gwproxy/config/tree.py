"""What was written, in the file and in the environment, as one tree of tables.

Rule of the room: each key for itself. A value that is wrong and a key that nobody knows are noted,
with what was probably meant, and the walk goes on.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, cast

from gwproxy.config.problems import Problem, Wrong, dotted, kind, nearest
from gwproxy.config.secrets import Unset
from gwproxy.config.tables import PARSERS, TABLES, home_of, keys_of
from gwproxy.config.values import Place, Raw
from gwproxy.config.variables import BREAKER_VARIABLES, FAMILIES

NO_PROVIDER_KEYS: Final = (
    "a provider's key does not belong into the configuration",
    "store it at Cloudflare (AI Gateway, Provider Keys: BYOK) and remove it here",
)


@dataclass(frozen=True, slots=True)
class FromEnv:
    """A leaf of the tree that the environment has put there."""

    text: str
    variable: str


class Tree:
    """The file's tables with the environment's values in their places, and all that is wrong."""

    def __init__(
        self,
        path: Path | None,
        tree: dict[str, Any],
        environ: Mapping[str, str],
        catalogue: Mapping[str, str],
    ) -> None:
        self.path = path
        self.tree = tree
        self.environ = environ
        self.catalogue = catalogue
        folder = (path.parent if path is not None else Path()).absolute()
        # systemd separates several state directories by colons; ours is the first.
        state = environ.get("STATE_DIRECTORY", "").split(":")[0]
        self.place = Place(environ, folder, Path(state).absolute() if state else folder)
        self.problems: list[Problem] = []
        self.refused: set[str] = set()
        """Keys whose value was wrong: that has been told, so they are not told to be missing."""
        self.warnings: list[str] = []

    # -- the environment --

    def check_families(self) -> None:
        for first, second in FAMILIES.values():
            one, other = self.environ.get(first), self.environ.get(second)
            if one and other and one != other:
                self.problem_of_variable(
                    f"{first} and {second}",
                    "are set to different values",
                    "unset one of them: they are two names of the same thing",
                )

    def lay_environment_over(self) -> None:
        """Puts the environment's values into the tree, in place of the file's."""
        for variable, key in BREAKER_VARIABLES.items():
            if text := self.environ.get(variable):
                self._put(("breaker",), key, FromEnv(text, variable))
        for variable, text in sorted(self.environ.items()):
            if variable.upper().startswith("GWPROXY__"):
                self._override(variable, text)
            elif meant := _meant_override(variable):
                self.warnings.append(f"{variable} is not read: did you mean {meant}?")

    def _override(self, variable: str, text: str) -> None:
        segments = variable.split("__")[1:]
        for table in TABLES:
            steps = table.removesuffix(".*").split(".")
            rest = segments[len(steps) :]
            if (
                [segment.lower() for segment in segments[: len(steps)]] == steps
                and len(rest) == (2 if table.endswith("*") else 1)
                and all(rest)
                and rest[-1].lower() in keys_of(table)
            ):
                names = self.branch(*steps) if len(rest) == 2 else {}
                names_of_tables = [_matching_name(name, names) for name in rest[:-1]]
                self._put((*steps, *names_of_tables), rest[-1].lower(), FromEnv(text, variable))
                return
        known = list(_variables(self.tree))
        same_key = [name for name in known if name.split("__")[-1] == segments[-1].upper()]
        # Compared without what all have in common, which would make everything look alike.
        near = nearest(
            variable.upper().removeprefix("GWPROXY__"),
            [name.removeprefix("GWPROXY__") for name in same_key or known],
        )
        self.problem_of_variable(
            variable,
            "names no key of the configuration",
            f"did you mean GWPROXY__{near}?" if near else "write GWPROXY__TABLE__KEY",
        )

    def _put(self, steps: tuple[str, ...], key: str, value: FromEnv) -> None:
        node = self.tree
        for step in steps:
            child = node.setdefault(step, {})
            if not isinstance(child, dict):
                return  # the file has no table there: that is told when it is read
            node = child
        node[key] = value

    # -- tables and keys --

    def problem(self, key: str, what: str, cure: str) -> None:
        self.problems.append(Problem(str(self.path or "environment"), key, what, cure))

    def problem_of_variable(self, variable: str, what: str, cure: str) -> None:
        self.problems.append(Problem("environment", variable, what, cure))

    def branch(self, *steps: str) -> dict[str, Any]:
        """The table at a path as it was written; empty where there is none."""
        node: Any = self.tree
        for number, step in enumerate(steps, start=1):
            node = node.get(step, {})
            if not isinstance(node, dict):
                if isinstance(node, FromEnv):
                    raise AssertionError("the environment puts values only where keys are")
                path = dotted(*steps[:number])
                self.problem(path, f"must be a table, not {kind(node)}", f"write [{path}]")
                return {}
        return cast("dict[str, Any]", node)

    def table(self, table: str, name: str | None = None) -> dict[str, Any]:
        """The checked values of one table. A wrong value is noted and left out, so that its
        default stands in for it until all problems are known."""
        steps = table.removesuffix(".*").split(".") + ([] if name is None else [name])
        branch = self.branch(*steps)
        path = dotted(*steps)
        found: dict[str, Any] = {}
        for item in fields(TABLES[table]):
            key = item.name
            if key not in PARSERS[table]:
                continue
            value = branch.get(key)
            if isinstance(value, FromEnv) and not value.text and item.default is None:
                continue  # an empty variable takes an optional value away
            if value is not None:
                self.parse(found, table, key, value, path)
            elif item.default is MISSING:
                self.problem(f"{path}.{key}", "is missing", f"add {key} = ... to [{path}]")
        for key in branch.keys() - PARSERS[table].keys():
            self._unknown_key(key, table, path)
        return found

    def parse(self, found: dict[str, Any], table: str, key: str, value: object, path: str) -> None:
        variable = value.variable if isinstance(value, FromEnv) else None
        text = value.text if isinstance(value, FromEnv) else value
        try:
            found[key] = PARSERS[table][key](Raw(text, variable, self.place))
        except Wrong as wrong:
            if (
                isinstance(wrong, Unset)
                and table == "upstream"
                and wrong.variable in FAMILIES.get(key, ())
            ):
                return  # which of Cloudflare's three are not set is told in one sentence
            self.refused.add(f"{path}.{key}")
            if variable is None:
                self.problem(f"{path}.{key}", wrong.what, wrong.cure)
            else:
                self.problem_of_variable(variable, wrong.what, wrong.cure)

    def _unknown_key(self, key: str, table: str, path: str) -> None:
        place = f"{path}.{dotted(key)}"
        if is_provider_key(key) and table != "admin":
            self.problem(place, *NO_PROVIDER_KEYS)
            return
        if near := nearest(key, keys_of(table)):
            cure = f'did you mean "{near}"?'
        elif home := home_of(key):
            cure = f"it belongs to [{home}]"
        else:
            cure = f"known: {', '.join(keys_of(table))}"
        self.problem(place, "is not a key of this table", cure)

    def check_table_names(self) -> None:
        known = list(dict.fromkeys(table.split(".")[0] for table in TABLES))
        for name, value in self.tree.items():
            if name in known:
                continue
            near = nearest(name, known)
            if is_provider_key(name):
                self.problem(dotted(name), *NO_PROVIDER_KEYS)
            elif isinstance(value, dict):
                cure = f"did you mean [{near}]?" if near else f"known: {', '.join(known)}"
                self.problem(dotted(name), "is not a table of the configuration", cure)
            else:
                home = home_of(name)
                cure = f"it belongs to [{home}]" if home else "put it into its table"
                self.problem(dotted(name), "is not a key of the configuration", cure)
        for name in self.branch("prices").keys() - {"models"}:
            cure = 'write [prices.models."provider/model"]'
            self.problem(dotted("prices", name), "is not a key of [prices]", cure)


def _matching_name(segment: str, names: Collection[str]) -> str:
    """The name in the file that a variable means: a variable's name has no case, dash or slash."""
    for name in names:
        if _flat(name) == _flat(segment):
            return name
    return segment.lower() if segment.isupper() else segment


def _variables(tree: Mapping[str, Any]) -> Iterator[str]:
    """Every variable that would be understood, for suggestions."""
    for table in TABLES:
        *steps, last = table.split(".")
        names = [last]
        if last == "*":
            node: Any = tree
            for step in steps:
                node = node.get(step, {}) if isinstance(node, Mapping) else {}
            names = list(node) if isinstance(node, Mapping) else []
        for name in names:
            for key in keys_of(table):
                yield "__".join(("GWPROXY", *steps, _flat(name), key)).upper()


def _meant_override(variable: str) -> str | None:
    """GWPROXY_SERVER_LISTEN is one underscore short, twice, and would be ignored in silence."""
    if not variable.startswith("GWPROXY_") or variable == "GWPROXY_ADMIN_KEY":
        return None
    for known in _variables({}):
        if re.sub("_+", "_", known) == re.sub("_+", "_", variable.upper()):
            return known
    return None


def is_provider_key(name: str) -> bool:
    return re.search(r"(^|_)(api_?keys?|secret|secret_?key|access_?key)$", _flat(name)) is not None


def _flat(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
