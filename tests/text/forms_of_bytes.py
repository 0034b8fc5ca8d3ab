"""Forms of byte-level tokenizers: Llama 3, DeepSeek and Qwen, and what was made of them.

The small vocabulary has Llama 3's first two added tokens itself.
"""

from tests.sources import UNFOUND
from tests.text.forms import LLAMA, UNCLEANED, bare, form, jinja
from tests.text.reference import named, token
from tests.text.templates import (
    BEGIN,
    CHATML,
    END,
    ENDOFTEXT,
    HEADERS,
    IM,
    LLAMA3,
    USER,
)

FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
QWEN = {
    **UNCLEANED,
    "add_prefix_space": False,
    "bos_token": None,
    "errors": "replace",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
NAMES = ("bos_token", "eos_token", "unk_token")
LLAMA3_ENDS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}
BOUNDS = {"bos_token": named(BEGIN, normalized=True), "eos_token": named(END, normalized=True)}
R1 = {
    **LLAMA,
    **UNCLEANED,
    **BOUNDS,
    "legacy": True,
    "pad_token": named(END, normalized=True),
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizerFast",
    "unk_token": None,
}
FORMAT = ("### End", "### Instruction:", "### Response:")
FIGURES = ("[BIB_REF]", "[/BIB_REF]", "[FIG_REF]", "[/FIG_REF]")
THOUGHTS = ("<thinking>", "</thinking>", "<output>", "</output>")
OPENS, CLOSES = (token(text, special=False) for text in ("<think>", "</think>"))
TOOL_CALL = token("<tool_call>", special=False)
SPACES = tuple(token(" " * n, normalized=True, special=False) for n in (3, 2))
BOXES = ("<|object_ref_start|>", "<|object_ref_end|>")
ONNX = "microsoft/onnxruntime-extensions"


def byte_level(family, source, config, *added, **more):
    """Of byte-level families tokenizer.json and tokenizer_config.json list the same tokens."""
    return form(family, source, "bytes", config, *added, base={}, in_json=added, **more)


def row(text):
    """An object of special_tokens_map.json."""
    return bare({"row": named(text)})["row"]


