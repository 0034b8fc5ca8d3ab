"""Walks through what a constraint allows."""

import numpy as np

BEYOND = 37  # ids of the logits that the tokenizer has not


def sizes(tokenizer, *ends):
    ends = ends or (tokenizer.eos_token_id,)
    return {"vocab_size": tokenizer.vocab_size + BEYOND, "eos_ids": ends}


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, continues=True)


def walked(tokenizer, constraint, rng, *, most=400):
    """Ids drawn from what is allowed, up to an end token or `most`; and whether it ended."""
    ids, end = [], tokenizer.eos_token_id
    for _ in range(most):
        mask = constraint.allowed()
        assert mask.dtype == bool
        assert not mask[tokenizer.vocab_size :].any()
        choices = np.flatnonzero(mask)
        assert len(choices), text_of(tokenizer, ids)
        drawn = end if mask[end] and rng.random() < 0.5 else int(rng.choice(choices))
        constraint.accept([drawn])
        if drawn == end:
            return ids, True
        ids.append(drawn)
    return ids, False
