"""The HTTP interface: routes, limits, and errors of one sentence."""

import asyncio
import contextlib
import hashlib
import hmac
import re
import tempfile
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pals_jax import __version__
from pals_jax.inference.server.access import AccessLog
from pals_jax.inference.server.metrics import Metrics
from pals_jax.inference.server.schema import Answer, Answers, Error, Question, TaskInfo, Tasks
from pals_jax.inference.server.schema import sentence as invalid
from pals_jax.inference.server.service import Refusal, Service
from pals_jax.runtime.errors import Diverged, UserError

MOST_BYTES = 2**20  # of a question
ANSWER_SECONDS = 30.0  # from the end of a request to the answer
BODY_SECONDS = 10.0  # for a client to send a question; a task file may take as long as an answer
_CLIENT_GONE = 499  # nobody reads it; in logs and metrics, as nginx has it
_PAGE = Path(__file__).with_name("page.html")

Result = TypeVar("Result")


def create_app(
    service: Service,
    metrics: Metrics,
    token: str | None = None,
    most_upload: int = 0,
    failed: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: the tasks; it runs as long as the application does.
        metrics: what is measured.
        token: the administrator's; None: nobody may add or remove tasks.
        most_upload: the largest size of a task file, in bytes.
        failed: told the error if the service ends by itself.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.run())
        running.add_done_callback(_when_failed(failed))
        yield
        running.cancel()
        await asyncio.wait([running])

    app = FastAPIOffline(
        redoc_url=None,
        title="pals_jax",
        version=__version__,
        description="Many tasks on one encoder.",
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(AccessLog, observe=metrics.request)
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)
    _add_answers(app, service)
    _add_administration(app, service, token, most_upload)
    _add_state(app, service, metrics)
    return app


def _when_failed(
    failed: Callable[[BaseException], None] | None,
) -> Callable[[asyncio.Task[None]], None]:
    def check(running: asyncio.Task[None]) -> None:
        error = None if running.cancelled() else running.exception()
        if error is not None and failed is not None:
            failed(error)

    return check


# ------------------------------------------------ routes


def _responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Error} for code in codes}


def _add_answers(app: FastAPI, service: Service) -> None:
    content = {"application/json": {"schema": Question.model_json_schema()}}

    @app.post(
        "/v1/predict",
        summary="Answers texts or pairs for a task, several, or all that they fit",
        responses=_responses(400, 404, 408, 413, 503, 504),
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def predict(request: Request) -> Answers:
        body = b"".join([chunk async for chunk in _body(request, MOST_BYTES, BODY_SECONDS)])
        question = _question(body)
        texts = question.examples()
        rows = await _unless_gone(request, service.predict(texts, question.task))
        return Answers(answers=[[Answer.of(answer) for answer in row] for row in rows])

    @app.get("/v1/tasks", summary="The tasks")
    async def tasks() -> Tasks:
        return Tasks(
            tasks=[TaskInfo.of(task) for task in service.tasks],
            max_tasks=service.max_tasks,
            administration=app.state.administration,
        )


def _question(body: bytes) -> Question:
    try:
        body.decode()
        return Question.model_validate_json(body)
    except UnicodeDecodeError as error:
        raise UserError("the body is not valid UTF-8; encode it again.") from error
    except ValidationError as error:
        raise UserError(invalid(error)) from None  # its message repeats the texts


def _add_administration(
    app: FastAPI, service: Service, token: str | None, most_upload: int
) -> None:
    app.state.administration = token is not None
    file = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    security: dict[str, Any] = {"security": [{"administrator": []}]}
    refusals = _responses(400, 401, 403, 408, 409, 413, 503, 504)

    @app.post(
        "/v1/tasks",
        summary="Adds the task of a task file",
        status_code=201,
        responses=refusals,
        openapi_extra={"requestBody": {"required": True, "content": file}} | security,
    )
    async def add(request: Request) -> TaskInfo:
        _check_token(request, token)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "the uploaded file"
            with path.open("wb") as upload:
                async for chunk in _body(request, most_upload, ANSWER_SECONDS):
                    upload.write(chunk)
            try:
                return TaskInfo.of(await _unless_gone(request, service.add(path)))
            except UserError as error:
                error.args = (str(error).replace(str(path), path.name),)
                raise

    @app.delete(
        "/v1/tasks/{name:path}",
        summary="Removes a task",
        status_code=204,
        response_class=Response,
        responses=_responses(401, 403, 404, 409),
        openapi_extra=security,
    )
    async def remove(name: str, request: Request) -> None:
        _check_token(request, token)
        service.remove(name)


def _check_token(request: Request, token: str | None) -> None:
    """Refuses whoever is not the administrator; how long it takes tells nothing of the token."""
    if token is None:
        raise Refusal(
            403, "tasks cannot be added or removed: the server was started without a token."
        )
    given = request.headers.get("authorization", "").encode("latin-1")
    expected = f"Bearer {token}".encode()
    digests = (hashlib.sha256(x).digest() for x in (given, expected))
    if not hmac.compare_digest(*digests):
        headers = {"WWW-Authenticate": "Bearer"}
        raise Refusal(401, "this needs the administrator's token: Authorization: Bearer.", headers)


def _add_state(app: FastAPI, service: Service, metrics: Metrics) -> None:
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/healthz", summary="Whether the server is there", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @app.get(
        "/readyz",
        summary="Whether everything is compiled",
        response_class=PlainTextResponse,
        responses=_responses(503),
    )
    async def readyz() -> str:
        service.check_ready()
        return "ready\n"

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def measured() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)