FORMS = [
    # Llama 3 and what was made of it
    byte_level(
        "Llama 3 base",
        UNFOUND + "remembered of meta-llama/Meta-Llama-3-8B",
        {**FAST, **LLAMA3_ENDS, "model_input_names": ["input_ids"]},
    ),
    byte_level(
        "Llama 3 Instruct",
        "bingjieshengtian/Llama3@c54eb4393815: tokenizer_config.json, special_tokens_map.json",
        {**FAST, **LLAMA3_ENDS, **INPUTS, "chat_template": LLAMA3},
        *HEADERS,
        names={name: row(text) for name, text in LLAMA3_ENDS.items()},
    ),
    byte_level(
        "Llama 3, Korean",
        "wodud6423/Intel-Edge-AI-Project-E-Z-KIOSK@a801c4c29877: llama/tokenizer_config.json",
        {
            **FAST,
            **INPUTS,
            "bos_token": "<|begin_of_text|>",
            "chat_template": LLAMA3,
            "eos_token": "<|eot_id|>",
            "pad_token": "<|end_of_text|>",
        },
        *HEADERS,
    ),
    byte_level(
        "Llama 3.1 Instruct",
        UNFOUND + "remembered of meta-llama/Llama-3.1-8B-Instruct",
        {**FAST, **LLAMA3_ENDS, "eos_token": "<|eot_id|>", "chat_template": LLAMA3},
        "<|finetune_right_pad_id|>",
        *HEADERS,
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    byte_level(
        "Llama 3.1, trained and saved",
        "lablup/torchtitan-scripts-only@f99f61b5ee1c: llama3_tokenizer/tokenizer_config.json",
        {
            **FAST,
            **INPUTS,
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "extra_special_tokens": {},
            "max_length": None,
            "pad_to_multiple_of": None,
            "pad_token": "<|eot_id|>",
            "pad_token_type_id": 0,
            "padding_side": "left",
        },
        *("<|finetune_right_pad_id|>", *HEADERS),
    ),
    byte_level(
        "Llama 3.2, unsloth",
        "Ttdne/Llama-3.2-1B-FineTune-CEH-QA@9d15b73b4bdf: lora_model/tokenizer_config.json",
        {
            **FAST,
            **LLAMA3_ENDS,
            **INPUTS,
            "chat_template": LLAMA3,
            "extra_special_tokens": {},
            "pad_token": "<|finetune_right_pad_id|>",
            "padding_side": "left",
        },
        *("<|finetune_right_pad_id|>", *HEADERS),
    ),
    byte_level(
        "Llama 3, the class without Fast",
        "hoonpak/project-2-personal-alignment@daa1ec91cf7d: llama_tokenizer/tokenizer_config.json",
        {
            **FAST,
            **LLAMA3_ENDS,
            **INPUTS,
            "extra_special_tokens": {},
            "tokenizer_class": "PreTrainedTokenizer",
        },
        *("<|score|>", "<|finetune_right_pad_id|>", *HEADERS),
    ),
    byte_level(
        "Llama 3, fine-tuned elsewhere",
        UNFOUND + "what trainers save of Llama 3",
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
    form(
        "Llama 3 that thinks, names alone",
        "MiMiGame-1/Reflection-Llama-3.1-70B@5921959ee976: special_tokens_map.json",
        "bytes",
        None,
        in_json=("<|eot_id|>", *THOUGHTS),
        names={
            "additional_special_tokens": [row(text) for text in THOUGHTS],
            "bos_token": row("<|begin_of_text|>"),
            "eos_token": row("<|eot_id|>"),
            "pad_token": "<|eot_id|>",
        },
        fails_there=True,
    ),
    form(
        "Llama 3 with references, names alone",
        "Danvin-44/FS8B-finetuned@0f56cf151e62: special_tokens_map.json",
        "bytes",
        None,
        in_json=FIGURES,
        names={
            "additional_special_tokens": list(FIGURES),
            "bos_token": row("<|begin_of_text|>"),
            "eos_token": row("<|end_of_text|>"),
            "pad_token": "<|end_of_text|>",
        },
    ),
    byte_level(
        "Llama 4",
        UNFOUND + "remembered of meta-llama/Llama-4-Scout-17B-16E-Instruct",
        {**FAST, **LLAMA3_ENDS, "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"},
        *("<|header_start|>", "<|header_end|>", "<|eot|>", "<|finetune_right_pad|>"),
    ),
    byte_level(
        "Hermes 3",
        UNFOUND + "remembered of NousResearch/Hermes-3-Llama-3.1-8B",
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
        "Dolphin 3 of Mistral 24B",
        "gsasouza/dolphin3-mistral@7d3886f884b3: tokenizer_config.json",
        {
            **LLAMA,
            **UNCLEANED,
            "add_prefix_space": None,
            "additional_special_tokens": ["[INST]", "[/INST]", "<SPECIAL_20>"],
            "bos_token": "<s>",
            "chat_template": CHATML,
            "eos_token": "<|im_end|>",
            "extra_special_tokens": {},
            "legacy": True,
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
        *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "<SPECIAL_20>", *IM),
    ),
    # DeepSeek
    form(
        "DeepSeek R1",
        f"{ONNX}@109db2a71f18: test/data/deepseek/tokenizer_config.json",
        "bytes",
        R1,
        in_json=(BEGIN, END, token(USER, special=False), OPENS, CLOSES),
    ),
    form(
        "DeepSeek R1 Distill Qwen",
        "Evilcarbon/DeepSeek-R1-Distill-Qwen-32B@d5e5623342de: tokenizer_config.json",
        "bytes",
        {**R1, "add_bos_token": False},
        in_json=(END, token(USER, special=False), BEGIN, OPENS, CLOSES),
    ),
    byte_level(
        "DeepSeek R1 Distill Qwen, saved again",
        "poe-platform/server-bot-quick-start@037f94981063: qwen_tokenizer/tokenizer_config.json",
        {
            **LLAMA,
            **UNCLEANED,
            "add_prefix_space": None,
            "bos_token": BEGIN,
            "eos_token": END,
            "extra_special_tokens": {},
            "legacy": True,
            "pad_token": END,
            "sp_model_kwargs": {},
            "unk_token": None,
        },
        *(END, token(USER, special=False), BEGIN, OPENS, CLOSES, TOOL_CALL),
    ),
    form(
        "DeepSeek LLM",
        UNFOUND + "remembered of deepseek-ai/deepseek-llm-7b-chat",
        "bytes",
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            **BOUNDS,
        },
        in_json=(BEGIN, token(END, normalized=True)),
    ),
    # Qwen
    byte_level(
        "Qwen 2",
        UNFOUND + "remembered of Qwen/Qwen2-0.5B",
        {**QWEN, "eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT},
        *(ENDOFTEXT, *IM),
    ),
    byte_level(
        "Qwen 2 Instruct",
        "YuxuanBai1/Qwen2-Boundless-GUI@5b88ad6358b0: tokenizer_config.json",
        {
            **QWEN,
            "additional_special_tokens": list(IM),
            "chat_template": CHATML,
            "eos_token": IM[1],
            "pad_token": ENDOFTEXT,
            "padding_side": "left",
        },
        *(ENDOFTEXT, *IM),
    ),
    byte_level(
        "Qwen 2.5",
        "hkxIron/GRPO-Zero@df6b17140b1f: qwen_tokenizer/tokenizer_config.json",
        {
            **QWEN,
            "add_bos_token": False,
            "additional_special_tokens": [*IM, *BOXES],
            "chat_template": CHATML,
            "eos_token": ENDOFTEXT,
            "pad_token": ENDOFTEXT,
        },
        *(ENDOFTEXT, *IM, *BOXES, TOOL_CALL),
    ),
    byte_level(
        "Qwen 2.5 Instruct",
        f"{ONNX}@319f8d2c02c4: test/data/qwen2.5/tokenizer_config.json",
        {
            **QWEN,
            "add_bos_token": False,
            "additional_special_tokens": [*IM, *BOXES],
            "chat_template": CHATML,
            "eos_token": IM[1],
            "pad_token": ENDOFTEXT,
        },
        *(ENDOFTEXT, *IM, *BOXES, TOOL_CALL),
    ),
    byte_level(
        "Qwen 3",
        "DMalakhov1/PROJECT_LORA@f8ae53c390ac: tokenizer_config.json, chat_template.jinja",
        {
            **QWEN,
            "add_bos_token": False,
            "additional_special_tokens": [*IM, *BOXES],
            "eos_token": IM[1],
            "extra_special_tokens": {},
            "pad_token": ENDOFTEXT,
        },
        *(ENDOFTEXT, *IM, *BOXES, TOOL_CALL, OPENS, CLOSES),
        **jinja(CHATML),
    ),
    byte_level(
        "NuExtract, of Qwen 2",
        "Luan-da-Silva/nu_extract@3b3f7d8359d7: tokenizer_config.json",
        {
            **QWEN,
            "additional_special_tokens": list(IM),
            "chat_template": CHATML,
            "eos_token": "<|end-output|>",
            "pad_token": ENDOFTEXT,
        },
        *(ENDOFTEXT, *IM, token("<|end-output|>", normalized=True, special=False)),
    ),
]
