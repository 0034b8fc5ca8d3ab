"""Meta's own form of a Llama, consolidated.NN.pth and params.json, as a config and named tensors.

params.json is checked. What it leaves out (context length, the factor of scaled rotary embedding,
the tokenizer's special ids) is derived where possible and stated in notes; a config.json beside it
decides instead. Opens no file: `open` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from jlayer.convert.sources.files import TensorInfo
from jlayer.convert.sources.joined import Parts
from jlayer.convert.sources.names import META, find_row, find_source
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.fields import LIMITS, as_integer
from jlayer.spec import ITEM_BYTES, ModelConfig
from jlayer.tokenizer_files import (
    LLAMA3_BEGIN,
    LLAMA3_ENDS,
    LLAMA3_SPECIAL_TOKENS,
    count_ranks,
    is_tiktoken,
    read_sentencepiece,
)

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
PART = re.compile(r"consolidated\.([0-9]{2})\.pth")
EMBEDDING, HEAD, GATE = "tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"
# (dim, n_layers) of Llama 3.2 1B and 3B. Their params.json has use_scaled_rope as Llama 3.1 has,
# and Meta's reference code uses a factor of 8 for all. Their published config.json has 32, which
# is right (meta-llama/llama-models issues 166 and 241).
_FACTOR_32 = {(2048, 16), (3072, 28)}
_SCALED_CONTEXT = 131_072
_LLAMA3_VOCABULARY = 128_000  # ranks of its tokenizer; the vocabulary has 256 special tokens more

Table = Mapping[str, tuple[object, TensorInfo]]


@dataclass(frozen=True)
class Params:
    """params.json. `vocab_size` is None where params.json leaves it to the tokenizer (-1)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    max_seq_len: int | None = None

    @property
    def intermediate_size(self) -> int:
        """Two thirds of 4 * dim, times the multiplier, rounded up to a multiple of multiple_of."""
        size = int(self.ffn_dim_multiplier * int(8 * self.dim / 3))
        return -(-size // self.multiple_of) * self.multiple_of


def read_params(raw: dict, *, where: str) -> Params:
    """params.json with every field checked.

    Raises CheckpointError (a field missing or out of range) or UnsupportedModelError (an unknown
    field, which may change what the weights mean).
    """
    raw = {key: value for key, value in raw.items() if value is not None}
    if raw.get("vocab_size") == -1:
        del raw["vocab_size"]
    if {"quantization_args", "lora_args"} & raw.keys():
        raise UnsupportedModelError(
            f"{where}: weights quantized by Meta's quantization_args are not supported; "
            "take the model's unquantized checkpoint"
        )
    known = {field.name for field in fields(Params)}
    strange = sorted(raw.keys() - known - {"max_batch_size"})
    if strange:
        raise UnsupportedModelError(
            f"{where}: {', '.join(ascii(key)[1:-1][:80] for key in strange[:20])}: not a field of "
            f"a text Llama, and not supported; known: {', '.join(sorted(known))}"
        )
    raw.setdefault("n_kv_heads", raw.get("n_heads"))
    limits = {
        "dim": LIMITS["hidden_size"],
        "n_layers": LIMITS["num_hidden_layers"],
        "n_heads": LIMITS["num_attention_heads"],
        "n_kv_heads": LIMITS["num_key_value_heads"],
        "vocab_size": LIMITS["vocab_size"],
        "multiple_of": LIMITS["intermediate_size"],
        "max_seq_len": LIMITS["max_position_embeddings"],
    }
    raw |= {name: as_integer(raw[name]) for name in limits.keys() & raw.keys()}
    required = ("dim", "n_layers", "n_heads", "n_kv_heads")
    for name in (*required, *sorted(raw.keys() & known - set(required))):
        _check_field(name, raw.get(name), limits.get(name), where)
    return Params(**{name: raw[name] for name in known & raw.keys()})


def _check_field(name, value, limit, where):
    if limit is not None:
        if type(value) is not int or not 1 <= value <= limit:
            given = "missing" if value is None else ascii(value)[:80]
            raise CheckpointError(
                f"{where}: {name} is {given}, expected an integer from 1 to {limit}"
            )
    elif name == "use_scaled_rope":
        if type(value) is not bool:
            raise CheckpointError(f"{where}: {name} is {value!a}, expected true or false")
    elif type(value) not in (int, float) or not 0 < value < 1e12:
        raise CheckpointError(f"{where}: {name} is {value!a}, expected a positive number")


# Facts that only the weights have


@dataclass(frozen=True)
class Facts:
    """What params.json leaves to the weights; None where the weights do not have it either."""

    vocab_size: int | None
    intermediate_size: int | None
    dtype: str | None
    tied: bool


def facts_of(tables: Sequence[Table]) -> Facts:
    """Reads the facts from the tables of the parts, which are in the order of their files."""
    dtypes = {info.dtype for table in tables for key, (_, info) in table.items() if _is_weight(key)}
    return Facts(
        vocab_size=_rows(tables, HEAD),
        intermediate_size=_rows(tables, GATE),
        dtype=min(dtypes) if len(dtypes) == 1 and dtypes <= ITEM_BYTES.keys() else None,
        tied=all(_same_bytes(table, EMBEDDING, HEAD) for table in tables),
    )


def _is_weight(key):
    match = find_row(META, key)
    return match is not None and match[1] is not None


def _rows(tables, key):
    """The total rows of a tensor that is divided by rows; None where parts of it are missing."""
    shapes = [table[key][1].shape for table in tables if key in table]
    return sum(shape[0] for shape in shapes) if shapes and all(shapes) else None


def _same_bytes(table, *keys):
    """Whether these names share one tensor's bytes, as a tied head does in Meta's form."""
    if any(key not in table for key in keys):
        return False
    places = {(place.offset, place.strided, info) for place, info in map(table.get, keys)}
    return len(places) == 1


# The config


def derive_config(params: Params, facts: Facts, *, where: str) -> tuple[dict, list[str]]:
    """The published config, without the tokenizer's ids; and notes on what was assumed.

    Raises CheckpointError where the weights do not have the size that params.json gives.
    """
    vocab_size = params.vocab_size or facts.vocab_size
    if vocab_size is None:
        raise CheckpointError(
            f"{where}: vocab_size is left to the weights, but {HEAD} is missing there; fetch them"
        )
    size = params.intermediate_size
    if facts.intermediate_size not in (None, size):
        raise CheckpointError(
            f"{where}: dim {params.dim}, multiple_of {params.multiple_of} and ffn_dim_multiplier "
            f"{params.ffn_dim_multiplier} make a feed_forward of {size}, but {GATE} has "
            f"{facts.intermediate_size} rows in all parts together; fetch the files of one model"
        )
    if params.dim % params.n_heads:
        raise CheckpointError(
            f"{where}: dim is {params.dim}, expected a multiple of n_heads {params.n_heads}"
        )
    context, notes = _context(params, vocab_size, where)
    scaling = None
    if params.use_scaled_rope:
        factor = 32.0 if (params.dim, params.n_layers) in _FACTOR_32 else 8.0
        notes.append(
            f"{where}: does not say by what factor rotary embedding is scaled; {factor:g} is taken"
        )
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": params.dim // params.n_heads,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "intermediate_size": size,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": params.n_heads,
        "num_hidden_layers": params.n_layers,
        "num_key_value_heads": params.n_kv_heads,
        "rms_norm_eps": params.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": params.rope_theta,
        "tie_word_embeddings": facts.tied,
        **({"torch_dtype": facts.dtype} if facts.dtype else {}),
        "vocab_size": vocab_size,
    }
    return config, notes


