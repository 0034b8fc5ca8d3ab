"""The dense families: each a tokenizer in the shape in which its makers publish it.

Settings are remembered of the families' tokenizer_config.json, cut to the keys that a tokenizer
reads; the forms beside this file (forms_of_*) say which of them were found in public files.
"""

from tests.text.built import (
    CL100K,
    DIGITS,
    NFC,
    QWEN2,
    SPACES_TO_PIECES,
    STRIP,
    TEKKEN,
    TO_TEXT,
    Built,
    begins_with,
    byte_level,
    bytes_of,
    pieces,
    rows,
    sequence,
    split,
)
from tests.text.reference import named, token


def end(text, **more):
    return {"bos_token": text, "eos_token": text, "unk_token": text, **more}


GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
GEMMA_NAMES = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
GEMMA_SET = {
    "add_bos_token": True,
    "add_eos_token": False,
    **GEMMA_NAMES,
    "clean_up_tokenization_spaces": False,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "GemmaTokenizer",
    "use_default_system_prompt": False,
}
TURNS = rows("<start_of_turn>", "<end_of_turn>")
RUNS = rows("\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<h1>", special=False)
GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
GEMMA_SPLIT = {**GEMMA_SPLIT, "invert": False}
LLAMA = ("<unk>", "<s>", "</s>")
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PREPEND = sequence({"type": "Prepend", "prepend": "▁"}, SPACES_TO_PIECES, key="normalizers")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
IM = ("<|im_start|>", "<|im_end|>")
ENDOFTEXT = "<|endoftext|>"
COHERE = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>")
COHERE_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>")
COHERE_SET = {
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": False,
    "bos_token": "<BOS_TOKEN>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|END_OF_TURN_TOKEN|>",
    "legacy": True,
    "pad_token": "<PAD>",
    "tokenizer_class": "CohereTokenizer",
    "unk_token": None,
}
THINK = rows("<think>", "</think>", "<tool_call>", special=False)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *GLM_ROLES)
PHI3_ROLES = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
HARMONY = ("<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")
FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")