def _page() -> tuple[str, str]:
    """The page, and the policy by which a browser runs its own scripts and nothing else."""
    page = _PAGE.read_text(encoding="utf-8")
    sources = []
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in found)
        sources.append(f"{tag}-src " + " ".join(f"'sha256-{digest}'" for digest in digests))
    sources += ["connect-src 'self'", "img-src data:"]  # the icon is in the page, too
    policy = ["default-src 'none'", *sources, "base-uri 'none'"]
    return page, "; ".join([*policy, "form-action 'none'", "frame-ancestors 'none'"])


# ------------------------------------------------ limits


async def _body(request: Request, most: int, seconds: float) -> AsyncIterator[bytes]:
    """The body of a request, part by part.

    Raises:
        Refusal: if it is larger than `most` bytes, or takes longer than these seconds.
    """
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise Refusal(413, f"the body is larger than {most} bytes; send less at once.")
                yield chunk
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:.0f} s.") from error


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which ends when the client goes away, or with the time limit."""
    working = asyncio.create_task(work)
    leaving = asyncio.ensure_future(request.receive())  # after the body, only a disconnection
    try:
        await asyncio.wait(
            [working, leaving], timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise Refusal(504, f"there was no answer within {ANSWER_SECONDS:.0f} s; ask for less.")
    finally:
        working.cancel()
        leaving.cancel()


# ------------------------------------------------ errors


def _error(code: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, code, headers)


async def _user_error(_: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        return _error(error.code, str(error), error.headers)
    return _error(500 if isinstance(error, Diverged) else 400, str(error))


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the framework refuses: no such route, or no such method."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such page here", 405: "this page does not know that method"}
    message = what.get(error.status_code, str(error.detail).rstrip(".").lower())
    return _error(error.status_code, f"{message}; /docs lists what there is.", error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _unexpected(_: Request, error: Exception) -> Response:
    return _error(500, "the server has failed at this; its log says where.")


_HANDLERS: Mapping[type[Exception], Callable[[Request, Exception], Coroutine[Any, Any, Response]]]
_HANDLERS = {
    UserError: _user_error,
    HTTPException: _http_exception,
    ClientDisconnect: _gone,
    Exception: _unexpected,
}
