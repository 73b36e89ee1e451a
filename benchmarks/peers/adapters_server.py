"""The HTTP server of pals_jax around AdapterHub's library `adapters`.

Its arguments are a folder with the work, and a side: "per request", one pass for each request with
its adapter activated, or "grouped", one for all that wait for the oldest request's task.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import uvicorn
import with_adapters

from pals_jax.data.examples import Examples
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import SavedTokenizer, TextEncoder
from pals_jax.inference.server.app import create_app
from pals_jax.inference.server.batcher import Item
from pals_jax.inference.server.command import config, listen
from pals_jax.inference.server.metrics import Metrics
from pals_jax.inference.server.service import Service

MOST = 16  # requests of a batch


class Text(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    types: list[int]


class Plan(NamedTuple):
    """The next batch, of one task."""

    chosen: list[int]
    items: list[Item]


class LibraryModel:
    """The library's model with the adapters and heads of all tasks."""

    def __init__(self, work: Path, given: dict[str, Any], most: int) -> None:
        """Loads them; `most` is the number of requests of a batch."""
        self._library = with_adapters.load(work, given)
        self._library.model.eval()
        self._tasks, self._most = list(given["tasks"]), most
        tokenizer = SavedTokenizer.read(Path(given["tokenizer"]))
        self._text_encoder = TextEncoder(tokenizer, given["max_length"])

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Text]:
        """The tokens of texts."""
        split = self._text_encoder(Examples(list(texts), None))
        found = []
        for i in range(len(split)):
            ids = split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist()
            found.append(Text(ids, [int(p >= split.first[i]) for p in range(len(ids))]))
        return found

    def choose(self, waiting: Sequence[Item]) -> Plan:
        """The oldest, and others of its task up to the most."""
        alike = [i for i, item in enumerate(waiting) if item.row == waiting[0].row]
        chosen = alike[: self._most]
        return Plan(chosen, [waiting[i] for i in chosen])

    def compute(self, plan: Plan) -> np.ndarray:
        """The logits, of a batch padded to its longest text."""
        texts = [item.text for item in plan.items]
        longest = max(len(text.ids) for text in texts)

        def padded(rows: list[list[int]]) -> torch.Tensor:
            return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

        self._library.activate(self._tasks[plan.items[0].row])
        with torch.inference_mode():
            logits = self._library.model(
                input_ids=padded([text.ids for text in texts]),
                token_type_ids=padded([text.types for text in texts]),
                attention_mask=padded([[1] * len(text.ids) for text in texts]),
            ).logits
        return logits.numpy()

    def warm_up(self) -> None:
        """Runs each task once."""
        (text,) = self.encode([("",)])
        for row in range(len(self._tasks)):
            self.compute(Plan([0], [Item(text, row)]))

    def read(self, path: Path) -> Any:
        """Is not asked for."""
        raise NotImplementedError

    def write(self, row: int, adapters: Any) -> None:
        """Is not asked for."""
        raise NotImplementedError


def main() -> None:
    """Serves until it is killed; prints the port when it listens."""
    work, side = Path(sys.argv[1]), sys.argv[2]
    given = json.loads((work / "theirs.json").read_text())
    torch.set_num_threads(os.cpu_count() or 1)
    model = LibraryModel(work, given, MOST if side == "grouped" else 1)
    tasks = [Task.from_json(task) for task in given["as_json"]]
    metrics = Metrics()
    app = create_app(Service(model, tasks, len(tasks), metrics), metrics)
    listener = listen("127.0.0.1", 0)
    listener.listen()
    print(json.dumps({"port": listener.getsockname()[1]}), file=sys.stderr, flush=True)
    uvicorn.Server(config(app)).run(sockets=[listener])


if __name__ == "__main__":
    main()
