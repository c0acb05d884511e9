"""A client of the Redis that replicas share, by URL, and what its errors mean to us.

Knows addresses, time-outs and errors; nothing of what is kept there. A call waits for one answer
for at most the time-out, and is sent once more only where the connection broke.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from service.errors import RegistryError, UnavailableError

__all__ = ["Client", "connect", "key", "redis_errors"]

Client = redis.Redis | RedisCluster
_SCHEME = re.compile(r"(rediss?)(?:\+(sentinel|cluster))?|unix")
_PORTS = {"sentinel": 26379}
_CHECK_S = 10.0  # a connection that was idle for longer is tried before it is used


def connect(url: str, *, password: str | None = None, timeout_s: float) -> Client:
    """Make a client. Only a cluster is asked something at once; others at the first call.

    redis://, rediss:// (TLS; `ssl_ca_certs` and others as query), unix://; with several hosts
    redis+sentinel://host:port,host:port/service/db and redis+cluster://host:port,host:port, both
    with `rediss` as well. What stands in the URL is more than what is given here.

    Raises:
        RegistryError: no such address can be; its password is not repeated.
        UnavailableError: the cluster does not answer.
    """
    scheme = _SCHEME.fullmatch(url.partition("://")[0])
    if scheme is None:
        raise _refused("its address has to begin with redis://, rediss:// or unix://")
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": _CHECK_S,
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        "password": password,
        "protocol": 2,  # hints come as they did in every Redis
    }
    try:
        with redis_errors():
            if scheme[2] is None:
                return _single(url, options)
            tls, (hosts, plain) = scheme[1] == "rediss", _hosts(url, _PORTS.get(scheme[2], 6379))
            made = _sentinel if scheme[2] == "sentinel" else _cluster
            return made(hosts, _parsed(plain), options, tls=tls)
    except (ValueError, TypeError, AttributeError) as error:
        raise _refused(_unreadable(error)) from None  # its text may have a password in it


def key(prefix: str, name: str) -> str:
    """The key of a name under a prefix; all of one prefix lie in one slot of a cluster."""
    return f"{{{prefix}}}:{name}"


@contextmanager
def redis_errors() -> Iterator[None]:
    """What Redis says, as errors of ours without an address or a password in them.

    Raises:
        RegistryError: it does not let us in, or what answers there is no Redis.
        UnavailableError: anything else, among it that nobody answers (`registry_unavailable`).
    """
    try:
        yield
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise _refused(
            "it does not let this server in: wrong name or password, or rights"
        ) from error
    except InvalidResponse as error:
        raise _refused("what answers there is no Redis") from error
    except ResponseError as error:
        raise _of_response(error) from error
    except redis.TimeoutError as error:
        raise _unavailable("it did not answer in time") from error
    except MasterNotFoundError as error:
        raise _unavailable("no sentinel tells of a master now") from error
    except (RedisError, RedisClusterException, OSError) as error:
        raise _unavailable("it cannot be reached") from error


class _AddressError(ValueError):
    """One that says only what may be said."""


def _single(url: str, options: dict[str, Any]) -> Client:
    parts = urlsplit(url)
    if parts.fragment:
        raise ValueError(url)
    if parts.scheme != "unix":
        if not parts.hostname:
            raise _AddressError("its address names no host")
        _database(parts.path.strip("/"))
    client = redis.Redis.from_url(url, **options)
    client.connection_pool.make_connection()  # says now what the query should not have
    return client


def _sentinel(
    hosts: list[tuple[str, int]], found: dict[str, Any], options: dict[str, Any], *, tls: bool
) -> Client:
    service, _, db = found.pop("path").strip("/").partition("/")
    if not service:
        raise _AddressError("a sentinel's address ends with the name of the service")
    asking = {name: value for name, value in options.items() if name != "password"}
    if "sentinel_password" in found:
        asking["password"] = found.pop("sentinel_password")
    secure = {name: value for name, value in found.items() if name.startswith("ssl")}
    if tls:
        secure["ssl"] = True
        asking |= secure
    sentinel = Sentinel(hosts, sentinel_kwargs=asking, **options | found | secure)
    client = sentinel.master_for(service, db=_database(db))
    client.connection_pool.make_connection()
    return client


def _cluster(
    hosts: list[tuple[str, int]], found: dict[str, Any], options: dict[str, Any], *, tls: bool
) -> Client:
    if found.pop("path").strip("/") not in ("", "0"):
        raise _AddressError("a cluster has no databases")
    nodes = [ClusterNode(host, port) for host, port in hosts]
    return RedisCluster(startup_nodes=nodes, ssl=tls, **options | found)


def _database(text: str) -> int:
    if not (text or "0").isdecimal():
        raise _AddressError("its address ends with the number of a database")
    return int(text or 0)


def _hosts(url: str, port: int) -> tuple[list[tuple[str, int]], str]:
    """The hosts of a URL that has several, and that URL with one that stands for all."""
    parts = urlsplit(url)
    who, at, where = parts.netloc.rpartition("@")
    hosts = []
    for host in where.split(","):
        one = urlsplit(f"//{host}")
        if not one.hostname:
            raise _AddressError("its address names no host")
        hosts.append((one.hostname, one.port or port))
    query = urlencode(parse_qsl(parts.query))
    return hosts, f"redis://{who}{at}all{parts.path}?{query}"


def _parsed(url: str) -> dict[str, Any]:
    """Name, password and query of a URL, in redis-py's types; `path` as it stands."""
    found = dict(parse_url(url))
    for name in ("host", "port", "db", "connection_class"):
        found.pop(name, None)
    return found | {"path": unquote(urlsplit(url).path)}


def _of_response(error: ResponseError) -> UnavailableError:
    said = str(error)
    if "WRONGTYPE" in said:
        return RegistryError("another program's data lies under the registry's keys")
    if "invalid password" in said or "NOAUTH" in said or "DB index" in said:
        return _refused(said.rstrip("."))
    if "unknown command" in said.lower():
        return _refused("what answers there lacks a command that every Redis has")
    if isinstance(error, OutOfMemoryError):
        return _unavailable("it has no memory left")
    return _unavailable(f"it says {said[:100]}")


def _refused(why: str) -> RegistryError:
    return RegistryError(f"the registry cannot be used: {why}", code="registry_refused")


def _unavailable(why: str) -> UnavailableError:
    return UnavailableError(f"the registry is away: {why}", code="registry_unavailable")


def _unreadable(error: Exception) -> str:
    if isinstance(error, _AddressError):
        return str(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None:
        return f"its address has an option that is none: {unknown[1]}"
    return "its address cannot be read (what is special in a URL stands as %xx in a password)"
