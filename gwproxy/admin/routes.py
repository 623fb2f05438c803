"""The admin plane's one table of routes, and the two ways in: over HTTP, behind an admin key, and
without it, for a command on the machine itself."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

import msgspec
from aiohttp import web

from gwproxy.admin import body as checked
from gwproxy.admin.admin_keys import AdminKeys
from gwproxy.admin.ask import Answer, Ask, Route, etag, given, versions
from gwproxy.admin.audit import Audit
from gwproxy.admin.auth import AdminAuth
from gwproxy.admin.body import Page, Shown
from gwproxy.admin.keys import (
    CreatedKey,
    FoundQuery,
    Key,
    KeyChange,
    KeyPage,
    Keys,
    NewKey,
    Rotation,
)
from gwproxy.admin.openapi import OpenApi
from gwproxy.admin.organizations import (
    NewOrganization,
    Organization,
    OrganizationChange,
    OrganizationPage,
    OrganizationQuery,
    Organizations,
)
from gwproxy.admin.providers import Providers
from gwproxy.admin.quota import Quota
from gwproxy.admin.reconcile import Reconciliation
from gwproxy.admin.usage import Usage
from gwproxy.admin.users import (
    MemberQuery,
    NewUser,
    User,
    UserChange,
    UserPage,
    UserQuery,
    Users,
)
from gwproxy.core.errors import NotFound
from gwproxy.intake import Intake
from gwproxy.state.repeats import Repeats, once
from gwproxy.state.store import Store

BODY_LIMIT_BYTES = 256 * 1024
"""A single row, or an organization with a few hundred prices. Whole directories go by import."""

HttpHandler = Callable[..., Awaitable[web.StreamResponse]]
"""Called with the request, its id, and the parameters of its path by their names."""


def routes(
    store: Store, providers: Providers | None = None, more: Iterable[Route] = ()
) -> tuple[Route, ...]:
    """All that can be asked of the admin plane of `store`; None: of a plane that has no providers
    behind it. `more`: of the process, where there is one that runs."""
    usage = Usage(store)
    table = (
        *_of_users(Users(store.directory)),
        *_of_keys(Keys(store.directory)),
        *_of_organizations(Organizations(store.directory), Users(store.directory)),
        *AdminKeys(store.directory).routes(),
        *usage.routes(),
        *Quota(store, usage).routes(),
        *Audit(store).routes(),
        *(() if providers is None else providers.routes()),
        *Reconciliation(store).routes(),
        *more,
    )
    return (*table, *OpenApi(table).routes)


def _of_users(users: Users) -> tuple[Route, ...]:
    one = "/admin/users/{user_id}"
    return (
        Route(
            method="POST",
            path="/admin/users",
            do=users.create,
            summary="Create a user.",
            body=NewUser,
            answers=User,
            status=201,
            refusals=(409,),
        ),
        Route(
            method="GET",
            path="/admin/users",
            do=users.list,
            summary="List users.",
            query=UserQuery,
            answers=UserPage,
        ),
        Route(
            method="GET",
            path=one,
            do=users.show,
            summary="Show a user.",
            query=Shown,
            answers=User,
        ),
        Route(
            method="PATCH",
            path=one,
            do=users.change,
            summary="Change a user: the fields that are sent, and no others.",
            body=UserChange,
            answers=User,
            conditional=True,
            refusals=(409,),
        ),
        Route(
            method="DELETE",
            path=one,
            do=users.delete,
            summary="Delete a user: none of the user's keys opens anything from now on.",
            status=204,
            conditional=True,
        ),
    )


def _of_keys(keys: Keys) -> tuple[Route, ...]:
    several = "/admin/users/{user_id}/api-keys"
    one = f"{several}/{{key_id}}"
    return (
        Route(
            method="POST",
            path=several,
            do=keys.create,
            summary="Create a key. Its text is in this answer and nowhere else.",
            body=NewKey,
            answers=CreatedKey,
            status=201,
        ),
        Route(
            method="GET",
            path=several,
            do=keys.list,
            summary="List a user's keys, oldest first.",
            query=Page,
            answers=KeyPage,
        ),
        Route(
            method="GET",
            path=one,
            do=keys.show,
            summary="Show a key, without its text.",
            query=Shown,
            answers=Key,
        ),
        Route(
            method="PATCH",
            path=one,
            do=keys.change,
            summary="Change a key: the fields that are sent, and no others.",
            body=KeyChange,
            answers=Key,
            conditional=True,
        ),
        Route(
            method="GET",
            path="/admin/api-keys/{key_id}",
            do=keys.find,
            summary="Find a key by its id alone.",
            query=FoundQuery,
            answers=Key,
        ),
        Route(
            method="POST",
            path=f"{one}/rotate",
            do=keys.rotate,
            summary="Give a key a new secret; the one before stays good for a while.",
            body=Rotation,
            answers=CreatedKey,
            status=201,
            conditional=True,
            refusals=(409,),
        ),
        Route(
            method="DELETE",
            path=one,
            do=keys.revoke,
            summary="Revoke a key: it is refused from the next request on.",
            status=204,
            conditional=True,
        ),
    )


def _of_organizations(organizations: Organizations, users: Users) -> tuple[Route, ...]:
    one = "/admin/organizations/{org_id}"
    return (
        Route(
            method="POST",
            path="/admin/organizations",
            do=organizations.create,
            summary="Create an organization.",
            body=NewOrganization,
            answers=Organization,
            status=201,
            refusals=(409,),
        ),
        Route(
            method="GET",
            path="/admin/organizations",
            do=organizations.list,
            summary="List organizations.",
            query=OrganizationQuery,
            answers=OrganizationPage,
        ),
        Route(
            method="GET",
            path=one,
            do=organizations.show,
            summary="Show an organization.",
            query=Shown,
            answers=Organization,
        ),
        Route(
            method="PATCH",
            path=one,
            do=organizations.change,
            summary="Change an organization: the fields that are sent, and no others.",
            body=OrganizationChange,
            answers=Organization,
            conditional=True,
        ),
        Route(
            method="DELETE",
            path=one,
            do=organizations.delete,
            summary="Delete an organization: none of its users can call from now on.",
            status=204,
            conditional=True,
            refusals=(409,),
        ),
        Route(
            method="GET",
            path=f"{one}/users",
            do=users.members,
            summary="List the users of an organization.",
            query=MemberQuery,
            answers=UserPage,
        ),
    )


# -- over HTTP -----------------------------------------------------------------------------------


def over_http(route: Route, auth: AdminAuth, intake: Intake, repeats: Repeats) -> HttpHandler:
    """The route behind the admin key, for the front."""
    if route.streams is not None:
        return route.do

    async def handle(
        request: web.BaseRequest, request_id: str, **parameters: str
    ) -> web.StreamResponse:
        # Before the body is read and before the path is looked into: a stranger learns nothing.
        by = auth.check(request.headers, request.remote, request_id)
        auth.permit(by, writes=route.writes)
        query = checked.query(request.query.items(), route.query or _Nothing)
        match = versions(request.headers.get("If-Match")) if route.conditional else None
        # Keys and limits belong into no cache on the way.
        headers = {"Cache-Control": "no-store"}
        body, author = None, by.author
        if route.body is not None:
            raw = await intake.read(request, bytes, optional=True)
            body = checked.decode(raw, route.body)
            key = request.headers.get("Idempotency-Key") if route.repeatable else None
            if key is not None:
                mark = once(author.actor, request.path, checked.idempotency_key(key), raw)
                author = replace(author, once=mark)
                if repeats.find(mark) is not None:
                    headers["Idempotency-Replayed"] = "true"
        answer: Answer = await route.do(Ask(author, match), **given(route, parameters, query, body))
        if answer.version is not None:
            headers["ETag"] = etag(answer.version)
        if answer.value is None:
            return web.Response(status=route.status, headers=headers)
        return web.Response(
            status=route.status,
            body=msgspec.json.encode(answer.value),
            content_type="application/json",
            headers=headers,
        )

    return handle


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The query of a route that has none."""


# -- without it ----------------------------------------------------------------------------------


async def ask_directly(
    table: Iterable[Route],
    method: str,
    path: str,
    *,
    query: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    ask: Ask,
) -> Answer:
    """As over HTTP, in this process; whoever can open the store needs no key."""
    parts = path.split("/")
    for route in table:
        pattern = route.path.split("/")
        if route.method != method or len(pattern) != len(parts) or route.streams is not None:
            continue
        pairs = list(zip(pattern, parts, strict=True))
        if all(name == part or name.startswith("{") for name, part in pairs):
            parameters = {name[1:-1]: part for name, part in pairs if name.startswith("{")}
            found = checked.query(query, route.query or _Nothing)
            sent = None if route.body is None else checked.decode(body, route.body)
            answer: Answer = await route.do(ask, **given(route, parameters, found, sent))
            return answer
    raise NotFound("There is no such route.")
