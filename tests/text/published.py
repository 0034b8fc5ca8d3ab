"""Forms in which makers publish a tokenizer: the side files' shape, with a small vocabulary.

A row says which family publishes the form. Ids of added tokens follow the small vocabulary, and
long lists of reserved tokens are cut. Keys, classes, kinds of values and templates are as
published.
"""

from dataclasses import dataclass, field

from tests.text.reference import named, token
from tests.text.templates import (
    BEGIN,
    CHATML,
    END,
    ENDOFTEXT,
    EOT,
    GRANITE,
    HEADERS,
    IM,
    LLAMA2,
    LLAMA3,
    OPENCHAT,
    USER,
    VICUNA,
    ZEPHYR,
)

OBJECTS = {"bos_token": named("<s>"), "eos_token": named("</s>"), "unk_token": named("<unk>")}
TEXTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MAP_OBJECTS = {
    name: {key: value for key, value in row.items() if key != "__type"}
    for name, row in OBJECTS.items()
}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
NEW_LLAMA = {**LLAMA, "legacy": False, "clean_up_tokenization_spaces": False, "pad_token": None}
MISTRAL = {**LLAMA, "legacy": True, "clean_up_tokenization_spaces": False, **TEXTS}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "bos_token": None}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
SENTENCE = {0: token("<unk>"), 1: token("<s>"), 2: token("</s>")}
LLAMA3_ENDS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


@dataclass(frozen=True)
class Form:
    """vocabulary: a name of `reference`. config: tokenizer_config.json, whose added_tokens_decoder
    is `base`, then `added` from the first free id on; none where `base` is None.
    in_json: tokens that tokenizer.json has itself. files: the others."""

    family: str
    vocabulary: str
    config: dict | None
    added: tuple = ()
    base: dict | None = None
    in_json: tuple = ()
    files: dict = field(default_factory=dict)


def form(family, vocabulary, config, *added, base=None, in_json=(), **files):
    rows = tuple(token(each) if isinstance(each, str) else each for each in added)
    named_files = {
        {"names": "special_tokens_map.json", "tokens": "added_tokens.json"}.get(name, name): value
        for name, value in files.items()
    }
    return Form(family, vocabulary, config, rows, base, in_json, named_files)


def byte_level(family, config, *added, **more):
    """Of byte-level families tokenizer.json and tokenizer_config.json list the same tokens."""
    return form(family, "bytes", config, *added, base={}, in_json=added, **more)


def jinja(source, name="chat_template.jinja"):
    return {name: source.encode()}


