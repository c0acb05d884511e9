"""Images by URL: over http(s), from public addresses only, within bounds of bytes and time.

A name is resolved once for each connection, every address that it has is checked, and one that was
checked is connected to: a name that would resolve to something else later gains nothing. Redirects
go the same way. No proxy, cookie or credential is used.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

import httpcore
import httpx

from service.errors import FetchError
from service.intake.room import Room, Take

__all__ = ["Fetching", "Network", "Resolve", "is_public"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_MAX_REDIRECTS = 3
_MAX_CONNECTIONS = 32
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "medley")]
_UNICAST = ip_network("2000::/3")  # all of IPv6 that is routed; NAT64's 64:ff9b::/96 is not in it
_SIX_TO_FOUR = ip_network("2002::/16")  # its addresses name an IPv4 address that nobody checked
_PROTOCOLS = ip_network("192.0.0.0/24")  # IANA's own, a few of which Python calls global
_FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpx.InvalidURL,
    OSError,
)


class Fetching:
    """Fetches images; belongs to the event loop."""

    def __init__(
        self,
        room: Room,
        *,
        max_bytes: int,
        timeout_s: float,
        networks: Iterable[Network] = (),
        resolve: Resolve | None = None,
    ) -> None:
        """Take the bounds.

        Args:
            room: for the bytes that are held at once.
            max_bytes: of one image.
            timeout_s: for one image, from its name's resolution to its last byte.
            networks: allowed although they are not public.
            resolve: instead of the system's resolver.
        """
        self._room = room
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=0,
            network_backend=_CheckedBackend(tuple(networks), resolve or _system_resolve),
        )

    async def close(self) -> None:
        """Close what is open."""
        await self._pool.aclose()

    @asynccontextmanager
    async def image(self, url: str) -> AsyncIterator[bytes]:
        """The file at `url`; its bytes count as held until the `with` block ends.

        Raises:
            FetchError: `url_refused`, it may not be fetched; `fetch_failed`, it could not be;
                `too_large`.
            BusyError: all requests together hold too much.
        """
        with self._room.share() as take:
            yield await self._in_time(url, take)

    async def _in_time(self, url: str, take: Take) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._get(url, take)
        except TimeoutError as error:
            raise FetchError(f"the URL did not answer within {self._timeout_s:g} s") from error
        except _FAILURES as error:
            raise FetchError("the URL cannot be fetched") from error

    async def _get(self, url: str, take: Take) -> bytes:
        place = httpx.URL(url)
        for _ in range(1 + _MAX_REDIRECTS):
            _check_url(place)
            headers = [("Host", place.netloc.decode("ascii")), *_HEADERS]
            async with self._pool.stream("GET", _target(place), headers=headers) as response:
                if response.status == httpx.codes.OK:
                    return await self._body(response, take)
                place = _redirected(place, response)
        raise FetchError(f"the URL is redirected more than {_MAX_REDIRECTS} times")

    async def _body(self, response: httpcore.Response, take: Take) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_stream():
            if len(body) + len(chunk) > self._max_bytes:
                raise FetchError(
                    f"the image at the URL has more than {self._max_bytes} bytes", code="too_large"
                )
            take(len(chunk))
            body += chunk
        return bytes(body)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that it has resolved and checked itself.

    httpcore asks it for every connection, and takes the name for TLS and for the header `Host` from
    the URL, not from here.
    """

    def __init__(self, networks: Sequence[Network], resolve: Resolve) -> None:
        self._networks = networks
        self._resolve = resolve
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  (httpcore's signature)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of `host` that answers, if all of them are allowed."""
        addresses = [ip_address(text) for text in await self._resolve(host, port)]
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise FetchError("the URL's address is not allowed", code="url_refused")
        for address in addresses[:-1]:
            try:
                return await self._plain.connect_tcp(str(address), port, timeout, local_address)
            except httpcore.ConnectError:
                continue
        return await self._plain.connect_tcp(str(addresses[-1]), port, timeout, local_address)

    def _allowed(self, address: Address) -> bool:
        return is_public(address) or any(address in network for network in self._networks)


def is_public(address: Address) -> bool:
    """Whether an address is a unicast one of the public Internet.

    Not private, loopback, link-local, multicast, reserved or a way to an IPv4 address that is; an
    IPv4 address written as IPv6 is judged as what it is.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        return address.is_global and address in _UNICAST and address not in _SIX_TO_FOUR
    return address.is_global and not address.is_multicast and address not in _PROTOCOLS


async def _system_resolve(host: str, port: int) -> list[str]:
    """All addresses of a host name, or of an address in any of its spellings."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _check_url(url: httpx.URL) -> None:
    if url.scheme not in ("http", "https") or not url.host:
        raise FetchError("only http and https URLs are fetched", code="url_refused")
    if url.userinfo:
        raise FetchError("a URL with credentials is not fetched", code="url_refused")


def _target(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )


def _redirected(url: httpx.URL, response: httpcore.Response) -> httpx.URL:
    location = httpx.Headers(response.headers).get("location")
    if response.status not in _REDIRECTS or location is None:
        raise FetchError(f"the URL answers with status {response.status}")
    return url.join(location)
