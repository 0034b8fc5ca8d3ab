"""What llama.cpp's converter changes in the tensors of a gated DeltaNet, and back."""

from __future__ import annotations

import numpy as np

QKVZ, QKV, Z = (f"linear_attn.in_proj_{name}" for name in ("qkvz", "qkv", "z"))


def changed(name: str, array: np.ndarray, config: dict, *, back: bool = False) -> np.ndarray:
    """A published tensor as a file has it; or `back`. Value heads of Qwen3.5 that share a key head
    are no neighbours in a file."""
    if "linear_attn." not in name:
        return array
    own = name.split("linear_attn.")[1].removesuffix(".weight")
    if own == "A_log":
        array = np.log(-array) if back else -np.exp(array)
    if own == "conv1d":
        array = array[:, None] if back else array[:, 0]
    if not config["model_type"].startswith("qwen3_5"):
        return array
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    before = 2 * keys * config["linear_key_head_dim"] if own in ("in_proj_qkv", "conv1d") else 0
    if own in ("in_proj_qkv", "conv1d", "in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        head, rest = np.split(array, [before])
        return np.concatenate([head, _tiled(rest, keys, values // keys, back)])
    if own == "out_proj":
        return np.ascontiguousarray(_tiled(array.T, keys, values // keys, back).T)
    return array


def _tiled(rows, n_keys, n_each, back):
    cut = (n_each, n_keys) if back else (n_keys, n_each)
    heads = rows.reshape(*cut, -1, *rows.shape[1:])
    return heads.swapaxes(0, 1).reshape(rows.shape)


def apart(array: np.ndarray, config: dict) -> tuple[np.ndarray, np.ndarray]:
    """The rows of in_proj_qkvz of Qwen3-Next as two matrices: of queries, of keys, and of values of
    all key heads; and of gates."""
    q, k, v, z = np.split(_by_key_head(array, config), _ends(config), axis=1)
    rows = [part.reshape(-1, array.shape[-1]) for part in (q, k, v, z)]
    return np.concatenate(rows[:3]), rows[3]


def joined(qkv: np.ndarray, z: np.ndarray, config: dict) -> np.ndarray:
    """The inverse of `apart`."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    parts = [*np.split(qkv, [keys, 2 * keys]), z]
    both = np.concatenate([_by_key_head(part, config) for part in parts], axis=1)
    return both.reshape(-1, z.shape[-1])


def _by_key_head(array, config):
    return array.reshape(config["linear_num_key_heads"], -1, array.shape[-1])


def _ends(config):
    size = config["linear_key_head_dim"]
    each = config["linear_num_value_heads"] // config["linear_num_key_heads"]
    return [size, 2 * size, 2 * size + each * config["linear_value_head_dim"]]
