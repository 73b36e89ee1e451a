"""What a person would try first: the majority class, logistic regression, or the model as it is."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.convert import huggingface
from pals_jax.data.batch import Batch
from pals_jax.data.tasks import Task
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment.config import override
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.run import Run
from pals_jax.models.segments import Packing
from pals_jax.runtime.console import progress
from pals_jax.runtime.shards import Shards
from results.claims import LOGISTIC
from results.records import Answers


def answers(experiment: Experiment) -> dict[str, Answers]:
    """What each baseline answers on the dev sets of an experiment's tasks.

    Args:
        experiment: its encoder, tasks and data; method and optimiser do not matter.

    Returns:
        "majority"; and "logistic-cls" and "logistic-mean", a logistic regression (a ridge
        regression for values) on the standardised last hidden states of the frozen encoder, at the
        first position or averaged over all; of a pair of texts on u, v, |u - v| and uv, its two
        vectors. Or, for an encoder-decoder, "untouched": its texts.
    """
    if experiment.tasks[0].output == "text":
        return {"untouched": texts(untouched(experiment))}
    tokenizer = experiment.load_tokenizer()
    encode = _encoder(experiment)
    found: dict[str, Answers] = {kind: {} for kind in ("majority", *LOGISTIC)}
    for task in experiment.tasks:
        train = experiment.read(task, "train", tokenizer)
        held_out = experiment.read_eval(task, tokenizer)
        most = _most_frequent(task, train.targets)
        found["majority"][task.name] = {s: np.full(len(x), most) for s, x in held_out.items()}
        known, asked = encode(train), {split: encode(x) for split, x in held_out.items()}
        for at, kind in enumerate(LOGISTIC):
            model = _fitted(task, known[:, at], train.targets)
            found[kind][task.name] = {s: _answer(task, model, x[:, at]) for s, x in asked.items()}
    return found


def untouched(experiment: Experiment, params: Any = None) -> Run:
    """The run of an encoder-decoder without anything that belongs to tasks.

    Args:
        experiment: its encoder-decoder and data; the method does not matter.
        params: the parameters; None: those before training.
    """
    config = override(experiment.config, {"method": "shared"})
    bare = Experiment(config, experiment.tasks, experiment.architecture)
    if params is None:
        directory = huggingface.resolve(config.encoder)
        params = huggingface.load_variables(bare.model(), directory, seed=0)["params"]
    return Run.of(bare, bare.load_tokenizer(), {"params": params, "adapters": {}})


def texts(run: Run) -> Answers:
    """What a run of an encoder-decoder writes for its dev sets."""
    found: Answers = {}
    for task in run.experiment.tasks:
        examples = run.experiment.eval_examples(task)
        found[task.name] = {
            split: np.array([x for (x,) in run.text_generator(run.variables, [task], of.texts)])
            for split, of in examples.items()
        }
    return found


def _most_frequent(task: Task, targets: np.ndarray) -> float:
    if task.is_regression:
        return float(np.mean(targets))
    classes, counts = np.unique(targets, return_counts=True)
    return float(classes[counts.argmax()])


def _fitted(task: Task, vectors: np.ndarray, targets: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = Ridge() if task.is_regression else LogisticRegression(max_iter=1000, C=0.1)
    return make_pipeline(StandardScaler(), model).fit(vectors, targets)


def _answer(task: Task, model: Any, vectors: np.ndarray) -> np.ndarray:
    predicted = model.predict(vectors)
    return np.clip(predicted, 0.0, 1.0) if task.is_regression else predicted


def _encoder(experiment: Experiment) -> Callable[[TokenizedSplit], np.ndarray]:
    """The frozen encoder: from a split to what regressions read, float32 [N, 2, D or 4 D].

    Of the axis of 2, the first is made of [CLS] vectors, the second of mean vectors.
    """
    model = experiment.encoder().clone(num_outputs=(1,), method=())
    directory = huggingface.resolve(experiment.config.encoder)
    variables = huggingface.load_variables(model, directory, seed=0)

    @jax.jit
    def vectors(variables: Any, batch: Batch) -> Array:
        """[B, M, 2, D], the vectors of each example of each row."""
        packing = Packing(batch.first, batch.example_ids)
        tokens = batch.tokens
        hidden = cast(Array, model.apply(variables, *tokens, 0, packing=packing, method="encode"))
        numbers = jnp.arange(1, batch.first.shape[1] + 1)[None, :, None]
        mine = (batch.attention_mask[:, None] == numbers).astype(hidden.dtype)
        mean = mine @ hidden / jnp.maximum(mine.sum(-1, keepdims=True), 1.0)
        first = jnp.take_along_axis(hidden, batch.first[..., None], axis=1)
        return jnp.stack([first, mean], axis=2)

    def encode(split: TokenizedSplit) -> np.ndarray:
        found = np.empty((len(split), 2, model.config.hidden_size), np.float32)
        with progress(len(split), 0, "text") as bar:
            for shards, examples in experiment.eval_batches(split, 0, Shards()):
                here = examples >= 0
                batch = jax.tree.map(lambda x: x[0], shards)
                found[examples[here]] = np.asarray(vectors(variables, batch))[here]
                bar.update(int(here.sum()))
        return found

    def encode_each(split: TokenizedSplit) -> np.ndarray:
        texts = [encode(each) for each in _each_text(split)]
        if len(texts) == 1:
            return texts[0]
        u, v = texts
        return np.concatenate([u, v, np.abs(u - v), u * v], axis=-1)

    return encode_each


def _each_text(split: TokenizedSplit) -> list[TokenizedSplit]:
    """A split's texts, or its first and its second texts, each as `[CLS] text [SEP]`."""
    starts, ends, middles = split.offsets[:-1], split.offsets[1:], split.offsets[:-1] + split.first
    spans = zip(starts.tolist(), middles.tolist(), ends.tolist(), strict=True)
    first, second = [], []
    for start, middle, end in spans:
        first.append(split.tokens[start:middle])
        second.append(np.append(split.tokens[start], split.tokens[middle:end]))
    return [
        TokenizedSplit(
            np.concatenate(texts),
            np.cumsum([0, *map(len, texts)]),
            np.array([len(text) for text in texts], np.int32),
            split.targets,
        )
        for texts in ([first, second] if (middles < ends).any() else [first])
    ]
