"""How encoded tensors are named in published folders, by the method that a config.json names.

A folder says what it has in two places: `quantization_config` names the method, and the headers of
its files show which tensors it was applied to. The former chooses a row here; the latter choose the
encoding of each tensor (`checkpoint.encoded`).
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.fp8 import FLOAT8, FP8
from jlayer.encodings.grouped import SCALE, Q
from jlayer.encodings.linear import INT8_SCB, LINEAR, ORDER, ZERO
from jlayer.encodings.tables import FOUR_BITS, GLOBAL_SCALE, MXFP4


@dataclass(frozen=True)
class Form:
    """A published form of encoded tensors.

    `ends`: (how a published name ends, what stands there instead in the name of the matrix, which
    piece of it such a tensor is); None for a piece: it is left out, with a note. `encodings`: those
    that it may have, each with other pieces. `main_dtypes`: a matrix of one of these is the main
    piece under its own name. `words_dtype`: of words in which the bytes of a main piece may be
    stored, the first byte in the low bits. `in_blocks`: a piece whose last axis is cut in two, and
    the length of the last one. `experts_alone`: it has no other matrices.
    `scalar_axes`: of the one scale of a matrix, as its makers write it.
    `is_repacked`: it does not run as it is, and is converted to its encodings. `is_exported`: a
    converted folder has all that it takes to write it again. `variant_of`: the
    method that a config.json names for it, if another.
    """

    method: str
    ends: tuple[tuple[str, str, str | None], ...]
    encodings: tuple[str, ...]
    main_dtypes: tuple[str, ...] = ()
    words_dtype: str | None = None
    in_blocks: tuple[tuple[str, int], ...] = ()
    experts_alone: bool = False
    scalar_axes: tuple[int, ...] = (1,)
    is_repacked: bool = False
    is_exported: bool = True
    variant_of: str = ""

    def split(self, name: str) -> tuple[str, str | None] | None:
        """(name of the matrix, piece) of a published tensor, by its name; None: no end fits."""
        for end, instead, piece in self.ends:
            if name.endswith(end):
                return name.removesuffix(end) + instead, piece
        return None

    def name_of(self, matrix: str, piece: str) -> str:
        """The inverse of `split`: the published name of a piece."""
        for end, instead, own in self.ends:
            if own == piece and matrix.endswith(instead):
                return matrix.removesuffix(instead) + end
        return matrix

    def axes_of(self, piece: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The published axes of a piece of this shape."""
        for name, length in self.in_blocks:
            if name == piece:
                return (*shape[:-1], shape[-1] // length, length)
        return shape


# The tensors of compressed-tensors that are scales of a layer's inputs and outputs.
_OF_ACTIVATIONS = ("input", "output", "input_global", "q", "k", "v")
SHAPE_END = ".weight_shape"  # of a tensor that repeats the shape of a matrix
# Its integers without zeros of their own.
_SYMMETRIC = tuple(
    name
    for name, row in LINEAR.items()
    if row.zero_dtype is None and not row.is_ordered and row is not INT8_SCB
)
# The names of GPTQ's pieces, and AWQ's.
_GPTQ = tuple(
    (f".{name}", ".weight", piece)
    for name, piece in (("qweight", Q), ("scales", SCALE), ("qzeros", ZERO), ("g_idx", ORDER))
)
# What hqq saves beside each matrix: the settings that it was quantized with.
_OF_HQQ = """
    axis channel_wise compute_dtype encoded_state_dict group_size nbits offload_meta optimize
    packing quant_scale quant_zero round_zero shape stores_quant_config unpack_view_dtype
    view_as_float
    """.split()  # noqa: SIM905 - so many names are read better as a paragraph
_HQQ = {"W_q": Q, "scale": SCALE, "zero": ZERO}
# What bitsandbytes saves of a matrix beside codes and scales; it is read when a folder is opened.
QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP = "quant_map", "nested_absmax", "nested_quant_map"
QUANT_STATE, WEIGHT_FORMAT = "quant_state.bitsandbytes__", "weight_format"
_STATISTICS = (
    *(QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP),
    *(f"{QUANT_STATE}{kind}" for kind in dict.fromkeys(kind for kind, _ in FOUR_BITS)),
)
_PACKED = {"packed": Q, "scale": SCALE, "zero_point": ZERO, "g_idx": ORDER, "shape": None}


def _repacked(method, ends, *, is_exported=False, **more):
    how = {"is_repacked": True, "is_exported": is_exported}
    return Form(method, ends, tuple(LINEAR), **how, **more)


FORMS: dict[str, Form] = {
    form.method: form
    for form in (
        # gpt-oss: the half bytes of 32 inputs are one block.
        Form(
            "mxfp4",
            (("_blocks", "", Q), ("_scales", "", SCALE)),
            (MXFP4.name,),
            in_blocks=((Q, MXFP4.group * MXFP4.bits // 8),),
            experts_alone=True,
        ),
        # DeepSeek's, Qwen's, MiniMax's, Mistral's. "inv": by which the weights were divided.
        Form(
            "fp8",
            (
                ("_scale_inv", "", SCALE),
                ("_activation_scale", "", None),
                *((f".{name}_scale", ".weight", None) for name in ("activation", "input")),
            ),
            tuple(FP8),
            main_dtypes=(FLOAT8,),
            scalar_axes=(),
        ),
        Form(
            "compressed-tensors",
            (
                (".weight_packed", ".weight", Q),
                (".weight_scale", ".weight", SCALE),
                (".weight_global_scale", ".weight", GLOBAL_SCALE),
                (SHAPE_END, ".weight", None),
                *((f".{name}_scale", ".weight", None) for name in _OF_ACTIVATIONS),
            ),
            (*FP8, *_SYMMETRIC, MXFP4.name, "nvfp4"),
            main_dtypes=(FLOAT8, "int8"),
            words_dtype="int32",
        ),
        # NVIDIA's ModelOpt.
        Form(
            "modelopt",
            (
                (".weight_scale_2", ".weight", GLOBAL_SCALE),
                (".weight_scale", ".weight", SCALE),
                *((f".{name}_scale", ".weight", None) for name in _OF_ACTIVATIONS),
            ),
            (*FP8, "nvfp4_modelopt"),
            main_dtypes=(FLOAT8, "uint8"),
            scalar_axes=(),
        ),
        Form(
            "bitsandbytes",
            (
                (".weight.absmax", ".weight", SCALE),
                *((f".weight.{own}", ".weight", own) for own in _STATISTICS),
            ),
            tuple(row.name for row in FOUR_BITS.values()),
            is_exported=False,
        ),
        Form(
            "bitsandbytes_8bit",
            ((".SCB", ".weight", SCALE), (f".{WEIGHT_FORMAT}", ".weight", WEIGHT_FORMAT)),
            (INT8_SCB.name,),
            main_dtypes=("int8",),
            is_exported=False,
            variant_of="bitsandbytes",
        ),
        _repacked("gptq", _GPTQ),
        _repacked("gptq_v2", _GPTQ, variant_of="gptq"),
        _repacked("awq", _GPTQ[:-1]),
        _repacked("awq_gemv", _GPTQ[:-1], variant_of="awq"),
        _repacked(
            "hqq",
            (
                *((f".{name}", ".weight", own) for name, own in _HQQ.items()),
                *((f".{name}", ".weight", None) for name in _OF_HQQ),
            ),
        ),
        _repacked("eetq", ((".weight_scales", ".weight", SCALE),), main_dtypes=("int8",)),
        _repacked(
            "pack-quantized",
            tuple((f".weight_{name}", ".weight", own) for name, own in _PACKED.items()),
            is_exported=True,
            variant_of="compressed-tensors",
        ),
    )
}
# The methods that a model of any family may name. AutoRound has no form of its own.
OF_ALL_FAMILIES = (
    *(name for name, form in FORMS.items() if not form.experts_alone and not form.variant_of),
    "auto-round",
)
