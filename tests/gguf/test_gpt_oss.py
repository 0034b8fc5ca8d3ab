"""gpt-oss in GGUF: experts in MXFP4 of another order of half bytes, gates apart from the others."""

import gguf
import numpy as np
import pytest
import torch

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from tests.reference.gpt_oss_forms import drawn, reference_logits

pytestmark = pytest.mark.reference
IDS = [3, 77, 0, 130, 5, 21, 21, 90, 64, 12, 118]
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    **{
        f"self_attn.{name}_proj.{end}": f"attn_{own}.{end}"
        for name, own in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
        for end in ("weight", "bias")
    },
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def in_blocks(codes, scales):
    """Blocks of ggml [..., bytes of a row]: a scale, then half bytes of which the low ones are the
    first half of 32, not every second."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)
    halves = pairs[..., :16] | pairs[..., 16:] << 4
    whole = np.concatenate([scales[..., None], halves], axis=-1)
    return whole.reshape(*whole.shape[:-2], -1)


def write(path, config, tensors):
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    rope = config["rope_scaling"]
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    mxfp4 = gguf.GGMLQuantizationType.MXFP4
    for name, array in tensors.items():
        if name in _OUTSIDE:
            writer.add_tensor(_OUTSIDE[name], array)
            continue
        _, _, layer, own = name.split(".", 3)
        lead, experts = f"blk.{layer}.", own.removeprefix("mlp.experts.")
        if own in _NAMES:
            writer.add_tensor(lead + _NAMES[own], array)
        elif experts.endswith("_blocks"):
            scales = tensors[name.removesuffix("blocks") + "scales"]
            for part, rows in _rows(experts):
                blocks = in_blocks(array[:, rows], scales[:, rows])
                writer.add_tensor(f"{lead}ffn_{part}_exps.weight", blocks, raw_dtype=mxfp4)
        elif experts.endswith("_bias"):
            for part, rows in _rows(experts):
                bias = np.ascontiguousarray(array[:, rows])
                writer.add_tensor(f"{lead}ffn_{part}_exps.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rows(name):
    if name.startswith("down_proj"):
        return [("down", slice(None))]
    return [("gate", slice(0, None, 2)), ("up", slice(1, None, 2))]


def test_a_file_gives_the_logits_of_transformers(tmp_path):
    config, tensors = drawn(swiglu_limit=7.0)  # no file says another
    write(tmp_path / "m.gguf", config, tensors)
    expected = reference_logits(config, tensors, [IDS], torch.float32)[0].numpy()
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "layered")
    for ref in (tmp_path / "m.gguf", tmp_path / "layered"):
        with AutoModel.from_pretrained(ref, device="cpu", dtype="float32") as model:
            found = model.logits([IDS])[0]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
