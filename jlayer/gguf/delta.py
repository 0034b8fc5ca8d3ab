"""Models with a gated DeltaNet in most layers in GGUF: Qwen3-Next and Qwen3.5.

llama.cpp's converter writes -exp(A_log), and the value heads of Qwen3.5 in another order: those
that share a key head are not neighbours. Files of Qwen3-Next have gates and what is convolved as
two matrices since the end of 2025. All is used as it lies there: see `families.layout`.
"""

from __future__ import annotations

from jlayer.errors import UnsupportedModelError
from jlayer.families.layout import INPUTS
from jlayer.gguf.metadata import Metadata
from jlayer.gguf.mixtures import experts_of
from jlayer.gguf.reader import Head
from jlayer.gguf.rope import rope_parameters


def layout_of(head: Head) -> dict[str, str]:
    """The layout of what a gated DeltaNet's input is multiplied by, where gates are apart."""
    return {INPUTS: "half"} if "blk.0.attn_gate.weight" in head.tensors else {}


def qwen35(said: Metadata) -> dict:
    return {"model_type": "qwen3_5_text", **_mixers(said)}


def qwen35moe(said: Metadata) -> dict:
    return {"model_type": "qwen3_5_moe_text", **_mixers(said), **_experts(said)}


def qwen3next(said: Metadata) -> dict:
    """All layers have experts."""
    return {
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": said.boolean("expert_weights_norm", True),
        **_mixers(said),
        **_experts(said),
    }


def _mixers(said):
    """The sizes of both mixers; every so many-th layer has attention."""
    n_values, inner = said.integer("ssm.time_step_rank"), said.integer("ssm.inner_size")
    if n_values < 1 or inner % n_values:
        raise UnsupportedModelError(
            f"{said.where}: ssm.inner_size is {inner}, supported: a multiple of ssm.time_step_rank "
            f"{n_values}, the number of value heads"
        )
    return {
        "linear_conv_kernel_dim": said.integer("ssm.conv_kernel"),
        "linear_num_key_heads": said.integer("ssm.group_count"),
        "linear_num_value_heads": n_values,
        "linear_key_head_dim": said.integer("ssm.state_size"),
        "linear_value_head_dim": inner // n_values,
        "full_attention_interval": said.integer("full_attention_interval", 4),
        "rope_parameters": rope_parameters(said, in_part=True),
    }


def _experts(said):
    return {
        "moe_intermediate_size": said.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": said.integer("expert_shared_feed_forward_length"),
        **experts_of(said, "num_experts"),
    }
