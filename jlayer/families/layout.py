"""What a file's values may have other than the published ones: how rows of heads are ordered, and
what the weight of a norm stands for, and what is one matrix. The same model, read from GGUF.

llama.cpp's converter reorders the rows of queries and keys of some models, so that the elements
which the rotary embedding turns together are neighbours; it adds 1 to gains that are published as
1 + weight; it makes two matrices of one whose rows are of the gate and of the other in turn; and
two of the one that makes keys and values of a latent, the rows of each head's keys turned around.
Of a gated DeltaNet it orders value heads in another way, has -exp(A_log) in the place of A_log, and
takes the gates out of the matrix that gives queries, keys and values.
None of this is undone: the config says so under LAYOUT_KEY, and the parts follow.
"""

from __future__ import annotations

import re
from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.fields import Fields
from jlayer.parts import Attention, Latent
from jlayer.spec import ModelConfig

LAYOUT_KEY = "gguf_layout"
# The scheme in the quantization_config of a config that was made from a GGUF file.
FROM_GGUF = "gguf"
PAIRS, GAINS, GATES, KEYS = "rope_pairs", "norm_gains", "expert_gates", "latent_keys"
HEADS, RATES, INPUTS = "value_heads", "decay_rates", "delta_inputs"
_KNOWN = {
    PAIRS: "interleaved",
    GAINS: "whole",
    GATES: "apart",
    KEYS: "apart",
    HEADS: "tiled",
    RATES: "whole",
    INPUTS: "half",
}
_IN_PAIRS = re.compile(r".*\.self_attn\.([qk])_proj\..*")
_OF_DELTA = re.compile(r".*\.linear_attn\..*")


def paired_heads(cfg: ModelConfig, tensor: str, attention: Attention | None) -> int | None:
    """The heads of a published matrix whose rows i and i + H/2 of each head are neighbours here, 2i
    and 2i + 1; None: its rows are in the published order. `attention`: of its layer."""
    match = _IN_PAIRS.fullmatch(tensor)
    if match is None or PAIRS not in cfg.layout or attention is None:
        return None
    return attention.n_heads if match[1] == "q" else attention.n_kv_heads


def in_pairs(rows, heads: int):
    """An array of published rows, in the order of `paired_heads`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def in_halves(rows, heads: int):
    """The inverse of `in_pairs`: the rows in the published order."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def is_rearranged(cfg: ModelConfig, tensor: str) -> bool:
    """Whether a published matrix is cut or ordered in yet another way here: what is made for the
    published one, such as an adapter, is not for this."""
    return _OF_DELTA.fullmatch(tensor) is not None and not {HEADS, INPUTS}.isdisjoint(cfg.layout)


def as_laid_out(fields: Fields, cfg: ModelConfig) -> ModelConfig:
    """`cfg` for values in the layout that the config names; as it is where it names none.

    Raises CheckpointError for a layout that is not known.
    """
    said = fields.section(LAYOUT_KEY)
    for name, value in said.raw.items():
        if value != _KNOWN.get(name):
            raise CheckpointError(
                f"{said.where}: {name!a:.80} is {value!a:.80}, supported: "
                f"{', '.join(f'{key} {word}' for key, word in _KNOWN.items())}"
            )
    cfg = replace(cfg, layout=tuple(sorted(said.raw)))
    if PAIRS in said.raw:
        cfg = replace(cfg, attentions=tuple(map(_interleaved, cfg.attentions)))
    if GAINS in said.raw:
        gain = replace(cfg.norm, plus_one=False)
        heads = (_with_gain(one, gain) for one in cfg.attentions)
        cfg = replace(cfg, norm=gain, attentions=tuple(heads))
    if GATES in said.raw and cfg.experts:
        mlp = replace(cfg.experts.mlp, form="gated", gate="gate_proj", up="up_proj")
        cfg = replace(cfg, experts=replace(cfg.experts, mlp=mlp, stacks=()))
    if KEYS in said.raw:
        cfg = replace(cfg, attentions=tuple(map(_apart, cfg.attentions)))
    if cfg.delta is not None:
        cfg = replace(cfg, delta=_delta(said, cfg.delta))
    return cfg


def _delta(said, delta):
    changes = {"is_tiled": HEADS in said.raw, "has_rates": RATES in said.raw}
    if INPUTS in said.raw:
        changes["inputs"] = said.raw[INPUTS]
    return replace(delta, **changes)


def _interleaved(one):
    return one if one.rope is None else replace(one, rope=replace(one.rope, interleaved=True))


def _apart(one):
    return replace(one, is_apart=True) if isinstance(one, Latent) else one


def _with_gain(one, gain):
    norms = one.head_norms if isinstance(one, Attention) else None
    return one if norms is None else replace(one, head_norms=replace(norms, norm=gain))
