"""What a quantization_config says of published weights: its method, the usual encoding of a matrix,
and which modules are left as plain numbers. What would make it another form is refused by name."""

from __future__ import annotations

import re

from jlayer.encodings.fp8 import BLOCK
from jlayer.encodings.linear import GROUPS, INT8_SCB
from jlayer.encodings.tables import BLOCK_SIZES, FOUR_BITS, TABLES
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.fields import Fields, as_integer
from jlayer.families.left import METHOD, REGEX, names_in, names_left
from jlayer.families.repacked import (
    is_repacked,
    read_auto_round,
    read_awq,
    read_eetq,
    read_gptq,
    read_hqq,
    read_packed,
)
from jlayer.parts import Quantized

# What AutoRound saves beside the method's own settings: the scheme, and how it searched.
_OF_AUTO_ROUND = """
    act_bits act_data_type act_dynamic act_group_size act_sym amp autoround_version batch_size bits
    block_name_to_quantize data_type enable_minmax_tuning enable_norm_bias_tuning
    enable_quanted_input gradient_accumulate_steps group_size iters low_gpu_mem_usage lr minmax_lr
    nsamples provider scale_dtype seqlen supported_types sym to_quant_block_names
    """.split()  # noqa: SIM905 - so many names are read better as a paragraph
NVFP4_GROUP = TABLES["nvfp4_modelopt"].group
# What to do about a config of another form, and about one that is damaged.
_TAKE_ANOTHER = "take another checkpoint of the model, such as the unquantized one"
_PUT_BACK = "put back the config.json that was published with the weights"
SECTION = "quantization_config"


def read_quantized(fields: Fields) -> Quantized | None:
    """What the config says of published weights, of a method that is known; None: nothing, or that
    jlayer quantized them. Raises CheckpointError or UnsupportedModelError."""
    said = fields.section(SECTION)
    method = method_of(said.raw)
    read = _READ.get(method) if isinstance(method, str) else None
    try:
        return read(said.changed({METHOD: method})) if read else None
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}; {_TAKE_ANOTHER}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_PUT_BACK}") from None


