"""Logs as lines of JSON, which hold no texts: neither those of requests nor those of errors."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = logging.getLogger("pals_jax.server")
_METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with what `extra={"fields": ...}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # Messages of exceptions may repeat the texts that they are about.
            kind, _, trace = record.exc_info
            line |= {"error": kind.__name__, "where": _places(trace)}
        return json.dumps(line)


def _places(trace: TracebackType | None) -> list[str]:
    return [f"{x.filename}:{x.lineno} {x.name}" for x in traceback.extract_tb(trace)]


def log_as_json() -> None:
    """Sends this server's and uvicorn's log to stderr, as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in ((LOGGER.name, logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class AccessLog:
    """ASGI middleware that logs and measures each request by its route."""

    def __init__(self, app: ASGIApp, observe: Callable[[str, str, int, float], None]) -> None:
        """Takes the application and what is told the method, route, status and seconds."""
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - began
            # Names that clients make up would make ever more metrics.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", "other")
            self._observe(method, route, status, seconds)
            fields = {"method": method, "route": route, "status": status}
            LOGGER.info("request", extra={"fields": {**fields, "seconds": round(seconds, 4)}})