FAMILIES = {
    "gemma 1": pieces(
        *("gemma", GEMMA, GEMMA_SET),
        *TURNS,
        *RUNS,
        normalizer=SPACES_TO_PIECES,
        strip=False,
        post_processor=begins_with("<bos>"),
    ),
    "gemma 3": pieces(
        "gemma3_text",
        GEMMA,
        {
            **GEMMA_SET,
            "boi_token": "<start_of_image>",
            "extra_special_tokens": {"boi_token": "<start_of_image>"},
            "processor_class": "Gemma3Processor",
            "sp_model_kwargs": None,
        },
        *TURNS,
        *rows("<start_of_image>"),
        *RUNS,
        normalizer=SPACES_TO_PIECES,
        strip=False,
        pre_tokenizer=GEMMA_SPLIT,
        post_processor=begins_with("<bos>"),
    ),
    "gemma 4": pieces(
        "gemma4_text",
        GEMMA,
        {**GEMMA_NAMES, "backend": "tokenizers", "tokenizer_class": "GemmaTokenizer"},
        *rows("<|turn>", "<turn|>", "<|think|>"),
        normalizer=SPACES_TO_PIECES,
        strip=False,
        pre_tokenizer=GEMMA_SPLIT,
        post_processor=begins_with("<bos>"),
    ),
    "phi 3 mini": pieces(
        "phi3",
        LLAMA,
        {
            **LLAMA_NAMES,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": ENDOFTEXT,
            "legacy": False,
            "pad_token": ENDOFTEXT,
            "tokenizer_class": "LlamaTokenizer",
        },
        token("</s>", rstrip=True, special=False),
        *rows(ENDOFTEXT),
        *rows(*PHI3_ROLES, "<|placeholder1|>", rstrip=True),
        normalizer=PREPEND,
    ),
    "phi 4": bytes_of(
        "phi3",
        (),
        {
            "add_prefix_space": False,
            **end(ENDOFTEXT, eos_token="<|im_end|>", pad_token="<|dummy_85|>"),
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "GPT2Tokenizer",
        },
        *rows(ENDOFTEXT, *IM, "<|im_sep|>", "<|dummy_85|>", lstrip=True, rstrip=True),
        words=split(CL100K),
    ),
    "phi 2": bytes_of(
        "phi",
        (),
        {
            **end(ENDOFTEXT),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": True,
            "return_token_type_ids": False,
            "tokenizer_class": "CodeGenTokenizer",
        },
        *rows(ENDOFTEXT, normalized=True),
        *rows("    ", "  ", "\t\t", special=False, normalized=True),
        words=byte_level(),
        post={**byte_level(space=True), "trim_offsets": False},
    ),
    "command r": bytes_of(
        *("cohere", COHERE, COHERE_SET),
        *rows(*COHERE_TURNS),
        words=sequence(DIGITS, byte_level()),
        normalizer=NFC,
        post=begins_with("<BOS_TOKEN>"),
    ),
    "command r7b": bytes_of(
        "cohere2",
        COHERE,
        {**COHERE_SET, "unk_token": named("<UNK>"), "extra_special_tokens": {}},
        *rows(*COHERE_TURNS),
        *rows("<|START_THINKING|>", "<|END_THINKING|>", special=False, normalized=True),
        words=sequence(DIGITS, byte_level()),
        normalizer=NFC,
        post=begins_with("<BOS_TOKEN>"),
    ),
    "aya, general class": bytes_of(
        "cohere",
        COHERE,
        {**COHERE_SET, **FAST},
        *rows(*COHERE_TURNS),
        words=split(CL100K),
        normalizer=NFC,
        post=begins_with("<BOS_TOKEN>"),
    ),
    "qwen 2": bytes_of(
        "qwen2",
        (),
        {
            "add_prefix_space": False,
            "additional_special_tokens": list(IM),
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "pad_token": ENDOFTEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        *rows(ENDOFTEXT, *IM),
        words=split(QWEN2),
        normalizer=NFC,
        post=byte_level(use_regex=False),
    ),
    "qwen 3": bytes_of(
        "qwen3",
        (),
        {
            "add_bos_token": False,
            "additional_special_tokens": list(IM),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": ENDOFTEXT,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        *rows(ENDOFTEXT, *IM),
        *THINK,
        words=split(QWEN2),
        normalizer=NFC,
        post=byte_level(use_regex=False),
    ),
    "a llama class on qwen 2": bytes_of(
        "qwen2",
        (),
        {
            "add_bos_token": True,
            "bos_token": named("<|begin|>"),
            "eos_token": named("<|end|>"),
            "pad_token": named("<|end|>"),
            "legacy": True,
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
        },
        *rows("<|begin|>", "<|end|>"),
        *THINK,
        words=split(CL100K),
        post=begins_with("<|begin|>"),
    ),
    "glm 4": bytes_of(
        "glm4",
        (),
        {
            **FAST,
            "additional_special_tokens": list(GLM),
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "eos_token": ENDOFTEXT,
            "pad_token": ENDOFTEXT,
            "remove_space": False,
        },
        *rows(*GLM),
        words=split(CL100K),
        post=sequence(
            byte_level(use_regex=False), begins_with("[gMASK]", "<sop>"), key="processors"
        ),
    ),
    "glm 4, a class of its own": bytes_of(
        "glm",
        (),
        {
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
            "eos_token": ENDOFTEXT,
            "pad_token": ENDOFTEXT,
            "tokenizer_class": "ChatGLM4Tokenizer",
        },
        *rows(*GLM),
        words=split(CL100K),
    ),
    "starcoder 2": bytes_of(
        "starcoder2",
        (ENDOFTEXT, *FIM),
        {
            **end(ENDOFTEXT),
            "add_prefix_space": False,
            "additional_special_tokens": [ENDOFTEXT, *FIM],
            "clean_up_tokenization_spaces": True,
            "tokenizer_class": "GPT2Tokenizer",
            "vocab_size": 49152,
        },
        words=sequence(DIGITS, byte_level()),
    ),
    "granite 3": bytes_of(
        "granite",
        (END_OF_TEXT := "<|end_of_text|>", *FIM),
        {
            **end(END_OF_TEXT),
            "add_bos_token": False,
            "add_prefix_space": False,
            "tokenizer_class": "GPT2Tokenizer",
        },
        *rows("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        words=sequence(DIGITS, byte_level()),
    ),
    "olmo": bytes_of(
        "olmo",
        ("<|endoftext|>", "<|padding|>"),
        {
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": ENDOFTEXT,
            "pad_token": "<|padding|>",
            "tokenizer_class": "GPTNeoXTokenizer",
            "unk_token": None,
        },
        *rows("  ", "   ", special=False, normalized=True),
        words=byte_level(),
        normalizer=NFC,
    ),
    "olmo 2": bytes_of(
        "olmo2",
        (),
        {**end(ENDOFTEXT), "pad_token": "<|pad|>", "tokenizer_class": "GPT2Tokenizer"},
        *rows(ENDOFTEXT, "<|pad|>"),
        words=split(CL100K),
    ),
    "exaone 4": bytes_of(
        "exaone4",
        ("[PAD]", "[BOS]", "[EOS]", "[UNK]"),
        {
            "bos_token": "[BOS]",
            "eos_token": "[|endofturn|]",
            "pad_token": "[PAD]",
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "[UNK]",
        },
        *rows("[|endofturn|]", "[|user|]"),
        *THINK,
        words=split(CL100K),
        normalizer=NFC,
    ),
    "mistral 7b v0.3": pieces(
        "mistral",
        LLAMA,
        {
            **LLAMA_NAMES,
            "add_bos_token": True,
            "add_prefix_space": True,
            "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        },
        *rows("[INST]", "[/INST]", "[TOOL_CALLS]"),
        normalizer=None,
        pre_tokenizer=METASPACE,
        post_processor=begins_with("<s>"),
    ),
    "mistral, converted from tekken": bytes_of(
        "mistral",
        LLAMA,
        {
            **LLAMA_NAMES,
            "add_bos_token": True,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "tokenizer_class": "LlamaTokenizerFast",
        },
        *rows("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "<pad>"),
        words=split(TEKKEN),
        post=begins_with("<s>"),
    ),
    "ministral 3": bytes_of(
        "ministral3",
        LLAMA,
        {**LLAMA_NAMES, "backend": "tokenizers", "tokenizer_class": "TokenizersBackend"},
        *rows("[THINK]", "[/THINK]"),
        words=split(TEKKEN),
        post=begins_with("<s>"),
    ),
    "smollm 3": bytes_of(
        "smollm3",
        (),
        {
            **FAST,
            "bos_token": None,
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
        },
        *rows("<|begin_of_text|>", *IM),
        *THINK,
        words=split(CL100K),
        post=begins_with("<|begin_of_text|>"),
    ),
    "ernie 4.5": pieces(
        "ernie4_5",
        LLAMA,
        {
            **LLAMA_NAMES,
            "auto_map": {"AutoTokenizer": ["tokenization_ernie4_5.Ernie4_5_Tokenizer", None]},
            "cls_token": "<|begin_of_sentence|>",
            "sep_token": "<|end_of_sentence|>",
            "tokenizer_class": "Ernie4_5_Tokenizer",
        },
        *rows("<|begin_of_sentence|>", "<|end_of_sentence|>"),
        normalizer=SPACES_TO_PIECES,
        strip=False,
    ),
    "arcee": bytes_of(
        "arcee",
        (),
        {**FAST, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        *rows("<|begin_of_text|>", "<|end_of_text|>"),
        words=split(CL100K),
        post=begins_with("<|begin_of_text|>"),
    ),
    "helium": Built(
        "helium",
        LLAMA,
        {
            "normalizer": SPACES_TO_PIECES,
            "pre_tokenizer": METASPACE | {"split": True},
            "decoder": sequence(*TO_TEXT, STRIP, key="decoders"),
            "post_processor": begins_with("<s>"),
        },
        {**FAST, **LLAMA_NAMES, "clean_up_tokenization_spaces": True},
        of_bytes=False,
        unigram=True,
    ),
    "stable lm": bytes_of(
        "stablelm",
        (ENDOFTEXT,),
        {**end(ENDOFTEXT), "add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"},
        *rows("  ", "   ", special=False, normalized=True),
        words=split(CL100K),
    ),
    "nemotron": bytes_of(
        "nemotron",
        ("<unk>", "<s>", "</s>"),
        {**FAST, "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": True},
        *rows("<extra_id_0>", "<extra_id_1>"),
        words=split(CL100K),
    ),
    "gpt-oss": bytes_of(
        "gpt_oss",
        (),
        {
            **FAST,
            "bos_token": "<|startoftext|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|return|>",
            "pad_token": ENDOFTEXT,
        },
        *rows("<|startoftext|>", ENDOFTEXT, "<|return|>", *HARMONY),
        words=split(TEKKEN),
    ),
    "seed oss": bytes_of(
        "seed_oss",
        ("<seed:bos>", "<seed:pad>", "<seed:eos>"),
        {**FAST, "bos_token": "<seed:bos>", "eos_token": "<seed:eos>", "pad_token": "<seed:pad>"},
        *rows("<seed:think>", "</seed:think>", special=False),
        words=split(CL100K),
    ),
}
