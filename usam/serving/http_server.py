"""A small HTTP server: access checks, size limits, and errors as one line of JSON."""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from dataset.text import printable
from usam.serving.leases import EndedError, FullError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NO_LIMIT_OF_JSON = 1 << 20  # bytes
DRAINED = 16 << 20  # bytes of a refused request that are read, so that its sender sees the answer
SILENT_SECONDS = 120  # a connection that sends nothing for so long is closed
MEMORY = (MemoryError,)


@dataclass(frozen=True)
class Request:
    """A request: query and headers as text by name, body as sent."""

    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer; `content` other than bytes is sent as JSON."""

    content: Any = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    kind: str = "application/octet-stream"


@dataclass(frozen=True)
class Route:
    """A path's handler: its function, the most bytes it accepts, and whether it needs the key."""

    answer: Callable[[Request], Reply]
    max_bytes: int = NO_LIMIT_OF_JSON
    needs_key: bool = True


class RefusedError(Exception):
    """A refused request: an HTTP status and one line that says why."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class Server(ThreadingHTTPServer):
    """An HTTP server for `routes` by (method, path); `tick` is called twice a second."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        routes: Mapping[tuple[str, str], Route],
        *,
        key: str | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises ValueError if the address cannot be used, or needs a key."""
        self.routes, self.key, self.tick = routes, key, tick
        self.is_local = address[0] in LOOPBACK
        if not self.is_local and not key:
            raise ValueError(f"--serve {address[0]}: others can reach this address; give a key "
                             "with --serve_key or NN_INTERACTIVE_API_KEY")  # fmt: skip
        try:
            super().__init__(address, Handler)
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else error.strerror or error
            raise ValueError(
                f"cannot serve on {address[0]}:{address[1]}: {reason}; choose another with --serve"
            ) from None

    def service_actions(self) -> None:
        """Called regularly by the server's loop."""
        self.tick()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections; report other errors."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            _report(error)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "U-SAM", ""
    timeout = SILENT_SECONDS
    server: Server

    def do_GET(self) -> None:  # noqa: N802
        """Handle a GET request."""
        self._serve("GET")

    def do_POST(self) -> None:  # noqa: N802
        """Handle a POST request."""
        self._serve("POST")

    def log_message(self, *_: Any) -> None:
        """Log nothing: addresses and paths may contain names of patients."""

    def _serve(self, method: str) -> None:
        self._num_read = 0
        try:
            reply = self._reply(method)
        except RefusedError as error:
            reply = Reply({"detail": error.detail}, error.headers, error.status)
        except EndedError as error:
            reply = Reply({"detail": str(error)}, status=410)
        except FullError as error:
            reply = Reply({"detail": str(error)}, {"Retry-After": "30"}, 503)
        except OSError as error:
            reply = Reply({"detail": one_line(error)}, status=507 if _is_full(error) else 500)
        except ValueError as error:
            reply = Reply({"detail": one_line(error)}, status=400)
        except Exception as error:  # of the model or ours: the server goes on
            _report(error)
            out = isinstance(error, MemoryError) or "out of memory" in str(error)
            detail = "not enough memory" if out else f"error in the server: {one_line(error)}"
            reply = Reply({"detail": detail}, status=413 if out else 500)
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._send(reply)

    def _reply(self, method: str) -> Reply:
        url = urlsplit(self.path)
        route = self.server.routes.get((method, url.path))
        self._check_site()
        if route is None:
            known = any(path == url.path for _, path in self.server.routes)
            raise RefusedError(405 if known else 404, f"unknown request: {method} {url.path[:100]}")
        if route.needs_key:
            self._check_key()
        body = self._body(route.max_bytes)
        return route.answer(Request(dict(parse_qsl(url.query)), self.headers, body))

    def _check_site(self) -> None:
        """Refuse requests from other sites, which send an Origin or another host name."""
        host = self.headers.get("Host", "")
        name = re.sub(r":\d+$", "", host).strip("[]")
        if self.server.is_local and name not in LOOPBACK:
            raise RefusedError(403, "this server only accepts requests to localhost")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise RefusedError(403, "requests from other sites are refused")

    def _check_key(self) -> None:
        if not self.server.key:
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.key.encode()):
            raise RefusedError(401, "missing or wrong key", **{"WWW-Authenticate": "Bearer"})

    def _body(self, max_bytes: int) -> bytes:
        if self.headers.get("Transfer-Encoding"):
            raise RefusedError(411, "the Content-Length header is missing")
        text = self.headers.get("Content-Length", "0")
        if not (text.isascii() and text.isdigit()):
            raise RefusedError(400, "Content-Length is not a number")
        length = int(text)
        if length > max_bytes:
            raise RefusedError(
                413, f"the request has {length} bytes; at most {max_bytes} are taken"
            )
        parts: list[bytes] = []  # memory is taken as bytes arrive, not as they are claimed
        while self._num_read < length:
            part = self.rfile.read(min(1 << 20, length - self._num_read))
            if not part:
                raise ConnectionAbortedError("the request ended early")
            parts.append(part)
            self._num_read += len(part)
        return b"".join(parts)

    def _send(self, reply: Reply) -> None:
        is_json = not isinstance(reply.content, bytes)
        body = json.dumps(reply.content).encode() if is_json else reply.content
        self._drain()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json" if is_json else reply.kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", reply.headers.get("Cache-Control", "no-store"))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in reply.headers.items():
            if name != "Cache-Control":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _drain(self) -> None:
        """Read what is left of a refused request, or close the connection after the answer."""
        text = self.headers.get("Content-Length", "0")
        rest = int(text) - self._num_read if text.isascii() and text.isdigit() else DRAINED + 1
        if rest > DRAINED or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            return
        while rest > 0:
            part = self.rfile.read(min(1 << 20, rest))
            if not part:
                self.close_connection = True
                return
            rest -= len(part)
            self._num_read += len(part)


def one_line(error: BaseException) -> str:
    """An error as one short line."""
    return printable(" ".join(str(error).split())[:300]) or type(error).__name__


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _report(error: BaseException | None) -> None:
    if error is not None:
        text = f"u-sam.py: error in a request: {type(error).__name__}: {one_line(error)}"
        print(text, file=sys.stderr, flush=True)


compute = threading.Lock()  # one model, one request at a time