def _context(params, vocab_size, where):
    """The context length, which follows from the generation of the model; and a note on it."""
    if params.max_seq_len is not None:
        return params.max_seq_len, []
    if params.use_scaled_rope:
        context, generation = _SCALED_CONTEXT, "Llama 3.1's and 3.2's"
    elif vocab_size > _LLAMA3_VOCABULARY:
        context, generation = 8192, "Llama 3's"
    elif params.rope_theta > 10000.0:
        context, generation = 16384, "Code Llama's"
    elif params.norm_eps < 5e-6 or (params.dim, params.n_kv_heads, params.multiple_of) == _65B:
        context, generation = 2048, "Llama 1's"
    else:
        context, generation = 4096, "Llama 2's"
    return context, [
        f"{where}: does not say how long a context may be; {generation} {context} is taken"
    ]


# (dim, n_kv_heads, multiple_of) of Llama 1 65B, which has the norm_eps of Llama 2. No Llama 2 has
# these sizes.
_65B = (8192, 64, 256)


def differences(config: ModelConfig, derived: ModelConfig) -> list[str]:
    """The fields in which a config.json differs from what params.json and the weights give."""
    both = zip(_compared(config).items(), _compared(derived).values(), strict=True)
    return [f"{name} {there}, not {here}" for (name, there), here in both if there != here]


