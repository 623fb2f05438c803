"""The tables together: what is inherited, what belongs to what, and what contradicts what.

Rule of the room: all problems are found before one is told, and then there is no Config.
"""

import re
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gwproxy.config.addresses import cloudflare_root, is_loopback, origin
from gwproxy.config.chains import Link
from gwproxy.config.problems import ConfigError, Wrong, dotted, nearest, show
from gwproxy.config.secrets import is_reference
from gwproxy.config.tables import (
    Admin,
    Breaker,
    ChainEntry,
    Config,
    Failure,
    Limits,
    Log,
    Metrics,
    Model,
    Price,
    Prices,
    Provider,
    Quota,
    Server,
    Storage,
    Upstream,
)
from gwproxy.config.tree import NO_PROVIDER_KEYS, FromEnv, Tree, is_provider_key
from gwproxy.config.values import Listen, Secret
from gwproxy.config.variables import FAMILIES
from gwproxy.core.routing import OPENAI, REST

DEFAULT_FALLBACKS: Final = "gemini,huggingface,anthropic"

_OPENAI_NEEDS_BASE_URL: Final = (
    'is missing: the flavour "openai" has no address of its own',
    'add one such as base_url = "http://127.0.0.1:9000/v1"',
)


class Reader(Tree):
    """Walks the tree once, keeps every problem, and builds the Config if there is none."""

    def config(self) -> Config:
        self.check_families()
        self.providers_in_file = frozenset(self.branch("providers"))
        self.lay_environment_over()
        self.check_table_names()
        server, admin = Server(**self.table("server")), self._admin()
        self._check_listeners(server.listen, admin.listen)
        upstream = self._upstream()
        providers = self._providers(upstream)
        config = Config(
            file=self.path,
            server=server,
            admin=admin,
            upstream=upstream,
            providers=MappingProxyType(providers),
            models=MappingProxyType(self._models(providers)),
            breaker=Breaker(**self.table("breaker")),
            quota=self._quota(),
            failure=Failure(**self.table("failure")),
            prices=self._prices(),
            storage=self._storage(),
            log=Log(**self.table("log")),
            metrics=Metrics(**self.table("metrics")),
            limits=Limits(**self.table("limits")),
            warnings=tuple(self.warnings),
        )
        if self.problems:
            raise ConfigError(*dict.fromkeys(self.problems))
        return config

    # -- tables with rules of their own --

    def _admin(self) -> Admin:
        found = self.table("admin")
        if "key" not in self.branch("admin"):
            self.parse(found, "admin", "key", "env:GWPROXY_ADMIN_KEY", "admin")
        self._check_secret(found.get("key"), "admin", "key")
        return Admin(**found)

    def _check_listeners(self, public: Listen, admin: Listen | None) -> None:
        if public == admin and not (public.kind == "tcp" and public.port == 0):
            self.problem(
                "admin.listen",
                f"is the address of server.listen too ({public})",
                "choose another, or leave it out to share the listener",
            )

    def _upstream(self) -> Upstream:
        written = self.branch("upstream")
        found = self.table("upstream")
        flavour, base_url = found.get("flavour", "cloudflare-compat"), found.get("base_url")
        if flavour != "openai":
            # By default only: Cloudflare's token is not shown to another server unasked.
            for key, (variable, _) in FAMILIES.items():
                if key not in written:
                    self.parse(found, "upstream", key, f"env:{variable}", "upstream")
        token = found.get("token")
        if base_url is not None:
            self._check_base_url(base_url, flavour, "upstream.base_url")
            if token is None and "token" in written and "upstream.token" not in self.refused:
                self.warnings.append("upstream.token is not set: requests are sent without one")
        elif "upstream.base_url" in self.refused:
            pass
        elif flavour == "openai":
            self.problem("upstream.base_url", *_OPENAI_NEEDS_BASE_URL)
        elif absent := [
            " or ".join(family)
            for key, family in FAMILIES.items()
            if key not in found and f"upstream.{key}" not in self.refused
        ]:
            others = "" if len(absent) == len(FAMILIES) else " beside the others"
            self.problem(
                "upstream",
                f"not set: {', '.join(absent)}",
                f"Cloudflare needs them{others}; `make run` shows the gateway without any",
            )
        self._check_secret(token, "upstream", "token")
        self._check_upstream_token(token, flavour, "upstream.token")
        upstream = Upstream(root=base_url or cloudflare_root(flavour, found), **found)
        if upstream.total_timeout_s < upstream.answer_timeout_s:
            self.warnings.append(
                "upstream.total_timeout_s is below answer_timeout_s: it ends the wait before"
            )
        return upstream

    def _providers(self, upstream: Upstream) -> dict[str, Provider]:
        providers: dict[str, Provider] = {}
        for name, value in self.branch("providers").items():
            path = dotted("providers", name)
            if is_provider_key(name) and not isinstance(value, dict):
                self.problem(path, *NO_PROVIDER_KEYS)
            elif re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
                self._check_name_from_environment(name)
                providers[name] = self._provider(name, path, upstream)
            else:
                form = "use at most 64 of a-z, 0-9, _ and -, with a letter or digit first"
                self.problem(path, "is not a provider's name", form)
        return providers

    def _check_name_from_environment(self, name: str) -> None:
        """A misspelt name would make a provider that nobody wanted, and change nothing else."""
        written = self.branch("providers", name)
        if name in self.providers_in_file or written.keys() & {"prefix", "model", "base_url"}:
            return
        others = [other for other in self.branch("providers") if other != name]
        near = nearest(name, others)
        for value in written.values():
            if isinstance(value, FromEnv):
                self.problem_of_variable(
                    value.variable,
                    f"there is no [providers.{name}] with a prefix, model or base_url",
                    f'did you mean "{near}"?' if near else "add one, or set its MODEL as well",
                )

    def _provider(self, name: str, path: str, upstream: Upstream) -> Provider:
        found = self.table("providers.*", name)
        flavour = found.setdefault("flavour", upstream.flavour)
        base_url, token = found.get("base_url"), found.get("token")
        self._check_secret(token, "providers", name, "token")
        self._check_upstream_token(token, flavour, f"{path}.token")
        if base_url is not None:
            root = base_url
            self._check_base_url(base_url, flavour, f"{path}.base_url")
        elif flavour == upstream.flavour:
            root = upstream.root
        elif flavour == "openai":
            root = ""
            if f"{path}.base_url" not in self.refused:
                self.problem(f"{path}.base_url", *_OPENAI_NEEDS_BASE_URL)
        else:
            ids = {"account_id": upstream.account_id, "gateway_id": upstream.gateway_id}
            root = cloudflare_root(flavour, ids)
            if token is None and upstream.flavour != OPENAI and upstream.base_url is None:
                token = found["token"] = upstream.token  # both are Cloudflare's
            if token is None or None in ids.values():
                self.problem(
                    path,
                    f"the flavour {flavour} needs a token here and both ids in [upstream]",
                    "add token, upstream.account_id and upstream.gateway_id, or a base_url",
                )
        if token is None and upstream.token is not None:
            # A token belongs to the server it was made for: no other one gets to see it.
            if origin(root) == origin(upstream.root):
                found["token"] = upstream.token
            elif base_url is not None and not is_loopback(base_url):
                self.warnings.append(
                    f"{path} has a base_url of its own but no token: requests go there without one"
                )
        prefix, model = found.get("prefix"), found.get("model")
        if flavour == REST and (prefix or "").startswith("custom-"):
            self.problem(
                f"{path}.flavour",
                "custom providers are not on the REST API",
                'write flavour = "cloudflare-compat" there',
            )
        if prefix and model and model.startswith(f"{prefix}/"):
            self.warnings.append(
                f"{path}.model repeats the prefix: the upstream is asked for {prefix}/{model}"
            )
        return Provider(name=name, root=root, **found)

    def _models(self, providers: Mapping[str, Provider]) -> dict[str, Model]:
        models: dict[str, Model] = {}
        for name in self.branch("models"):
            path = dotted("models", name)
            if not re.fullmatch(r"[\x21-\x7e]{1,256}", name):
                self.problem(path, "is not a model's name", "use visible ASCII without spaces")
                continue
            chain: list[ChainEntry] = []
            for link in self.table("models.*", name).get("chain", ()):
                if isinstance(link, Wrong):
                    self.problem(f"{path}.chain", link.what, link.cure)
                    continue
                try:
                    entry = self._entry(link, providers)
                except Wrong as no_provider:
                    wrong = no_provider
                    if link.provider in self.branch("models"):
                        wrong = self._chain_in_chain(name, link.provider)
                    self.problem(f"{path}.chain", wrong.what, wrong.cure)
                    continue
                if (entry.provider, entry.model) in [(one.provider, one.model) for one in chain]:
                    what = f"names {entry.provider} with {show(entry.model)} twice"
                    self.problem(f"{path}.chain", what, "remove one")
                chain.append(entry)
            models[name] = Model(name, tuple(chain))
        if "auto" in models:
            for variable in ("AI_PROVIDER", "AI_MODEL", "AI_FALLBACK_PROVIDERS"):
                if self.environ.get(variable):
                    self.warnings.append(
                        f"{variable} changes nothing: [models.auto] in the configuration decides"
                    )
        elif auto := self._auto(providers):
            models["auto"] = Model("auto", auto)
        return models

    def _chain_in_chain(self, name: str, other: str) -> Wrong:
        """What is wrong with a chain that names another one, or itself."""
        way = [name]
        while other and other not in way:
            way.append(other)
            links = self.table("models.*", other).get("chain", ())
            names = [link.provider for link in links if isinstance(link, Link)]
            other = next((each for each in names if each in self.branch("models")), "")
        if other == name:
            what = f"leads in a circle: {' -> '.join([*way, name])}"
        else:
            what = f"names the chain {show(way[1])}, which is no provider"
        return Wrong(what, "list the providers themselves: no chain has another one in it")

    def _entry(self, link: Link, providers: Mapping[str, Provider]) -> ChainEntry:
        """A candidate whose provider is one of the tables (by its name, its prefix or an alias)
        or of the catalogue."""
        slug = self.catalogue.get(link.provider)
        provider = providers.get(link.provider) or next(
            (
                provider
                for provider in providers.values()
                if (provider.prefix or provider.name) in (link.provider, slug)
                or self.catalogue.get(provider.prefix or provider.name, "") == slug
            ),
            None,
        )
        if provider is None and slug is None:
            near = nearest(link.provider, [*providers, *self.catalogue])
            raise Wrong(
                f"there is no provider {show(link.provider)}",
                f'did you mean "{near}"?' if near else "add a table [providers.NAME] for it",
            )
        model = link.model or (provider.model if provider is not None else None)
        if model is None:
            raise Wrong(
                f"provider {show(link.provider)} has no model to serve here",
                f'write {{ provider = "{link.provider}", model = "..." }} or set its `model`',
            )
        name = provider.name if provider is not None else slug
        assert name is not None, "one of the two was found"
        return ChainEntry(name, model, link.weight)

    def _auto(self, providers: Mapping[str, Provider]) -> tuple[ChainEntry, ...]:
        """The chain of `auto` where the file has none: AI_PROVIDER, then AI_FALLBACK_PROVIDERS."""
        first = self.environ.get("AI_PROVIDER", "").strip().lower()
        model = self.environ.get("AI_MODEL", "").strip() or None
        fallbacks = self.environ.get("AI_FALLBACK_PROVIDERS", "").lower()
        chain: list[ChainEntry] = []
        if first:
            try:
                chain.append(self._entry(Link(first, model, 0), providers))
            except Wrong as wrong:
                self.problem_of_variable("AI_PROVIDER", wrong.what, wrong.cure)
        elif model:
            self.warnings.append("AI_MODEL changes nothing without AI_PROVIDER")
        skipped: list[str] = []
        for name in (fallbacks or DEFAULT_FALLBACKS).split(","):
            if not name.strip():
                continue
            try:
                entry = self._entry(Link(name.strip(), None, 0), providers)
            except Wrong as wrong:
                skipped.append(f"fallback provider {show(name.strip())} is skipped: {wrong.what}")
                continue
            if all(entry.provider != other.provider for other in chain):
                chain.append(entry)
        # Who did not write the list need not hear of what it has.
        if fallbacks:
            self.warnings.extend(skipped)
        return tuple(chain)

    def _prices(self) -> Prices:
        models: dict[str, Price] = {}
        for name in self.branch("prices", "models"):
            found = self.table("prices.models.*", name)
            if not re.fullmatch(r"(?!/)[\x21-\x7e]{1,256}(?<!/)", name):
                path = dotted("prices", "models", name)
                self.problem(path, "is not a model's name", 'write "provider/model"')
            if {"input", "output"} <= found.keys():
                models[name] = Price(**found)
        return Prices(MappingProxyType(models))

    def _quota(self) -> Quota:
        quota = Quota(**self.table("quota"))
        self._check_secret(quota.alert_webhook_secret, "quota", "alert_webhook_secret")
        return quota

    def _storage(self) -> Storage:
        found = self.table("storage")
        for key, name in (("path", "gwproxy.db"), ("journal", "journal")):
            found.setdefault(key, self.place.state_folder / name)
        if found["journal"] in (found["path"], found["path"].parent):
            self.problem(
                "storage.journal",
                "is the database's own path or folder",
                "give the journal a folder of its own",
            )
        storage = Storage(**found)
        if storage.journal_max_bytes < 3 * storage.journal_segment_bytes:
            self.problem(
                "storage.journal_max_bytes",
                "has no room for three segments",
                f"write {3 * storage.journal_segment_bytes} or more",
            )
        return storage

    # -- rules for secrets and addresses --

    def _check_secret(self, secret: Secret | None, *steps: str) -> None:
        """A secret in the file itself is safe only while nobody else can read the file."""
        value = self.branch(*steps[:-1]).get(steps[-1])
        if secret is None or self.path is None or not isinstance(value, str) or is_reference(value):
            return
        if self.path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            self.warnings.append(
                f"{self.path} can be read by others and has a secret in {dotted(*steps)}: "
                "chmod 600, or write env:NAME, file:/path or credential:NAME"
            )

    def _check_upstream_token(self, token: Secret | None, flavour: str, key: str) -> None:
        """A provider's own key in the place of Cloudflare's would be sent as what it is not."""
        if token is None or flavour == "openai":
            return
        if token.reveal().startswith(("sk-", "AIza", "gsk_", "hf_", "xai-", "pplx-")):
            self.problem(
                key,
                "looks like a provider's own key, not like a Cloudflare API token",
                "store it at Cloudflare (AI Gateway, Provider Keys) and put an API token with "
                "the permission AI Gateway: Run here",
            )

    def _check_base_url(self, url: str, flavour: str, key: str) -> None:
        if flavour == "cloudflare-compat" and url.endswith("/compat"):
            self.problem(key, "ends in /compat, which is appended", "write what stands before it")
        if url.startswith("http:") and not is_loopback(url):
            self.warnings.append(
                f"{key} is http to another machine: tokens, prompts and answers travel unencrypted"
            )
