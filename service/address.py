"""Where a server is and what opens it, as a person gave them: checked, and never repeated."""

from __future__ import annotations

import httpx
from pydantic import SecretStr

__all__ = ["authorization", "server_url"]


def server_url(text: str) -> httpx.URL:
    """The URL of a server.

    Raises:
        ValueError: it cannot be one; the message does not repeat it, as it may hold a password.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"this is no URL of a server: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("a server's URL begins with http:// or https:// and a host")
    return url


def authorization(key: SecretStr | None) -> dict[str, str]:
    """The headers for a key; none without one.

    Raises:
        ValueError: no header takes it; below, an error would show it.
    """
    if key is None:
        return {}
    text = key.get_secret_value()
    if not (text.isascii() and text.isprintable() and text and " " not in text):
        raise ValueError("a key is of printable ASCII without spaces")
    return {"Authorization": f"Bearer {text}"}
