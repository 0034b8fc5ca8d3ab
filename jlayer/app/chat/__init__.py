"""A conversation in the terminal, or over a pipe: what `jlayer chat` is made of."""
