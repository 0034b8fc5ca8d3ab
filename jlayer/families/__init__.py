"""Which leaves and stages a model has, as tables. Standard library only."""
