"""The admin plane's one table of routes. Every handler in it stands behind the admin key."""

from collections.abc import Awaitable, Callable, Iterable
from functools import wraps

from aiohttp import web

from gwproxy.admin.auth import AdminAuth
from gwproxy.admin.keys import Keys
from gwproxy.admin.organizations import Organizations
from gwproxy.admin.users import Users
from gwproxy.state.directory import Directory

Handler = Callable[..., Awaitable[web.StreamResponse]]
"""Called with the request, and with the parameters of its path by their names."""


class Admin:
    def __init__(self, directory: Directory, auth: AdminAuth) -> None:
        self.auth = auth
        self.users = Users(directory)
        self.keys = Keys(directory)
        self.organizations = Organizations(directory)


def routes(
    admin: Admin, more: Iterable[tuple[str, str, Handler]] = ()
) -> list[tuple[str, str, Handler]]:
    """(method, path with {parameters}, handler), with the lines of rooms that have their own."""
    users, keys, organizations = admin.users, admin.keys, admin.organizations
    table: list[tuple[str, str, Handler]] = [
        ("POST", "/admin/users", users.create_user),
        ("GET", "/admin/users", users.list_users),
        ("GET", "/admin/users/{user_id}", users.show_user),
        ("POST", "/admin/users/{user_id}/api-keys", keys.create_key),
        ("GET", "/admin/users/{user_id}/api-keys", keys.list_keys),
        ("DELETE", "/admin/users/{user_id}/api-keys/{key_id}", keys.revoke_key),
        ("POST", "/admin/organizations", organizations.create_organization),
        ("GET", "/admin/organizations", organizations.list_organizations),
        ("GET", "/admin/organizations/{org_id}", organizations.show_organization),
        *more,
    ]
    return [(method, path, _guarded(admin.auth, handler)) for method, path, handler in table]


def _guarded(auth: AdminAuth, handler: Handler) -> Handler:
    @wraps(handler)
    async def guarded(request: web.BaseRequest, **parameters: str) -> web.StreamResponse:
        # Before the body is read and before the path is looked into: a stranger learns nothing.
        auth.check(request.headers, request.remote)
        return await handler(request, **parameters)

    return guarded
