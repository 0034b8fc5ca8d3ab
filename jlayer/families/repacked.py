"""What a quantization_config says of weights that are repacked when they are converted: GPTQ, AWQ,
AutoRound's names for both, HQQ, EETQ, and compressed-tensors' pack-quantized with zeros or with
sorted inputs. What would make it another form is refused by name."""

from __future__ import annotations

from jlayer.encodings.grouped import WHOLE_ROW
from jlayer.encodings.linear import LINEAR, linear
from jlayer.errors import UnsupportedModelError
from jlayer.families.fields import Fields
from jlayer.families.left import names_left
from jlayer.parts import Quantized

BITS, GROUPS = (4, 8), (32, 64, 128, -1)
GPTQ_BITS = (2, 3, *BITS)  # fewer than 4 are put into half bytes
# AWQ's version -> the method that reads it.
_AWQ_VERSIONS = {"gemm": "awq", "gemv": "awq_gemv"}
# What AutoRound calls the forms of others. Its own is GPTQ's, with zeros as they are.
_PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
_USUAL = "float16"  # of scales, as far as a config tells
# How compressed-tensors says that groups are not of neighbours.
_SORTED = ("group", True)


def read_gptq(said: Fields) -> Quantized:
    """GPTQ: `checkpoint_format` (or `format`) says whether zeros are stored less one."""
    named = [said.raw[key] for key in ("checkpoint_format", "format") if said.has(key)]
    if any(name not in ("gptq", "gptq_v2") or name != named[0] for name in named):
        raise UnsupportedModelError(
            f"{said.where}: checkpoint_format is {', '.join(map(ascii, named)):.80}, "
            "supported: gptq, gptq_v2"
        )
    said.refuse_unless("pack_dtype", None, "int32")
    dynamic = said.section("dynamic")
    for name in dynamic.raw:
        if not name.startswith("-:"):  # that is, but for what is left out
            raise UnsupportedModelError(
                f"{said.where}: dynamic has other settings for {name!a:.80}, which is not supported"
            )
    return _gptq(said, named[0] if named else "gptq", is_ordered=said.boolean("desc_act"))


def _gptq(said, method, *, is_ordered):
    _refuse_rotations(said)
    bits, group = _one_of(said, "bits", GPTQ_BITS), _group(said, "group_size")
    zeros = None if said.boolean("sym", default=True) else "uint8"
    is_ordered = is_ordered and group != WHOLE_ROW
    row = linear(max(bits, BITS[0]), group, _USUAL, zero_dtype=zeros, is_ordered=is_ordered)
    return Quantized(method, row.name, bits=bits if bits < BITS[0] else 0)


def read_awq(said: Fields) -> Quantized:
    """AWQ, in the order of its kernel gemm or gemv. Its zeros are stored in any case, also where
    `zero_point` says that they are all in the middle."""
    methods = set()
    for key in ("version", "format"):
        version = said.raw.get(key)
        if version is not None and str(version).lower() not in _AWQ_VERSIONS:
            raise UnsupportedModelError(
                f"{said.where}: {key} is {version!a:.80}, supported: {', '.join(_AWQ_VERSIONS)}"
            )
        methods |= {_AWQ_VERSIONS[str(version).lower()]} if version is not None else set()
    if len(methods) > 1:
        raise UnsupportedModelError(
            f"{said.where}: version is {said.raw['version']!a:.80} and format "
            f"{said.raw['format']!a:.80}, expected the same"
        )
    said.boolean("zero_point", default=True)
    return _awq(said, *(methods or {"awq"}))


def _awq(said, method):
    _refuse_rotations(said)
    bits, group = _one_of(said, "bits", (4,)), _group(said, "group_size")
    row = linear(bits, group, _USUAL, zero_dtype="uint8")
    return Quantized(method, row.name, names_left(said, "modules_to_not_convert"))


def _refuse_rotations(said):
    """Of AutoRound, in whichever form: they would turn the inputs of matrices."""
    said.refuse_unless("rotation_configs", None, [])