FORMS = [
    # Llama 1 and 2, and what was made of them
    form("LLaMA, first conversion", "json", {**TEXTS, "tokenizer_class": "LLaMATokenizer"}),
    form(
        "LLaMA, empty names",
        "bpe",
        {
            "bos_token": "",
            "eos_token": "",
            "tokenizer_class": "LLaMATokenizer",
            "unk_token": "<unk>",
        },
    ),
    form("Llama 2 base", "json and model", {**NEW_LLAMA, **OBJECTS}, names=MAP_OBJECTS),
    form(
        "Llama 2 chat",
        "json and model",
        {**NEW_LLAMA, **OBJECTS, "chat_template": LLAMA2},
        names=MAP_OBJECTS,
    ),
    form("Llama 2, slow files alone", "bpe", {**NEW_LLAMA, **OBJECTS}, names=MAP_OBJECTS),
    form("OpenLLaMA", "bpe, normalized", {**LLAMA, **OBJECTS, "sp_model_kwargs": {}}),
    form("Vicuna 1.3", "bpe", {**LLAMA, **OBJECTS, "pad_token": None}, names=MAP_OBJECTS),
    form(
        "Vicuna 1.5",
        "bpe",
        {**NEW_LLAMA, **OBJECTS, "chat_template": VICUNA},
        names={**MAP_OBJECTS, "pad_token": "<unk>"},
    ),
    form(
        "Alpaca",
        "bpe",
        {"tokenizer_class": "LlamaTokenizer", "model_max_length": 512, **OBJECTS},
        names={**TEXTS, "pad_token": "[PAD]"},
        tokens="[PAD]",
    ),
    form("WizardLM", "bpe", {**LLAMA, **OBJECTS}, names={**MAP_OBJECTS}, tokens="[PAD]"),
    form(
        "Nous Hermes Llama 2",
        "bpe",
        {**NEW_LLAMA, **OBJECTS},
        names={**MAP_OBJECTS, "pad_token": "<pad>"},
        tokens="<pad>",
    ),
    form(
        "Dolphin",
        "bpe",
        {**NEW_LLAMA, **TEXTS, "eos_token": "<|im_end|>", "chat_template": CHATML},
        names={**MAP_OBJECTS, "eos_token": "<|im_end|>"},
        tokens="<|im_end|> <|im_start|>",
    ),
    form(
        "Orca 2",
        "bpe",
        {**LLAMA, **OBJECTS, "legacy": True},
        names={**MAP_OBJECTS, "pad_token": "[PAD]"},
        tokens="[PAD] <|im_start|> <|im_end|>",
    ),
    form(
        "TinyLlama chat",
        "json and model",
        {**NEW_LLAMA, **TEXTS, "pad_token": "</s>", "chat_template": ZEPHYR},
        base=SENTENCE,
    ),
    form(
        "CodeLlama",
        "json and model",
        {
            **TEXTS,
            "tokenizer_class": "CodeLlamaTokenizer",
            "prefix_token": "▁<PRE>",
            "middle_token": "▁<MID>",
            "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>",
            "fill_token": "<FILL_ME>",
            "suffix_first": False,
        },
        *("▁<SUF>", "▁<PRE>", "▁<MID>", "▁<EOT>"),
        base=SENTENCE,
    ),
    form("ELYZA", "json and model", {**NEW_LLAMA, **OBJECTS, "chat_template": LLAMA2}),
    form(
        "LLaVA",
        "json and model",
        {
            **NEW_LLAMA,
            **TEXTS,
            "pad_token": "<pad>",
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "processor_class": "LlavaProcessor",
        },
        token("<image>", special=False),
        "<pad>",
        base=SENTENCE,
    ),
    form("MobileLLM", "bpe", {**LLAMA, **TEXTS, "use_fast": False, "legacy": False}),
    form("Yi", "json and model", {**LLAMA, **TEXTS, "add_bos_token": False}, base=SENTENCE),
    form(
        "Yi chat",
        "json and model",
        {
            **LLAMA,
            "add_bos_token": False,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "legacy": True,
            "chat_template": CHATML,
        },
        "<|startoftext|>",
        *IM,
        base=SENTENCE,
        names={"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
    ),
    form(
        "SOLAR",
        "json and model",
        {**NEW_LLAMA, **TEXTS, "additional_special_tokens": ["<unk>", "<s>", "</s>"]},
        base=SENTENCE,
    ),
    # Mistral and what was made of it
    form("Mistral 7B v0.1", "json and model", {**MISTRAL, "additional_special_tokens": []}),
    form(
        "Mistral 7B Instruct v0.2",
        "json and model",
        {**MISTRAL, "additional_special_tokens": [], "chat_template": LLAMA2},
        base=SENTENCE,
    ),
    form(
        "Mistral 7B v0.3",
        "json and model",
        {**MISTRAL, "legacy": False, "add_prefix_space": True},
        *("[INST]", "[/INST]", "[TOOL_CALLS]"),
        base=SENTENCE,
    ),
    form(
        "Zephyr",
        "json and model",
        {
            **MISTRAL,
            "pad_token": "</s>",
            "additional_special_tokens": ["<unk>", "<s>", "</s>"],
            "truncation_side": "left",
            "chat_template": ZEPHYR,
        },
        base=SENTENCE,
    ),
    form(
        "OpenHermes 2.5",
        "json and model",
        {**MISTRAL, "eos_token": "<|im_end|>", "chat_template": CHATML, "use_fast": True},
        token("<|im_end|>"),
        token("<|im_start|>", special=False),
        base=SENTENCE,
        tokens="<|im_end|> <|im_start|>",
    ),
    form(
        "OpenChat 3.5",
        "json and model",
        {**MISTRAL, "eos_token": "<|end_of_turn|>", "chat_template": OPENCHAT},
        "<|end_of_turn|>",
        token("<|pad_0|>"),
        base=SENTENCE,
    ),
    form(
        "Phi-3 mini",
        "json and model",
        {**NEW_LLAMA, **TEXTS, "eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT},
        ENDOFTEXT,
        *(token(text, rstrip=True) for text in ("<|assistant|>", "<|user|>", "<|end|>")),
        base={**SENTENCE, 2: token("</s>", rstrip=True, special=False)},
    ),
    form(
        "EuroLLM",
        "json and model",
        {**LLAMA, **TEXTS, "legacy": True, "add_prefix_space": False},
        *IM,
        base=SENTENCE,
    ),
    form(
        "InternLM, as Llama",
        "bpe, normalized",
        {**LLAMA, **TEXTS, "pad_token": "</s>", "decode_with_prefix_space": False},
    ),
    # Llama 3 and what was made of it
    byte_level("Llama 3 base", {**FAST, **LLAMA3_ENDS, "model_input_names": ["input_ids"]}),
    byte_level(
        "Llama 3 Instruct",
        {**FAST, **LLAMA3_ENDS, "eos_token": "<|eot_id|>", "chat_template": LLAMA3},
        *HEADERS,
        names={**LLAMA3_ENDS, "eos_token": "<|eot_id|>"},
    ),
    byte_level(
        "Llama 3.1 Instruct",
        {**FAST, **LLAMA3_ENDS, "eos_token": "<|eot_id|>", "chat_template": LLAMA3},
        "<|finetune_right_pad_id|>",
        *HEADERS,
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    byte_level(
        "Llama 3, fine-tuned elsewhere",
        {
            **FAST,
            **LLAMA3_ENDS,
            "pad_token": "<|finetune_right_pad_id|>",
            "unk_token": None,
            "padding_side": "left",
            "add_bos_token": True,
        },
        "<|finetune_right_pad_id|>",
    ),
    byte_level(
        "Llama 4",
        {**FAST, **LLAMA3_ENDS, "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"},
        *("<|header_start|>", "<|header_end|>", "<|eot|>", "<|finetune_right_pad|>"),
    ),
    byte_level(
        "Hermes 3",
        {
            **FAST,
            **LLAMA3_ENDS,
            "eos_token": "<|im_end|>",
            "chat_template": [
                {"name": "default", "template": CHATML},
                {"name": "tool_use", "template": LLAMA3},
            ],
        },
        *IM,
    ),
    byte_level(
        "DeepSeek R1 Distill Llama",
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": named(BEGIN, normalized=True),
            "eos_token": named(END, normalized=True),
            "legacy": True,
            "pad_token": named(END, normalized=True),
            "unk_token": None,
        },
        *(BEGIN, END),
        token(USER, special=False),
    ),
    form(
        "DeepSeek LLM",
        "bytes",
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": named(BEGIN, normalized=True),
            "eos_token": named(END, normalized=True),
        },
        in_json=(BEGIN, token(END, normalized=True)),
    ),
    # Other byte-level families
    byte_level("SmolLM", {**GPT2, **dict.fromkeys(TEXTS, ENDOFTEXT)}, ENDOFTEXT, *IM),
    byte_level(
        "SmolLM2 Instruct",
        {
            **GPT2,
            "additional_special_tokens": list(IM),
            "bos_token": IM[0],
            "eos_token": IM[1],
            "pad_token": IM[1],
            "unk_token": ENDOFTEXT,
            "chat_template": CHATML,
        },
        ENDOFTEXT,
        *IM,
    ),
    byte_level(
        "SmolLM3",
        {**FAST, "bos_token": None, "eos_token": IM[1], "pad_token": IM[1], "fast": False},
        *IM,
        token("<think>", special=False),
        **jinja(CHATML),
    ),
    byte_level(
        "Granite",
        {
            **GPT2,
            "additional_special_tokens": ["<|start_of_role|>", "<|end_of_role|>"],
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), ENDOFTEXT),
            "chat_template": GRANITE,
        },
        *(ENDOFTEXT, "<|start_of_role|>", "<|end_of_role|>"),
    ),
    byte_level(
        "Falcon 3",
        {**FAST, "eos_token": ENDOFTEXT, "additional_special_tokens": [">>TITLE<<", ">>PREFIX<<"]},
        *(">>TITLE<<", ">>PREFIX<<", ENDOFTEXT),
    ),
    byte_level(
        "OLMo",
        {
            "tokenizer_class": "GPTNeoXTokenizerFast",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": ENDOFTEXT,
            "pad_token": "<|padding|>",
            "unk_token": None,
        },
        ENDOFTEXT,
        "<|padding|>",
        token("  ", normalized=True, special=False),
    ),
    byte_level(
        "Pythia",
        {"tokenizer_class": "GPTNeoXTokenizer", **dict.fromkeys(TEXTS, ENDOFTEXT)},
        ENDOFTEXT,
    ),
    byte_level("Qwen 2", {**QWEN, "eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT}, ENDOFTEXT, *IM),
    byte_level(
        "Qwen 2.5 Instruct",
        {
            **QWEN,
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": list(IM),
            "eos_token": IM[1],
            "pad_token": ENDOFTEXT,
            "split_special_tokens": False,
            "unk_token": None,
            "chat_template": CHATML,
        },
        ENDOFTEXT,
        *IM,
        token("<tool_call>", special=False),
    ),
    byte_level(
        "Qwen 3",
        {**QWEN, "additional_special_tokens": list(IM), "eos_token": IM[1], "unk_token": None},
        ENDOFTEXT,
        *IM,
        token("<think>", special=False),
        **jinja(CHATML),
    ),
    byte_level(
        "Command R",
        {
            **FAST,
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "chat_template": [{"name": "default", "template": EOT}],
            "eot_token": "<|END_OF_TURN_TOKEN|>",
        },
        *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    ),
    form(
        "Transformers 5",
        "bytes",
        {
            "backend": "tokenizers",
            "tokenizer_class": "TokenizersBackend",
            "is_local": False,
            "model_specific_special_tokens": {},
            "extra_special_tokens": ["<|im_start|>"],
            "eot_token": "<|im_end|>",
            **LLAMA3_ENDS,
        },
        in_json=IM,
        **jinja(EOT),
        **jinja(CHATML, "additional_chat_templates/tool_use.jinja"),
    ),
    # Other forms of the vocabulary
    form(
        "LLM-jp",
        "unigram, bytes",
        {"tokenizer_class": "PreTrainedTokenizerFast", **TEXTS, "eod_token": "</s>"},
    ),
    form("Unigram with cleaning", "unigram", {**FAST, **TEXTS}, names=TEXTS),
    form(
        "Moonlight, ranks of tiktoken",
        "tiktoken",
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "add_bos_token": True},
        *("[BOS]", "[EOS]", "<|im_end|>", token("[UNK]")),
        base={},
    ),
    form("No settings beside tokenizer.json", "json", None),
    form("Names alone", "json", None, names={**MAP_OBJECTS, "pad_token": "<pad>"}),
    form(
        "A template that reads a name of its own",
        "bytes",
        {**FAST, **LLAMA3_ENDS, "eot_token": named("<|eot|>")},
        **jinja(EOT),
    ),
]
