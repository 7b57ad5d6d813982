"""Who may ask: the key, the Host and Origin of a request, its size, and the headers of every response.

A page of another site that a colleague has open must not read documents through their browser. So a request whose
Host is not this server's (DNS rebinding), or that another origin sent, is refused.
"""

import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora.serving.shapes import error

LOCAL = ("127.0.0.1", "localhost", "[::1]")
OPEN = ("/", "/health", "/static/")  # without a key: the page asks for it
MOST_BYTES = 1_000_000  # of a request that is no upload
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """What is let through."""

    host: str
    key: str | None = None
    origins: tuple[str, ...] = ()  # of other sites that may ask, such as https://chat.example.org
    upload_bytes: int = 50_000_000


class Guard:
    """The ASGI middleware in front of all routes."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    given.setdefault(name, value)
                if origin in self.rules.origins:
                    given["Access-Control-Allow-Origin"], given["Vary"] = origin, "Origin"
                    given["Access-Control-Allow-Headers"] = "authorization, content-type"
                    given["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            await send(message)

        refused = self.refuse(scope, headers, origin)
        if refused:
            await refused(scope, receive, send_guarded)
            return
        if scope["method"] == "OPTIONS" and origin:
            await JSONResponse({})(scope, receive, send_guarded)
            return
        await self.app(scope, self.limited(scope, receive), send_guarded)

    def refuse(self, scope: Scope, headers: Headers, origin: str | None) -> JSONResponse | None:
        """The response to a request that is not let through."""
        if not self.knows_host(headers.get("host", "")):
            return JSONResponse(error("this server is not known by that name", code="unknown_host"), 421)
        if origin and origin not in self.rules.origins and origin.partition("://")[2] != headers.get("host"):
            return JSONResponse(error("requests of other sites are refused", code="cross_origin"), 403)
        if scope["method"] != "OPTIONS" and not self.has_key(scope["path"], headers.get("authorization", "")):
            message = "the key is missing or wrong; send Authorization: Bearer KEY"
            return JSONResponse(error(message, "authentication_error", "invalid_api_key"), 401)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.most(scope["path"]):
            return JSONResponse(error("the request is too large", code="too_large"), 413)
        return None

    def knows_host(self, host: str) -> bool:
        """Any name where the server was opened to a network: the key protects it there."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return self.rules.host not in LOCAL or name in LOCAL

    def has_key(self, path: str, given: str) -> bool:
        """Whether the request names the key, compared in constant time, or needs none."""
        is_open = path in OPEN[:2] or path.startswith(OPEN[2])
        if not self.rules.key or is_open:
            return True
        return hmac.compare_digest(given.encode(), f"Bearer {self.rules.key}".encode())

    def most(self, path: str) -> int:
        return self.rules.upload_bytes if path == "/documents" else MOST_BYTES

    def limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, which ends a body that is longer than was declared or allowed."""
        left = self.most(scope["path"])

        async def receive_limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        return receive_limited
