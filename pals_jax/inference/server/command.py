"""`pals-jax serve`: from a workdir to a server that ends when it is told to."""

import os
import signal
import socket
from collections.abc import Callable

import uvicorn
from etils import epath
from fastapi import FastAPI

from pals_jax.inference.load import load
from pals_jax.inference.run import Run
from pals_jax.inference.server.access import LOGGER, log_as_json
from pals_jax.inference.server.app import ANSWER_SECONDS, create_app
from pals_jax.inference.server.metrics import Metrics
from pals_jax.inference.server.resident import ResidentModel
from pals_jax.inference.server.service import Service
from pals_jax.runtime.errors import UserError, reason

TOKEN = "PALS_JAX_TOKEN"  # the environment variable with the administrator's token
_SHORTEST_TOKEN = 16  # characters; shorter ones can be guessed
_ROOM = 16  # tasks that may be added, by default


def serve(workdir: epath.Path, host: str, port: int, max_tasks: int | None) -> None:
    """Serves the run of a workdir until SIGTERM or SIGINT; what was accepted is still answered.

    The workdir is read once: it may change or vanish later.

    Args:
        workdir: the run.
        host: the address to listen on.
        port: the port; 0: any that is free, which the log names.
        max_tasks: how many tasks there may be at a time. None: the run's and 16 more.

    Raises:
        UserError: if the address cannot be listened on, the token is too short, there is no run, or
            it has more tasks than `max_tasks`.
    """
    token = _token()
    with listen(host, port) as listener:  # before the run is loaded, which takes longer
        run = load(workdir, format="run")
        if max_tasks is None:
            max_tasks = len(run.tasks) + _ROOM
        failures: list[BaseException] = []

        def failed(error: BaseException) -> None:
            failures.append(error)
            server.should_exit = True

        app = application(run, max_tasks, token, failed)
        del run  # the memory of its task parameters
        log_as_json()
        server = uvicorn.Server(config(app))
        for number in (signal.SIGTERM, signal.SIGINT):
            # When the server has ended, uvicorn raises the signal again, which must not end this
            # process with the status of an error.
            signal.signal(number, server.handle_exit)
        listener.listen()
        address, port, *_ = listener.getsockname()
        LOGGER.info("listening", extra={"fields": {"host": address, "port": port}})
        server.run(sockets=[listener])
    if failures:
        raise failures[0]
    LOGGER.info("ended")


def application(
    run: Run,
    max_tasks: int,
    token: str | None = None,
    failed: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The application that serves a run; for the arguments see `serve` and `create_app`.

    Raises:
        UserError: if the run has more tasks than `max_tasks`.
    """
    model, metrics = ResidentModel.of(run, max_tasks), Metrics()
    service = Service(model, run.experiment.tasks, max_tasks, metrics)
    return create_app(service, metrics, token, model.most_bytes, failed)


def config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs an application."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(2 * ANSWER_SECONDS),
    )


def _token() -> str | None:
    token = os.environ.pop(TOKEN, None)  # programs that this one starts need not know it
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii()):
        raise UserError(
            f"the token in {TOKEN} has fewer than {_SHORTEST_TOKEN} characters, or one that is not"
            " ASCII; take another, for example from: openssl rand -hex 16."
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet.

    Raises:
        UserError: if there is no such address here, or it is in use.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"there is no port {port}; --port is from 0 (any) to 65535.")
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # a name of a host may be none
        if listener is not None:
            listener.close()
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(
            f"cannot listen on {host}, port {port}: {why.lower()}; choose another --host or --port."
        ) from error
    return listener
