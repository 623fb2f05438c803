"""The configuration: config.toml and the environment, read once into frozen values.

Rule of the room: every value is checked here, so that nobody checks it again later; all that is
wrong is told at once, each with its file, its key and the cure; a secret is never shown.

Which source wins, from strong to weak: `GWPROXY__TABLE__KEY` in the environment, the three
`CIRCUIT_BREAKER_*` variables, the file, the default that stands beside each key in `tables`.
"""

from gwproxy.config.loading import find_config, load
from gwproxy.config.problems import ConfigError, Problem
from gwproxy.config.tables import TABLES, ChainEntry, Config, Model, Prices, Provider, keys_of
from gwproxy.config.values import Listen, Secret
from gwproxy.config.variables import FAMILIES

__all__ = [
    "FAMILIES",
    "TABLES",
    "ChainEntry",
    "Config",
    "ConfigError",
    "Listen",
    "Model",
    "Prices",
    "Problem",
    "Provider",
    "Secret",
    "find_config",
    "keys_of",
    "load",
]