def method_of(said: dict) -> object:
    """The method that a quantization_config names; one that only says in how many bits to load is
    of bitsandbytes, as for Transformers."""
    loads = any(said.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    return said.get(METHOD, "bitsandbytes" if loads else None)


def _read_fp8(said):
    """DeepSeek's form, and those of Qwen, MiniMax and Mistral. The scales of activations play no
    part: weights alone are quantized here. AutoRound says more, of how it worked."""
    _refuse_unknown(
        said,
        *("activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers"),
        *("fmt", "scale_fmt", "dequantize", "modules_to_convert", "expert_dtype"),
        *(_OF_AUTO_ROUND if said.has("autoround_version") else ()),
    )
    said.refuse_unless("bits", 8)
    said.refuse_unless("data_type", "fp")
    said.refuse_unless("sym", True)
    said.refuse_unless("activation_scheme", "static", "dynamic")
    said.refuse_unless("fmt", "float8_e4m3fn", None, "e4m3")
    said.refuse_unless("expert_dtype", None, "fp8")
    said.refuse_unless("modules_to_convert", [], None)
    size = said.raw.get("weight_block_size", [BLOCK, BLOCK])
    if size not in (None, [BLOCK, BLOCK]):
        raise UnsupportedModelError(
            f"{said.where}: weight_block_size is {size!a:.80}, supported: [{BLOCK}, {BLOCK}], or "
            "null for one scale of each matrix"
        )
    left = names_left(said, "modules_to_not_convert", "ignored_layers")
    if size is None:
        return Quantized("fp8", "fp8_tensor", left)
    # One scale is not taken for a whole grid.
    return Quantized("fp8", "fp8_128x128", left, ("fp8_128x128", "fp8_row_bfloat16"))


def _read_bitsandbytes(said):
    """bitsandbytes: 4 bits (nf4, fp4) or 8. The dtype that it computes in plays no part, nor that
    as which codes are stored, nor what it does to inputs. Block sizes stand beside each matrix."""
    _refuse_unknown(
        said,
        *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
        *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"),
        *("llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"),
        *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    )
    said.refuse_unless(
        "bnb_4bit_quant_storage", None, *("int8", "float16", "bfloat16", "float32", "uint8")
    )
    is_4bit, is_8bit = said.boolean("load_in_4bit"), said.boolean("load_in_8bit")
    if is_4bit == is_8bit:
        raise UnsupportedModelError(
            f"{said.where}: load_in_4bit and load_in_8bit are both {str(is_4bit).lower()}, "
            "supported: one of them true"
        )
    left = names_left(said, "llm_int8_skip_modules")
    if is_8bit:
        return Quantized("bitsandbytes_8bit", INT8_SCB.name, left)
    kinds = {kind: row.name for (kind, size), row in FOUR_BITS.items() if size == BLOCK_SIZES[0]}
    return Quantized("bitsandbytes", said.choice("bnb_4bit_quant_type", kinds, default="fp4"), left)


def _read_compressed(said):
    """compressed-tensors: of each group of modules the numbers and their scales."""
    said.refuse_unless("quantization_status", None, "compressed")
    sparsity = said.section("sparsity_config")
    sparsity.refuse_unless("format", None, "dense")
    if said.section("transform_config").raw.get("config_groups"):
        raise UnsupportedModelError(
            f"{said.where}: transform_config turns the inputs of matrices, which is not supported"
        )
    groups = said.section("config_groups")
    if not groups.raw:
        raise CheckpointError(f"{groups.where} is missing, expected a group of modules")
    if is_repacked(said):
        return read_packed(said, names_in(said, "ignore"))
    usual = [_encoding_of_group(said, groups.section(name)) for name in groups.raw]
    named = tuple(dict.fromkeys(usual))
    return Quantized("compressed-tensors", usual[0], names_in(said, "ignore"), named)


def _encoding_of_group(said, group):
    """The encoding of a group's weights, with the commonest dtype of scales."""
    weights = group.section("weights")
    if not weights.raw:
        raise UnsupportedModelError(
            f"{group.where}: weights is missing: only weights that are quantized are supported"
        )
    form = group.raw.get("format") or said.raw.get("format")
    if not isinstance(form, str) or form not in _COMPRESSED:
        raise UnsupportedModelError(
            f"{said.where}: format {form!a:.80} is not supported; supported: "
            f"{', '.join(_COMPRESSED)}"
        )
    weights.refuse_unless("symmetric", None, True)
    weights.refuse_unless("actorder", None, False, "weight", "static")
    weights.refuse_unless("num_bits", *_COMPRESSED[form][0])
    weights.refuse_unless("type", _COMPRESSED[form][1])
    return _COMPRESSED[form][2](weights)


def _integer_encoding(kind):
    """A function of a group's weights -> their encoding, of integers of this kind."""

    def encoding(weights):
        bits = as_integer(weights.raw.get("num_bits", 8))  # as compressed-tensors takes it
        kind_of = f"{kind}{bits}" if kind == "packed" else kind
        if weights.raw.get("strategy") == "channel":
            return f"{kind_of}_row_bfloat16"
        weights.refuse_unless("strategy", "channel", "group")
        size = as_integer(weights.raw.get("group_size"))
        if type(size) is not int or f"g{size}" not in GROUPS:
            raise UnsupportedModelError(
                f"{weights.where}: group_size is {size!a:.80}, supported: "
                f"{', '.join(str(n) for n in GROUPS.values() if n)}"
            )
        return f"{kind_of}_g{size}_bfloat16"

    return encoding


def _four_bit_encoding(name, size):
    """A function of a group's weights -> the encoding, where its group has the one `size`."""

    def encoding(weights):
        weights.refuse_unless("group_size", None, size)
        return name

    return encoding


def _float_encoding(weights):
    strategy = weights.raw.get("strategy")
    if strategy == "block":
        size = weights.raw.get("block_structure")
        if size not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise UnsupportedModelError(
                f"{weights.where}: block_structure is {size!a:.80}, supported: [{BLOCK}, {BLOCK}]"
            )
    of_strategy = {"tensor": "fp8_tensor", "channel": "fp8_row_bfloat16", "block": "fp8_128x128"}
    return weights.choice("strategy", of_strategy, default="tensor")


# The format of compressed-tensors -> (bits, type, a function of the group's weights).
_COMPRESSED = {
    "float-quantized": ((8,), "float", _float_encoding),
    "int-quantized": ((8,), "int", _integer_encoding("int8")),
    "pack-quantized": ((4, 8), "int", _integer_encoding("packed")),
    "nvfp4-pack-quantized": ((4,), "float", _four_bit_encoding("nvfp4", 16)),
    "mxfp4-pack-quantized": ((4,), "float", _four_bit_encoding("mxfp4", 32)),
}


def _read_modelopt(said):
    """ModelOpt: one algorithm for all that it quantizes."""
    of_algorithm = {"FP8": "fp8_tensor", "NVFP4": "nvfp4_modelopt"}
    encoding = said.choice("quant_algo", of_algorithm, default="missing")
    groups = said.section("config_groups")
    for name in groups.raw:
        weights = groups.section(name).section("weights")
        weights.refuse_unless("type", None, "float")
        if encoding == "nvfp4_modelopt":
            weights.refuse_unless("group_size", None, NVFP4_GROUP)
    left = [_glob(name) for key in ("ignore", "exclude_modules") for name in names_in(said, key)]
    return Quantized("modelopt", encoding, tuple(left))


def _glob(name):
    """A name in which "*" stands for anything, as an expression."""
    return REGEX + re.escape(name).replace(r"\*", ".*") + "$" if "*" in name else name


def inputs_note(fields: Fields) -> tuple[str, ...]:
    """A note where the config asks for the inputs of matrices to be rounded as well."""
    said = fields.section(SECTION)
    groups = said.raw.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    method = method_of(said.raw)
    asks = method == "fp8" or (method == "bitsandbytes" and said.raw.get("load_in_8bit") is True)
    asks = asks or any(
        isinstance(group, dict) and group.get("input_activations") for group in groups
    )
    if not asks or method not in _READ:
        return ()
    return (
        f"{said.where}: asks for the inputs of matrices to be quantized as well; here weights "
        "alone are, and inputs keep the compute dtype",
    )


_READ = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed,
    "modelopt": _read_modelopt,
    "bitsandbytes": _read_bitsandbytes,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "hqq": read_hqq,
    "eetq": read_eetq,
}


def _refuse_unknown(said, *known):
    unknown = sorted(said.raw.keys() - {METHOD, *known})
    if unknown:
        raise UnsupportedModelError(
            f"{said.where}: {unknown[0]!a:.80} is not known of {said.raw[METHOD]}; supported: "
            f"{', '.join(known)}"
        )
