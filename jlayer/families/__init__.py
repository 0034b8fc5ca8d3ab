"""The leaves and stages of each model family, as tables. Standard library only."""
