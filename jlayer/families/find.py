"""The family of a config.json, and what to tell of one that is not known."""

from __future__ import annotations

import difflib
import re

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import Family
from jlayer.families.fields import Fields, printable
from jlayer.families.holders import HOLDERS
from jlayer.families.llama import LLAMA
from jlayer.families.registry import FAMILIES

# How the architectures of other published models begin, in lower case.
_OTHERS = (
    *("apertus", "arcee", "arctic", "baichuan", "bert", "bitnet", "bloom", "chatglm", "codegen"),
    *("cohere", "dbrx", "deci", "deepseek", "ernie", "exaone", "falcon", "gemma", "glm", "gpt"),
    *("granite", "grok", "helium", "hunyuan", "internlm", "jamba", "jais", "kimi", "lfm", "mamba"),
    *("minicpm", "minimax", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "optfor"),
    *("orion", "persimmon", "phi", "qwen", "rwkv", "seedoss", "smollm3", "solar", "stablelm"),
    *("starcoder", "t5", "xglm", "xverse", "zamba"),
)
# How a model type, or a key of its config, says that a model has experts.
_WITH_EXPERTS = re.compile(r"moe|mixtral|gpt_oss|deepseek_v|dbrx|grok|jamba|llama4|minimax|kimi_k")
_EXPERTS_KEY = re.compile(r"(num|n)_.*experts?(_per_tok|_used)?|moe_.*")
# Keys that say nothing of a model's arithmetic or its leaves.
_SAYS_NOTHING = re.compile(
    r"_.*|.*(dropout|_pdrop|_token_ids?|_token|_coef)|use_(cache|cash|bfloat16)|transformers_version"
    r"|architectures|model_type|auto_map|(torch_)?dtype|initializer_range|initializer_factor"
    r"|pretraining_tp|output_.*|return_dict.*|torchscript|tf_.*|pruned_heads|(id2|_2)?label.*"
    r"|tie_encoder_decoder|is_(encoder_)?decoder|cross_attention.*|add_cross_attention"
    r"|(max|min)_length|max_sequence_length|do_sample|early_stopping|num_beams|num_beam_groups"
    r"|diversity_penalty|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty"
    r"|(encoder_)?no_repeat_ngram_size|bad_?words_?ids|num_return_sequences|remove_invalid_values"
    r"|exponential_decay_length_penalty|(begin_)?suppress_tokens|finetuning_task|tokenizer_class"
    r"|prefix|task_specific_params|problem_type|chunk_size_feed_forward|cache_implementation"
    r"|unsloth_.*|ep_size|quantization_config"
)


def find_family(raw: dict, *, where: str) -> Family:
    """By model_type, as transformers chooses; by the architecture alone where there is none.

    Trainers and mergers write many names for the architecture of one model. But the name of another
    model's is a contradiction: programs that go by it would run another model. `where` names the
    file in errors. Raises CheckpointError or UnsupportedModelError.
    """
    names = raw.get("architectures") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {names!r}, expected a list of names")
    # Of rows with one architecture the first has its name.
    known = {row.architecture.lower(): row for row in reversed(FAMILIES.values())}
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if model_type is None and names:
        family = known.get(names[0].lower())
    if family is None:
        raise UnsupportedModelError(f"{where}: {_unknown(raw, names, where)}")
    for name in names:
        if not name.isprintable() or _is_of_another(name, family, known):
            raise UnsupportedModelError(
                f"{where}: architecture {printable(name)} is not supported, but model_type is "
                f"{family.model_type!r}, of {family.architecture}: remove the wrong one"
            )
    return family


def _is_of_another(name, family, known):
    """Whether the name of an architecture is that of another published model than the family's."""
    name = name.lower()
    if name in known:
        return known[name].architecture != family.architecture
    stem = _stem(family)
    others = {*_OTHERS, *map(_stem, known.values())} - {stem}
    experts = [_WITH_EXPERTS.search(word) is not None for word in (name, family.model_type)]
    is_own = stem in name and experts[0] == experts[1]
    return not is_own and (stem in name or name.startswith(tuple(others)))


def _stem(family):
    """What the names of a family's models have in common: qwen, of qwen2 and qwen3."""
    return re.match("[a-z]+", family.model_type)[0]


def _unknown(raw, names, where):
    """What to tell of a model that no family is: its name, what it may be, and what is known."""
    model_type = raw.get("model_type")
    said = "model_type is missing" if model_type is None else f"model_type {model_type!a:.80}"
    said = f"architecture {printable(names[0])} ({said})" if names else said
    said = f"{said} is not supported" if names or model_type is not None else said
    types = sorted({*FAMILIES, *HOLDERS})
    supported = f"supported: {', '.join(types)}"
    named = _named_with_experts(raw, names)
    alike = [] if named else _alike(raw, where)
    if alike:
        return (
            f"{said}; its keys are those of {' or '.join(alike)}: set model_type to that if that "
            f"is what it is; {supported}"
        )
    experts = _experts(raw, names)
    if experts:
        return f"{said}: it has experts ({experts}), of a form that no family here has; {supported}"
    near = difflib.get_close_matches(str(model_type), types, n=1, cutoff=0.75) if model_type else []
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{said}{hint} {supported}"


def _experts(raw, names):
    """What says that a model has experts: a key with its value, or the name of its type."""
    sections = [raw, *(each for each in raw.values() if isinstance(each, dict))]
    for key, value in ((key, each[key]) for each in sections for key in each):
        if _EXPERTS_KEY.fullmatch(str(key)) and type(value) is int and value > 0:
            return f"{printable(str(key))} is {value}"
    found = _named_with_experts(raw, names)
    return f"as {printable(found[0])[:80]} says" if found else None


def _named_with_experts(raw, names):
    """The names of a model, of those that say that it has experts."""
    words = [raw.get("model_type"), *names]
    return [str(word) for word in words if word and _WITH_EXPERTS.search(str(word).lower())]


def _alike(raw, where):
    """The families that read all keys of a config, which none knows by its name, but for such as
    are null or false. Of several those that read most of them; of these a llama, or the three that
    read the fewest others."""
    keys = {key for key in raw if not _SAYS_NOTHING.fullmatch(key)}
    needed = {key for key in keys if raw[key] not in (None, False)}
    found = []
    for family in FAMILIES.values():
        watched = Watched(raw)
        try:
            family.read(Fields(watched, where))
        except CheckpointError:
            continue
        if needed <= watched.seen:
            read, others = len(watched.seen & keys), len(watched.seen - keys)
            found.append((-read, others, family.model_type))
    best = [model_type for read, _, model_type in sorted(found) if read == min(found)[0]]
    return [LLAMA.model_type] if LLAMA.model_type in best else best[:3]


class Watched(dict):
    """A config that keeps in mind which keys were asked for."""

    def __init__(self, raw, seen=None):
        super().__init__(raw)
        self.seen = set() if seen is None else seen

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.seen.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __or__(self, changes):
        return Watched({**self, **changes}, self.seen)
