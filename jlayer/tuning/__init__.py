"""Training of low-rank adapters of a model that is larger than the GPU."""
