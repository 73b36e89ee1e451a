"""Writes a small BART with random weights, and a tokenizer of the words of some articles.

    python benchmarks/small_bart.py --articles=XSUM/train.jsonl --out=small_bart

With it, summarisation runs from data to scores where there are no weights of BART. It has 2 + 2
layers of width 128, 512 positions and 4,000 words. Needs PyTorch.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def main() -> None:
    """Writes the directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", required=True, type=Path, help="JSON lines, all texts count")
    parser.add_argument("--out", required=True, type=Path, help="the directory")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    lines = (json.loads(line) for line in args.articles.read_text().splitlines())
    texts = [text for line in lines for text in line.values()]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(texts, vocab_size=4000, special_tokens=SPECIAL, show_progress=False)
    words.save_model(str(args.out))
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=words.get_vocab_size(),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=512,
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(args.out)


if __name__ == "__main__":
    main()
