"""Which tokenizer class a model has, where its files and its kind of model say different things.

transformers (5.24) has a class for many kinds of models. For some of them the class that the files
name is known to be wrong, and for others the file is taken as it is, whatever class is named.
"""

from __future__ import annotations

FILE_AS_IT_IS = "TokenizersBackend"  # no class of its own: tokenizer.json says everything
# model_type of config.json -> the class that transformers has for it. Others have none.
CLASS_OF = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"
    ),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), "GemmaTokenizer"
    ),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(
        ("ernie4_5", "glm", "glm4", "granite", "ministral", "ministral3", "mistral", "mistral3"),
        FILE_AS_IT_IS,
    ),
    **dict.fromkeys(
        ("ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "granitemoe", "minimax_m2", "mixtral"),
        FILE_AS_IT_IS,
    ),
    "phimoe": FILE_AS_IT_IS,
    **dict.fromkeys(("nemotron", "olmo2", "olmo3", "phi3", "stablelm"), FILE_AS_IT_IS),
}
# Where the published files often name a wrong class, so that the one above counts.
OVERRULED = frozenset(
    (
        *("ernie4_5", "ernie4_5_moe", "minimax_m2", "nemotron", "phi3", "phimoe"),
        *("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
    )
)


def class_of_model(model_type: str, named: str, *, has_code: bool) -> str:
    """The name of the class that counts; one that is not known stands for the file as it is.

    `named`: the class in the files, without "Fast", or "". `has_code`: the files name Python code
    for the tokenizer (auto_map). It is never run; transformers runs it only if asked to.
    """
    own = CLASS_OF.get(model_type)
    if not named:
        return own or FILE_AS_IT_IS
    counts = own == FILE_AS_IT_IS or model_type in OVERRULED
    return own if counts and not has_code else named
