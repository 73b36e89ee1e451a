"""Writes the checkpoint of this folder with TensorFlow: a random BERT, named as Google's code does.

python notebooks/google_bert/make.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

HERE = Path(__file__).parent
WORDS = ["a", "cat", "dog", "lay", "mat", "on", "sat", "the", "rug", "was", "."]
CONFIG: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 5 + len(WORDS),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The variables of the encoder, by Google's names."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "bert/embeddings/word_embeddings": (CONFIG["vocab_size"], width),
        "bert/embeddings/position_embeddings": (CONFIG["max_position_embeddings"], width),
        "bert/embeddings/token_type_embeddings": (CONFIG["type_vocab_size"], width),
    }
    norms = ["bert/embeddings"]
    dense: dict[str, tuple[int, ...]] = {"bert/pooler/dense": (width, width)}
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"bert/encoder/layer_{number}"
        for name in ("query", "key", "value"):
            dense[f"{layer}/attention/self/{name}"] = (width, width)
        dense[f"{layer}/attention/output/dense"] = (width, width)
        dense[f"{layer}/intermediate/dense"] = (width, inner)
        dense[f"{layer}/output/dense"] = (inner, width)
        norms += [f"{layer}/attention/output", f"{layer}/output"]
    for name, shape in dense.items():
        found |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    for name in norms:
        found |= {f"{name}/LayerNorm/{part}": (width,) for part in ("beta", "gamma")}
    return found


def main() -> None:
    """Writes the configuration, the vocabulary and the checkpoint."""
    tf.disable_v2_behavior()
    rng = np.random.default_rng(0)
    for name, shape in shapes().items():
        value = rng.normal(name.endswith("gamma"), 0.2, shape).astype(np.float32)
        tf.get_variable(name, initializer=value)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver()
        saver.save(
            session, str(HERE / "bert_model.ckpt"), write_meta_graph=False, write_state=False
        )
    (HERE / "bert_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (HERE / "vocab.txt").write_text("\n".join(words) + "\n")


if __name__ == "__main__":
    main()
