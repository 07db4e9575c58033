"""Who may talk to the app: one browser on this machine, from the app's own page.

The server listens on the loopback address, which every user and every web page on this machine can reach. A request is
therefore answered only if

* its ``Host`` is a loopback name (any port, since an SSH tunnel changes it), so that a web page cannot reach the app
  under a name of its own that is resolved to this machine;
* its ``Origin``, where it has one, is that host, and a request that changes something has one;
* the browser does not say that another site has made it (``Sec-Fetch-Site``);
* it has the session's cookie, which is ``HttpOnly`` and ``SameSite=Strict``. The browser gets it in exchange for the
  token in the start address, once.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any

__all__ = ["HEADERS", "Guard", "Session", "is_loopback", "page_policy"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READING = ("GET", "HEAD")
LARGEST_BODY = 65_536
"""Largest number of bytes of a request; a question has some hundred."""

HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every answer; the policy of an answer without its own allows nothing."""
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Session:
    """The secrets of one start of the app.

    Attributes:
        token: for the start address; empty after it was used.
        cookie: name of the cookie. Cookies do not tell ports apart, so each start of the app has a name of its own.
    """

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self.cookie = f"esegeta_{secrets.token_hex(4)}"
        self._value = secrets.token_urlsafe(32)

    def exchange(self, token: str) -> str | None:
        """Return the value of the header ``Set-Cookie`` for the token, once; None for any other token.

        >>> session = Session()
        >>> token = session.token
        >>> session.exchange("guess"), "HttpOnly; SameSite=Strict" in session.exchange(token), session.exchange(token)
        (None, True, None)
        """
        if not self.token or not secrets.compare_digest(token.encode(), self.token.encode()):
            return None
        self.token = ""
        return f"{self.cookie}={self._value}; Path=/; HttpOnly; SameSite=Strict"

    def knows(self, header: str) -> bool:
        """Return True if a header ``Cookie`` has the session's cookie."""
        try:
            given = SimpleCookie(header).get(self.cookie)
        except CookieError:
            return False
        return given is not None and secrets.compare_digest(given.value.encode(), self._value.encode())


def is_loopback(host: str) -> bool:
    """Return True if a header ``Host`` is a loopback name or address, with any port.

    >>> [is_loopback(h) for h in ("localhost:8888", "127.0.0.1", "[::1]:80", "127.0.0.1.evil.org", "10.0.0.1:80")]
    [True, True, True, False, False]
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?", host)
    if match is None:
        return False
    name = match[1].strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def page_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Return the content security policy of the page: these scripts and styles by their hashes, and this server."""

    def hashes(texts: Sequence[str]) -> str:
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    own = f"script-src {hashes(scripts)}; style-src-elem {hashes(styles)}; style-src-attr 'unsafe-inline'"
    return f"{NOTHING}; {own}; img-src data: blob:; connect-src 'self'"


class Guard:
    """Middleware that answers 403, 405, 411, 413 or 421 in place of the app where a request breaks a rule.

    Args:
        app: the app that it guards.
        session: the session.
        start: path that exchanges the token, the only one without a cookie.
    """

    def __init__(self, app: App, session: Session, start: str = "/start") -> None:
        self.app, self.session, self.start = app, session, start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the app has no web socket
            return
        refusal = self.refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                names = {name.lower() for name, _ in headers}
                own = {**HEADERS, "content-security-policy": NOTHING}
                headers += [(n.encode(), v.encode()) for n, v in own.items() if n.encode() not in names]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and reason if a request breaks a rule; None if it may pass."""
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower()
            if key in headers and key in ("host", "origin", "cookie", "content-length", "sec-fetch-site"):
                return 400, f"two headers {key}"
            headers[key] = value.decode("latin-1")
        method, host = scope["method"], headers.get("host", "")
        if not is_loopback(host):
            return 421, "the host is not this machine"
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "another site has made this request"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["path"] != self.start:
            return 403, "another site has made this request"
        if method not in (*READING, "POST"):
            return 405, f"no {method} here"
        if scope["path"] == self.start:
            return None if method == "GET" else (405, f"no {method} here")
        if not self.session.knows(headers.get("cookie", "")):
            return 403, "open the address that esegeta-monai app has printed; it works once, for one browser"
        if method == "POST":
            if origin is None:
                return 403, "a request that changes something needs an origin"
            if headers.get("content-type", "").split(";")[0].strip() != "application/json":
                return 415, "send JSON"
            length = headers.get("content-length", "")
            if not length.isdigit():
                return 411, "state the length of the request"
            if int(length) > LARGEST_BODY:
                return 413, f"a request has at most {LARGEST_BODY} bytes"
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    own = {**HEADERS, "content-security-policy": NOTHING, "content-type": "text/plain; charset=utf-8"}
    headers = [(name.encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
