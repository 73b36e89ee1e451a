"""The configuration of an experiment: keys, defaults, and reading it from the command line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from pals_jax.runtime.errors import UserError


def default() -> ConfigDict:
    """Every key, with the values of BERT and PALs (Stickland & Murray 2019); locked.

    A file in `configs/` starts from this and changes what differs in its experiment.
    """
    config = ConfigDict()
    config.seed = 0

    # The shared encoder, or encoder-decoder: a directory, a packaged encoder's name, or an id on
    # the hub.
    config.encoder = "bert-base-uncased"
    # The parameters that each task adds: functions of pals_jax.models.adapters.methods, joined by
    # +; see docs/methods.md.
    config.method = "pals(size=204)"
    # Patterns of trainable parameters; ("adapters/",) freezes the encoder.
    config.trainable = ("params/", "adapters/")
    # Whether to apply dropout below the first adapter of a frozen encoder. If False, the hidden
    # states there are computed once per example and cached in data.cache_dir; steps start above.
    config.lower_dropout = True
    config.dtype = "float32"  # of computation and exchange: float32 or bfloat16; files keep float32
    config.remat = False  # recompute activations in the backward pass, to save memory

    config.tasks = ("cola", "mrpc", "mnli", "rte", "stsb", "sst2", "qqp", "qnli")
    config.data = ConfigDict()
    config.data.source = "tfds"  # where tasks that are not your own come from: tfds or glue_dir
    config.data.dir = ""  # the source's directory; empty: the default of tensorflow_datasets
    config.data.own = ConfigDict()  # your own tasks: name -> declaration, see docs/own_tasks.md
    config.data.max_length = 128  # maximum tokens of an example (one text or a pair), or a source
    config.data.max_target_length = 128  # maximum tokens of a target, for an encoder-decoder
    config.data.cache_dir = "~/.cache/pals_jax"

    config.sampling = "annealed"  # or round_robin, proportional, sqrt
    config.epochs = 25
    config.steps_per_epoch = 2400
    config.batch_size = 32
    config.packing = True  # True: several examples share a row; False: one padded row each
    config.groups = 1  # tasks in a batch; 1 is the paper's single-task step
    config.eval_batch_size = 16  # rows
    # For an encoder-decoder: the share of a token's loss that is the mean loss of all words.
    config.label_smoothing = 0.0
    # For an encoder-decoder: how predict and evaluate search for texts. What is not here, such as
    # the special tokens, is as the model's own generation_config.json has it.
    config.generation = ConfigDict()
    config.generation.num_beams = 4  # 1 is greedy search
    config.generation.max_length = 128  # maximum tokens of a text, its start token included
    config.generation.min_length = 0  # the end token is not among the first so many
    config.generation.length_penalty = 1.0  # a text's score is log p / length^length_penalty
    config.generation.no_repeat_ngram_size = 0  # no so many tokens occur twice; 0 allows it
    config.checkpoint_every = 1000  # steps; the end of an epoch also writes a checkpoint

    # For train --sweep: one {dotted key: value} per run. --config.sweep="({'seed': 0}, ...)"
    config.sweep = ()

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or bert_n_pals: the original's, quirks included
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"  # or bert: see pals_jax.experiment.optim
    config.optimizer.warmup = 0.1  # as a fraction of all steps
    config.optimizer.weight_decay = 0.01
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-6
    config.optimizer.clip = 1.0  # maximum global norm; with bert_n_pals of each tensor
    return config.lock()


def load(arguments: Sequence[str]) -> ConfigDict:
    """The configuration given by --config=FILE[:ARG] and --config.key=value arguments.

    Raises:
        UserError: if the file does not exist or fails, a key is unknown, or a value has the wrong
            type.
    """
    values = flags.FlagValues()
    argv = ["pals-jax", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    if not any(argument.startswith("--config=") for argument in arguments):
        raise UserError("--config=FILE is missing; the files are in configs/.")
    try:
        values(argv)
        config = values.config
        keys = set(_keys(config))  # if the file failed to load, the error is raised here
    except Exception as error:  # a configuration file is a program and can fail in any way
        lines = [line.strip() for line in str(error.args[-1] if error.args else error).splitlines()]
        reason = next((line for line in reversed(lines) if line), type(error).__name__)
        raise UserError(f"configuration: {reason.rstrip('.')}.") from error
    if wrong := keys ^ set(_keys(default())):
        raise UserError(
            f"configuration: {', '.join(sorted(wrong))} is unknown or missing;"
            " start from pals_jax.config.default()."
        )
    check(config)
    return config


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy without a sweep, with {dotted key: value} changed.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or is out of range.
    """
    changed = ConfigDict(config.to_dict())
    changed.sweep = ()
    changed.lock()  # makes unknown keys an error
    try:
        changed.update_from_flattened_dict(dict(overrides))
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error.args[0]).split())
        raise UserError(f"configuration: the overrides {dict(overrides)}: {reason}.") from error
    check(changed)
    return changed


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """The dotted keys, except those of own tasks, which `own_task` checks."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key != "own":
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def check(config: ConfigDict) -> None:
    """Checks the ranges of values.

    Raises:
        UserError: if a value is out of range.
    """
    positive = ("epochs", "steps_per_epoch", "batch_size", "groups", "eval_batch_size")
    for key in (*positive, "checkpoint_every"):
        if config[key] < 1:
            raise UserError(f"configuration: {key} is {config[key]}; it must be at least 1.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"configuration: seed is {config.seed}; it must be from 0 to 2^32 - 1.")
    if not 0.0 <= config.label_smoothing < 1.0:
        raise UserError(
            f"configuration: label_smoothing is {config.label_smoothing}; it is a share, from 0 to"
            " below 1."
        )
    if not 0.0 <= config.optimizer.warmup <= 1.0:
        raise UserError(
            f"configuration: optimizer.warmup is {config.optimizer.warmup}; it is a fraction of all"
            " steps, from 0 to 1."
        )
    if config.batch_size % config.groups:
        raise UserError(
            f"configuration: batch_size {config.batch_size} is not a multiple of groups"
            f" {config.groups}."
        )
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"configuration: dtype {config.dtype!r} is not float32 or bfloat16.")


def encoder_is_frozen(config: ConfigDict) -> bool:
    """Whether only task parameters are trained."""
    return tuple(config.trainable) == ("adapters/",)


def from_json(saved: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `to_json`; keys that `saved` lacks get their defaults."""
    config = default().unlock()
    config.update(ConfigDict({**saved, "data": {**saved["data"], "own": {}}}))
    config.data.own = ConfigDict(saved["data"]["own"])
    return config.lock()


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The configuration as a JSON object (tuples become lists)."""
    return json.loads(config.to_json_best_effort())
