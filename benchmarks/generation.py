"""Translations per second, ours and transformers', side by side on one machine.

    python benchmarks/generation.py --model=opus-mt-en-fr --sources=dev.tsv

The first 200 lines of a TSV's first column, by greedy search and by 4 beams, with the settings that
the model recommends, in float32. transformers sorts the sources by length and pads a batch to its
longest; its batch size is doubled as long as that is faster. Both take turns. Prints one JSON line
for each number of beams: the seconds of all rounds, the median ratio within the rounds with its
range, how many texts are the same, and how many programs were compiled. Needs sentencepiece.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from pals_jax.convert import from_huggingface
from pals_jax.inference.generate import Generator
from pals_jax.inference.generation.config import read_generation_config

Texts = dict[int, list[int]]  # the tokens for each source, by its index


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a directory of Hugging Face")
    parser.add_argument("--sources", required=True, type=Path, help="a TSV with a header")
    parser.add_argument("--count", default=200, type=int, help="how many sources")
    parser.add_argument("--beams", default=(1, 4), type=int, nargs="+", help="of the searches")
    parser.add_argument("--rounds", default=5, type=int, help="how often each is timed")
    args = parser.parse_args()
    lines = args.sources.read_text().splitlines()[1 : args.count + 1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sources = tokenizer([line.split("\t")[0] for line in lines])["input_ids"]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    theirs.eval()
    model, variables = from_huggingface(args.model)
    for beams in args.beams:
        generator = Generator(model, read_generation_config(args.model, num_beams=beams))

        def ours(generator: Generator = generator) -> Texts:
            found = generator(variables, sources)
            return {text.source: text.tokens.tolist() for text in found}

        ours()  # compiles
        tried = seconds_by_batch(partial(with_pytorch, theirs, sources, beams))
        size = min(tried, key=lambda size: tried[size])
        rounds = [
            (_timed(ours), _timed(partial(with_pytorch, theirs, sources, beams, size)))
            for _ in tqdm(range(args.rounds), desc="rounds")
        ]
        ratios = [other / own for (own, _), (other, _) in rounds]
        (_, texts), (_, expected) = rounds[0]
        result = {
            "beams": beams,
            "times_as_fast": {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            },
            "seconds": [own for (own, _), _ in rounds],
            "seconds_of_transformers": [other for _, (other, _) in rounds],
            "batch_of_transformers": size,
            "seconds_by_batch": tried,
            "same_texts": sum(texts[i] == expected[i] for i in expected),
            "sources": len(sources),
            "compilations": generator.compilations,
        }
        print(json.dumps(result), flush=True)


def seconds_by_batch(run: Callable[[int], Texts]) -> dict[int, float]:
    """The seconds of `run(size)` for the sizes 1, 2, 4, ..., up to the first that is slower."""
    seconds: dict[int, float] = {}
    for size in tqdm((2**n for n in range(20)), desc="batches of transformers"):
        seconds[size], _ = _timed(partial(run, size))
        if seconds[size] > min(seconds.values()):
            break
    return seconds


def with_pytorch(model: Any, sources: Sequence[list[int]], beams: int, size: int) -> Texts:
    """transformers' texts, in batches of `size` sources of about the same length."""
    pad, end = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
    texts = {}
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        ids = np.full((len(chosen), len(sources[chosen[0]])), pad)
        for row, index in zip(ids, chosen, strict=True):
            row[: len(sources[index])] = sources[index]
        mask = torch.tensor(ids != pad).long()
        with torch.inference_mode():
            out = model.generate(torch.tensor(ids), attention_mask=mask, num_beams=beams)
        for index, tokens in zip(chosen, out.tolist(), strict=True):
            texts[index] = tokens[: tokens.index(end, 1) + 1]
    return texts


def _timed(run: Callable[[], Texts]) -> tuple[float, Texts]:
    """The seconds that it takes, and its texts."""
    began = time.perf_counter()
    texts = run()
    return time.perf_counter() - began, texts


if __name__ == "__main__":
    main()
