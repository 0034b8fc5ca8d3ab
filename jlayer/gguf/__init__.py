"""GGUF files as data: the container, a model's config, the names of its tensors, its tokenizer.

Standard library only. What is made of a file here is what a published folder would hold: the text
of a config.json, of tokenizer files, and the published name of each tensor. Checks of a config and
of weights are left to those of published folders.
"""
