"""Who may do what: one table of all routes, and the gate that every request passes first.

Deny by default. A route that the table lacks does not exist from outside, and an app whose OpenAPI
document names one does not start. The gate also refuses query parameters that are not documented:
both before a byte of a body is read.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from medley.errors import MedleyError
from service.errors import AccessError, RequestError
from service.problems import answer
from service.settings import Settings, is_loopback

__all__ = ["RULES", "Gate", "Level", "Rules", "may"]


class Level(IntEnum):
    """What a route asks for: nothing, the read key if there is one, the admin key."""

    OPEN = 0
    READ = 1
    CHANGE = 2


OPEN, READ, CHANGE = Level.OPEN, Level.READ, Level.CHANGE
Rules = Mapping[str, Mapping[str, Level]]  # by path and method
RULES: Rules = {
    "/livez": {"GET": OPEN},
    "/readyz": {"GET": OPEN},
    "/startupz": {"GET": OPEN},
    "/docs": {"GET": OPEN},
    "/openapi.json": {"GET": OPEN},
    "/metrics": {"GET": READ},
    "/v1/classify": {"POST": READ},
    "/v1/route": {"POST": READ},
    "/v1/embeddings": {"POST": READ},
    "/v1/models": {"GET": READ},
    "/v1/models/{model}": {"GET": READ},
    "/v1/tasks": {"GET": READ},
    "/v1/tasks/{task}": {"GET": READ, "DELETE": CHANGE},
    "/v1/tasks/{task}:rollback": {"POST": CHANGE},
    "/v1/tasks/{task}/aliases/{alias}": {"PUT": CHANGE, "DELETE": CHANGE},
    "/v1/tasks/{task}/versions/{version}": {"PUT": CHANGE, "DELETE": CHANGE},
    "/v1/tasks/{task}/versions/{version}/pin": {"PUT": CHANGE, "DELETE": CHANGE},
    "/v1/tasks/{task}/rollout": {"GET": READ, "PUT": CHANGE, "DELETE": CHANGE},
    "/v1/tasks/{task}/rollout:promote": {"POST": CHANGE},
    "/v1/tasks/{task}/usage": {"GET": READ},
    "/v1/unified": {"GET": READ},
    "/v1/unified/{digest}": {"PUT": CHANGE},
    "/v1/replicas": {"GET": READ},
    "/v1/operations": {"GET": READ},
    "/v1/operations/{operation}": {"GET": READ},
    "/v1/unclaimed": {"GET": CHANGE, "DELETE": CHANGE},  # users' images: not for every reader
    "/v1/unclaimed/{image}": {"GET": CHANGE, "DELETE": CHANGE},
    "/v2": {"GET": READ},
    "/v2/health/live": {"GET": OPEN},
    "/v2/health/ready": {"GET": OPEN},
    "/v2/models/{model}": {"GET": READ},
    "/v2/models/{model}/ready": {"GET": READ},
    "/v2/models/{model}/infer": {"POST": READ},
    "/v2/models/{model}/versions/{version}": {"GET": READ},
    "/v2/models/{model}/versions/{version}/ready": {"GET": READ},
    "/v2/models/{model}/versions/{version}/infer": {"POST": READ},
    "/v2/repository/index": {"POST": READ},
    "/v2/repository/models/{model}/load": {"POST": CHANGE},
    "/v2/repository/models/{model}/unload": {"POST": CHANGE},
}
_MAX_NAME = 100  # of a foreign query parameter, as far as an answer repeats it

Operation = tuple[str, str]  # method, pattern of the path


class Gate:
    """ASGI middleware, inside of the one that gives requests their ids.

    Args:
        app: what is behind it.
        settings: the keys, and whether changes are allowed at all.
        openapi: gives the OpenAPI document, which says what routes and query parameters there are.
        rules: what each route asks for.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        openapi: Callable[[], dict[str, Any]],
        rules: Rules = RULES,
    ) -> None:
        self._app = app
        self._settings = settings
        self._rules = rules
        self._query = _documented(openapi())
        undeclared = sorted(f"{m} {p}" for m, p in self._query if m not in rules.get(p, ()))
        assert not undeclared, f"routes without a rule in service/access.py: {undeclared}"
        self._patterns = {path: compile_path(path)[0] for path in rules}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request pass, or answer it with a problem."""
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        if scope["type"] == "http":
            try:
                self._check(scope)
            except (MedleyError, HTTPException) as error:
                await answer(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        method, paths = scope["method"], _matching(self._patterns, _path(scope))
        if not paths:
            raise HTTPException(404)
        known = [path for path in paths if method in self._rules[path]]
        if not known:
            allowed = sorted({method for path in paths for method in self._rules[path]})
            raise HTTPException(405, headers={"Allow": ", ".join(allowed)})
        scope["operation"] = f"{method} {known[0]}"  # to count what is refused here
        # Two patterns may fit one path: whichever the router takes, the stricter rule holds.
        level = scope["level"] = max(self._rules[path][method] for path in known)
        may(level, Headers(scope=scope), self._settings)
        names = {name for path in known for name in self._query.get((method, path), ())}
        _check_query(QueryParams(scope["query_string"]), names)


def may(level: Level, headers: Headers, settings: Settings) -> None:
    """Let a request with these headers do what needs `level`.

    Raises:
        AccessError: it may not.
    """
    if level is Level.CHANGE:
        _may_change(headers, settings)
    elif level is Level.READ and settings.read_key is not None:
        _check_key(headers, "reading", settings.read_key, settings.admin_key)


def _may_change(headers: Headers, settings: Settings) -> None:
    if not settings.changes_allowed:
        raise AccessError("changes are off: this server has no admin key", code="changes_disabled")
    if settings.admin_key is None:
        _check_origin(headers)
    else:
        _check_key(headers, "a change", settings.admin_key)


def _check_key(headers: Headers, what: str, *keys: SecretStr | None) -> None:
    given = headers.get("authorization", "").encode()
    expected = [f"Bearer {key.get_secret_value()}".encode() for key in keys if key is not None]
    # Every key is compared, and in constant time: how long it takes tells nothing.
    if not sum(hmac.compare_digest(given, one) for one in expected):
        raise AccessError(f"{what} needs a key as bearer token")


def _check_origin(headers: Headers) -> None:
    """Without a key, a page of another site in a browser on this machine may change nothing.

    Browsers send `Origin` with each change; the names in it cannot be forged by a page, also not
    by one whose name was made to resolve to this machine.
    """
    origin = headers.get("origin")
    if origin is None:
        return
    try:
        parts = urlsplit(origin)
        own = is_loopback(parts.hostname or "") and parts.netloc == headers.get("host")
    except ValueError:
        own = False
    if not own:
        raise AccessError("a change by a page of another site needs a key", code="cross_origin")


def _check_query(query: QueryParams, known: set[str]) -> None:
    unknown = sorted(set(query.keys()) - known)
    if unknown:
        named = [{"where": f"query.{name[:_MAX_NAME]}", "what": "unknown"} for name in unknown[:10]]
        raise RequestError(
            f"unknown query parameter: {', '.join(one['where'][6:] for one in named)}", errors=named
        )


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _matching(patterns: Mapping[str, re.Pattern[str]], path: str) -> list[str]:
    return [known for known, pattern in patterns.items() if pattern.match(path)]


def _documented(document: Mapping[str, Any]) -> dict[Operation, frozenset[str]]:
    """The names of the query parameters of each operation."""
    return {
        (method.upper(), path): frozenset(
            one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"
        )
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
