"""Limits the number of clients: leases that end when a client is idle or gone."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from dataset.text import counted

Content = TypeVar("Content")
IDLE_SECONDS = 600.0  # since the last request that does something
SILENT_SECONDS = 60.0  # since the last request of any kind


class FullError(Exception):
    """All leases are in use."""


class EndedError(Exception):
    """The lease has ended, or never existed."""


class Lease(Generic[Content]):
    """One client's lease; its requests are handled one after the other."""

    def __init__(self, content: Content, now: float) -> None:
        self.token, self.content = secrets.token_urlsafe(24), content
        self.lock = threading.RLock()
        self.used = self.heard = now


class Leases(Generic[Content]):
    """At most `number` leases at once. clock: a monotonic clock in seconds."""

    def __init__(
        self,
        number: int,
        *,
        idle: float = IDLE_SECONDS,
        silent: float = SILENT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.number, self.idle, self.silent, self.clock = number, idle, silent, clock
        self._leases: dict[str, Lease[Content]] = {}
        self._lock = threading.Lock()

    def claim(self, make: Callable[[], Content]) -> Lease[Content]:
        """A new lease on what `make` returns; raises FullError."""
        with self._lock:
            self._end_old()
            if len(self._leases) >= self.number:
                raise FullError(f"all {counted(self.number, 'session')} of this server are in use")
            lease = Lease(make(), self.clock())
            self._leases[lease.token] = lease
            return lease

    def find(self, token: str | None, *, is_use: bool = True) -> Lease[Content]:
        """The lease of a token; raises EndedError. is_use: False for a heartbeat."""
        with self._lock:
            self._end_old()
            lease = self._leases.get(token or "")
            if lease is None:
                raise EndedError("the session has ended or the server was restarted; connect again")
            lease.heard = self.clock()
            if is_use:
                lease.used = lease.heard
            return lease

    def remaining(self, lease: Lease[Content]) -> float:
        """Seconds until a lease ends if it is not used."""
        return max(0.0, lease.used + self.idle - self.clock())

    def release(self, token: str | None) -> None:
        """End a lease, if there is one."""
        with self._lock:
            self._leases.pop(token or "", None)

    def end_old(self) -> None:
        """End expired leases and release their content."""
        with self._lock:
            self._end_old()

    def _end_old(self) -> None:
        now = self.clock()
        self._leases = {
            token: lease
            for token, lease in self._leases.items()
            if now - lease.used <= self.idle and now - lease.heard <= self.silent
        }
