"""Generation with encoder-decoders: greedy and beam search, each source under its own task."""
