"""A stand-in for Google Cloud Storage: an emulator, and features that TensorStore and gcsfs need.

The emulator lacks these: the generations of objects
(https://cloud.google.com/storage/docs/request-preconditions), `moveTo`, concurrent requests, and a
read-only bucket.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from unittest import mock

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

READ_ONLY = "read-only"
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def serve(*names: str) -> Iterator[str]:
    """The URL of a server with these buckets, which are empty."""
    storage = _Memory(use_memory_fs=True)
    for name in names:
        buckets.create_bucket(name, storage)
    handler = functools.partial(server.RequestHandler, storage)
    with mock.patch.object(server, "HANDLERS", _HANDLERS), _Server(("127.0.0.1", 0), handler) as it:
        thread = threading.Thread(target=it.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{it.server_address[1]}"
        it.shutdown()
        thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that goes away is none: gcsfs cancels what it needs no more."""


class _Memory(Storage):
    def _write_config_to_file(self) -> None:
        """There is no disk, and the emulator would write all it knows at each request."""


def _faithful(method: str, handler: Callable) -> Callable:
    """The handler of a request, which heeds its preconditions and tells the generation."""

    def handle(request: server.Request, response: server.Response, storage: Storage) -> None:
        with _one_at_a_time:
            bucket = request.params.get("bucket_name")
            name = request.params.get("object_id") or request.query.get("name", [None])[0]
            there = storage.objects.get(bucket, {}).get(name)
            generation = there["generation"] if there else "0"
            if bucket == READ_ONLY and method != server.GET:
                response.status = HTTPStatus.FORBIDDEN
            elif request.query.get("ifGenerationMatch", [generation]) != [generation]:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif there and request.query.get("ifGenerationNotMatch") == [generation]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                handler(request, response, storage)
                response["x-goog-generation"] = generation

    return handle


def _move(request: server.Request, response: server.Response, storage: Storage) -> None:
    bucket = request.params["bucket_name"]
    request.params["dest_bucket_name"] = bucket
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(bucket, request.params["object_id"])


_OBJECT = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)"
_MOVE = _OBJECT + r"/moveTo/o/(?P<dest_object_id>.*[^/]+)$"
_HANDLERS = tuple(
    (pattern, {method: _faithful(method, handler) for method, handler in handlers.items()})
    for pattern, handlers in ((_MOVE, {server.POST: _move}), *server.HANDLERS)
)