def read_auto_round(said: Fields) -> Quantized:
    """AutoRound: the tensors of GPTQ or AWQ, under a name of its own. `extra_config` may leave
    modules as they are, at 16 bits or more."""
    form = said.raw.get("packing_format")
    if not isinstance(form, str) or form not in _PACKINGS:
        raise UnsupportedModelError(
            f"{said.where}: packing_format is {form!a:.80}, supported: {', '.join(_PACKINGS)}"
        )
    said.refuse_unless("data_type", None, "int")
    for own in _sections(said.section("extra_config")):
        bits = own.raw.get("bits")
        if type(bits) is not int or bits < 16:
            raise UnsupportedModelError(
                f"{own.where} has settings of its own, bits {bits!a:.80}, supported: 16 or more "
                "(plain numbers); take the model's unquantized checkpoint"
            )
    method = _PACKINGS[form]
    return _awq(said, method) if method == "awq" else _gptq(said, method, is_ordered=False)


def read_hqq(said: Fields) -> Quantized:
    """HQQ: one setting for all matrices, or one for each kind of them."""
    settings = said.section("quant_config")
    kinds = [settings] if "weight_quant_params" in settings.raw else _sections(settings)
    if not kinds:
        raise UnsupportedModelError(
            f"{settings.where} is missing, supported: settings with weight_quant_params"
        )
    rows = []
    for kind in kinds:
        weights = kind.section("weight_quant_params")
        weights.refuse_unless("view_as_float", None, False)
        weights.refuse_unless("channel_wise", None, True)
        bits, _ = _one_of(weights, "nbits", BITS), _one_of(weights, "axis", (1,))
        group = weights.raw.get("group_size")
        group = WHOLE_ROW if group is None else _group(weights, "group_size")
        rows.append(linear(bits, group, _USUAL, zero_dtype=_USUAL))
    return Quantized("hqq", rows[0].name, names_left(said, "skip_modules"))


def read_eetq(said: Fields) -> Quantized:
    """EETQ: int8, a scale for each row."""
    said.refuse_unless("weights", "int8")
    row = LINEAR[f"int8_row_{_USUAL}"]
    return Quantized("eetq", row.name, names_left(said, "modules_to_not_convert"))


def is_repacked(said: Fields) -> bool:
    """Whether a config of compressed-tensors has integers with zeros, or sorted inputs."""
    return any(
        (group.raw.get("format") or said.raw.get("format")) == "pack-quantized"
        and (weights.raw.get("symmetric") is False or weights.raw.get("actorder") in _SORTED)
        for group in _sections(said.section("config_groups"))
        for weights in [group.section("weights")]
    )


def read_packed(said: Fields, left: tuple[str, ...]) -> Quantized:
    """compressed-tensors' pack-quantized, of one form for all groups of modules. `left`: the
    modules that are plain numbers."""
    rows = {}
    for group in _sections(said.section("config_groups")):
        weights = group.section("weights")
        group.refuse_unless("format", None, "pack-quantized")
        weights.refuse_unless("type", "int")
        weights.refuse_unless("actorder", None, False, "static", "weight", *_SORTED[::-1])
        strategy = weights.choice("strategy", {"group": "group", "channel": "row"}, default="group")
        inputs = WHOLE_ROW if strategy == "row" else _group(weights, "group_size")
        zeros = None if weights.boolean("symmetric", default=True) else "uint8"
        is_ordered = weights.raw.get("actorder") in _SORTED and inputs != WHOLE_ROW
        bits = _one_of(weights, "num_bits", BITS)
        row = linear(bits, inputs, "bfloat16", zero_dtype=zeros, is_ordered=is_ordered)
        rows[row.name] = None
    if len(rows) > 1:
        raise UnsupportedModelError(
            f"{said.where}: config_groups has {len(rows)} forms of weights, supported with zeros "
            "or sorted inputs: one"
        )
    return Quantized("pack-quantized", *rows, left)


def _sections(said):
    return [said.section(name) for name in said.raw]


def _one_of(said, key, known):
    value = said.raw.get(key)
    if type(value) is not int or value not in known:
        raise UnsupportedModelError(
            f"{said.where}: {key} is {value!a:.80}, supported: {', '.join(map(str, known))}"
        )
    return value


def _group(said, key):
    size = _one_of(said, key, GROUPS)
    return WHOLE_ROW if size == -1 else size
