"""Arguments of transformers' `generate` that jlayer does not act on: harmless, or refused.

An argument that changes the output and is not implemented is refused by name; a test goes through
the installed transformers, so that none is unknown and what is called harmless is.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """What decides which options a run reads."""

    samples: bool = False
    contrasts: bool = True  # penalty_alpha chooses the method where nothing else does
    searches: bool = False  # num_beams
    gives_details: bool = False  # return_dict_in_generate


# Name -> values that leave the output alone. Everything else is refused.
REFUSED = {
    "assistant_ensemble_weight": (None,),
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "begin_suppress_tokens": (None, []),
    "cache": (None,),
    # "quantized" keeps an approximate cache, "paged" gives the result in another shape.
    "cache_implementation": (
        *(None, "dynamic", "static", "offloaded", "offloaded_static", "sliding_window"),
        *("hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
    "cache_params": (None,),
    "constraints": (None,),
    "custom_generate": (None,),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_outputs": (None,),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "inputs_embeds": (None,),
    "is_assistant": (None, False),  # ends a text where the model is unsure
    "is_causal": (None, True),
    "logits_processor": (None, []),
    "max_time": (None,),
    "negative_prompt_attention_mask": (None,),
    "negative_prompt_ids": (None,),
    "num_beam_groups": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
    "past_key_values": (None,),
    "penalty_alpha": (None, 0),
    "position_ids": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "seq_idx": (None,),
    "stopping_criteria": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "top_h": (None,),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
    **dict.fromkeys(("cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"), (None,)),
}

# What cannot change the output here: options of encoders, speed, bookkeeping.
# `remove_invalid_values` replaces non-finite logits, which are refused here. Prompt lookup and
# early exit only guess tokens, which the model checks. `trust_remote_code` lets code of the
# checkpoint run: there is none that would be.
HARMLESS = frozenset(
    """
    _commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind cache_config compile_config continuous_batching_config
    decoder_start_token_id disable_compile labels logits_to_keep low_memory max_cache_len
    max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_items_in_batch
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values speculation_type synced_gpus
    target_lookbehind token_type_ids tokenizer transformers_version trust_remote_code use_cache
    """.split()  # noqa: SIM905 - forty names are read better as a paragraph
)

# What only some runs read, so that a published value of it stands in no other run's way.
FILTERS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
SAMPLING_ONLY = frozenset(("temperature", *FILTERS, "top_h"))
BEAMS_ONLY = frozenset(("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"))
_DETAILS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")


# What to do instead of an argument that is refused, besides leaving it out.
_INSTEAD = {
    "assistant_model": "and open the model with draft=FOLDER instead",
    "assistant_tokenizer": "and open the model with a draft of the same tokenizer: draft=FOLDER",
    "inputs_embeds": "or give it to model.generate, which takes it",
}


def is_read(name: str, run: Run) -> bool:
    """Whether a run looks at an option that the model's makers published."""
    if name in SAMPLING_ONLY:
        return run.samples
    if name in BEAMS_ONLY:
        return run.searches
    if name == "num_return_sequences":
        return run.samples or run.searches
    if name in _DETAILS:
        return run.gives_details
    return run.contrasts if name == "penalty_alpha" else True


def is_harmless(name: str, value, run: Run = Run()) -> bool:
    """Whether an argument of REFUSED has a value that leaves the output alone."""
    if is_among(value, REFUSED[name]) or (name in _DETAILS and not run.gives_details):
        return True
    return name in BEAMS_ONLY and not run.searches


def is_among(value, values: Iterable) -> bool:
    """Whether an argument has one of these plain values."""
    # An array or an object of the user's may compare in a way of its own, so only None is compared.
    plain = isinstance(value, bool | int | float | str | list | tuple | Mapping)
    return any(value is one or (plain and value == one) for one in values)


def refusal(name: str, value) -> str:
    """What the user is told of an argument of theirs."""
    instead = f", {_INSTEAD[name]}" if name in _INSTEAD else ""
    shown = " ".join(reprlib.repr(value).split())  # an array's has several lines
    found = f"{name}: found {shown}, which jlayer does not support"
    return f"{found}; leave it out{instead}"


def published_refusal(name: str, value) -> str:
    """What the user is told of an option in a published file."""
    return (
        f"{name}: found {reprlib.repr(value)}, which jlayer does not support; take it out of the "
        "file"
    )