def _compared(cfg):
    """Fields by their published names."""
    how = cfg.attention
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: getattr(cfg, name) for name in names} | {
        "num_attention_heads": how.n_heads,
        "num_key_value_heads": how.n_kv_heads,
        "head_dim": how.head_dim,
        "rms_norm_eps": cfg.norm.eps,
        "rope_theta": how.rope.theta,
    }


def special_ids(raw: bytes, *, vocab_size: int, where: str) -> dict:
    """bos_token_id and eos_token_id of a tokenizer.model, SentencePiece's or tiktoken's.

    For Llama 3, all three tokens that end something are given, as its instruct models publish
    them. Whether this is an instruct model cannot be known; a base model does not write the other
    two.
    Raises CheckpointError where `raw` is neither.
    """
    if is_tiktoken(raw):
        first = count_ranks(raw)
        bos = first + LLAMA3_SPECIAL_TOKENS.index(LLAMA3_BEGIN)
        eos = [first + LLAMA3_SPECIAL_TOKENS.index(token) for token in LLAMA3_ENDS]
    else:
        model = read_sentencepiece(raw, where=where)
        bos, eos = model.bos_id, [model.eos_id]
    eos = [token for token in eos if token < vocab_size]
    found = {"bos_token_id": bos if bos < vocab_size else None}
    found["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    return {name: value for name, value in found.items() if value is not None}


# The tensors


def assemble(
    tables: Mapping[str, Table], expected: Mapping[str, tuple[int, ...]], *, tied: bool
) -> tuple[dict[str, TensorInfo], dict[str, Parts], dict[str, list[str]]]:
    """The published tensors, the parts that each is joined from, and what is wrong, by kind.

    `tables`: by part, in the order of the files; `expected`: the shapes of the published tensors.
    """
    problems = {"missing": [], "shape": [], "dtype": [], "extra": []}
    infos, parts = {}, {}
    for name, shape in expected.items():
        row, key = find_source(META, name)
        missing = [f"{key} in {part}" for part, table in tables.items() if key not in table]
        if missing:
            problems["missing"] += missing if len(missing) < len(tables) else [key]
            continue
        stored = [table[key] for table in tables.values()]
        shapes = [info.shape for _, info in stored]
        rule = next((rule for rule in row.rules if rule.joined_shape(shapes) == shape), None)
        dtypes = sorted({info.dtype for _, info in stored})
        if rule is None:
            problems["shape"].append(_misfit(key, row, shapes, shape))
        elif len(dtypes) > 1 or dtypes[0] not in ITEM_BYTES:
            problems["dtype"].append(f"{key} is {' and '.join(dtypes)}")
        else:
            infos[name] = TensorInfo(dtypes[0], shape)
            parts[name] = Parts(rule, *map(tuple, zip(*stored, strict=True)))
    for part, table in tables.items():
        for key in table:
            row = find_row(META, key)
            wanted = row and (row[1] is None or row[1] in expected or (tied and key == HEAD))
            if not wanted:
                problems["extra"].append(f"{key} in {part}")
    return infos, parts, problems


def _misfit(key, row, shapes, expected):
    if len(set(shapes)) == 1 and len(shapes) > 1:
        parts = f"{len(shapes)} times {list(shapes[0])}"
    else:
        parts = " and ".join(str(list(shape)) for shape in shapes)
    rules = " or ".join(rule.name for rule in row.rules)
    return f"{key} is {parts}, expected what {rules} makes {list(expected)}"
