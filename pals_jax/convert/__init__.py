"""Checkpoints of other codes, in and out: a table of names for each format."""

from pals_jax.convert.bert_n_pals import from_bert_n_pals, to_bert_n_pals
from pals_jax.convert.huggingface import from_huggingface

__all__ = ["from_bert_n_pals", "from_huggingface", "to_bert_n_pals"]
