"""The texts that a run of an encoder-decoder generates: in order, as they are done, and scored."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pals_jax.data import text_metrics
from pals_jax.data.examples import Examples
from pals_jax.data.pairs import PairEncoder, PairTokenizer
from pals_jax.data.tasks import Task
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.families import Tokenizer
from pals_jax.inference.generate import Generator
from pals_jax.inference.generation.config import GenerationConfig
from pals_jax.models.bart import BartConfig
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.console import progress
from pals_jax.runtime.parallel import DataParallel

_WINDOW = 1024  # sources after which texts are due; the fewer, the more slots wait for long texts


def generation_config(experiment: Experiment, tokenizer: Tokenizer) -> GenerationConfig:
    """The settings of an experiment: those of its configuration, and for the rest its model's.

    Raises:
        UserError: one is out of range, or does not fit the model.
    """
    architecture = experiment.architecture
    assert isinstance(tokenizer, PairTokenizer)
    assert isinstance(architecture, BartConfig)
    # Tasks with languages of their own say themselves what their texts start with.
    start = _encoder(experiment, tokenizer, experiment.tasks[0]).start_id
    given = {**tokenizer.generation, **experiment.config.generation.to_dict()}
    config = GenerationConfig.from_mapping(given | {"decoder_start_token_id": start})
    config.check(architecture)
    return config


class TextGenerator:
    """Generates texts with the tasks of an experiment; it keeps the compiled programs."""

    def __init__(
        self, experiment: Experiment, tokenizer: PairTokenizer, parallel: DataParallel
    ) -> None:
        """Generates on the devices of `parallel`.

        Raises:
            UserError: see `generation_config`.
        """
        model = experiment.model()
        assert isinstance(model, Seq2SeqModel)
        self._experiment, self._tokenizer = experiment, tokenizer
        config = generation_config(experiment, tokenizer)
        self._generator = Generator(model, config, parallel=parallel)

    def __call__(
        self, variables: Any, tasks: Sequence[Task], texts: Sequence[tuple[str, ...]]
    ) -> Iterator[list[str]]:
        """For each of some sources, in order, what each task writes.

        Args:
            variables: the model's.
            tasks: tasks of the experiment.
            texts: the sources.

        Raises:
            UserError: the maximum length leaves no room for text.
        """
        with progress(len(texts) * len(tasks), 0, "text") as bar:
            for first in range(0, len(texts), _WINDOW):
                window = list(texts[first : first + _WINDOW])
                written = self._window(variables, tasks, window, bar)
                yield from ([*row] for row in zip(*written, strict=True))

    def scores(self, variables: Any, task: Task, examples: Examples) -> dict[str, float]:
        """ROUGE and BLEU of what a task writes for labelled examples, as if they were one text."""
        found = [text for (text,) in self(variables, [task], examples.texts)]
        expected = examples.target_texts
        assert expected is not None
        bleu = text_metrics.bleu(found, expected).score
        return {**text_metrics.rouge(found, expected), "bleu": bleu}

    def _window(
        self, variables: Any, tasks: Sequence[Task], texts: list[tuple[str, ...]], bar: Any
    ) -> list[list[str]]:
        """What each task writes for all of some sources: a list for each task."""
        encoders = [_encoder(self._experiment, self._tokenizer, task) for task in tasks]
        splits = [encoder(Examples(texts, None)) for encoder in encoders]
        sources = [
            split.tokens[begin:end]
            for split in splits
            for begin, end in zip(split.offsets[:-1], split.offsets[1:], strict=True)
        ]
        ids = [self._experiment.tasks.index(task) for task in tasks]
        starts = [encoder.start_id for encoder in encoders]
        of_task = np.repeat(np.arange(len(tasks)), len(texts))
        written = [""] * len(sources)
        generated = self._generator(
            variables, sources, np.array(ids)[of_task], np.array(starts)[of_task]
        )
        for text in generated:
            written[text.source] = self._tokenizer.text(text.tokens.tolist())
            bar.update()
        return [written[i : i + len(texts)] for i in range(0, len(written), len(texts))]


def _encoder(experiment: Experiment, tokenizer: PairTokenizer, task: Task) -> PairEncoder:
    """Makes the tokens of a task's sources."""
    encoder = experiment.family.text_encoder(tokenizer, task, experiment.config.data)
    assert isinstance(encoder, PairEncoder)
    return encoder
