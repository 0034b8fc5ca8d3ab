"""Trains low-rank adapters of a model whose frozen layers stream."""
