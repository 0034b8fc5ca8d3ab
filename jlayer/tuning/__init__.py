"""Training low-rank adapters of a model whose frozen layers are streamed."""
