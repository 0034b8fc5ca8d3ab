"""From a prompt to tokens: the executor, generation, and the object a user holds."""
