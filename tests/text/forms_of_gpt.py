"""Forms of byte-level tokenizers after GPT-2's and NeoX's, and those that transformers 5 saves."""

from tests.sources import UNFOUND
from tests.text.forms import UNCLEANED, form, jinja
from tests.text.forms_of_bytes import (
    BOXES,
    CLOSES,
    FAST,
    FORMAT,
    GPT2,
    INPUTS,
    LLAMA3_ENDS,
    NAMES,
    ONNX,
    OPENS,
    QWEN,
    SPACES,
    byte_level,
    row,
)
from tests.text.reference import named, token
from tests.text.templates import CHATML, ENDOFTEXT, EOT, GRANITE, IM

ALL_END = dict.fromkeys(NAMES, ENDOFTEXT)
END_OF_TEXT = "<|end_of_text|>"
ROLES = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
REPOSITORY = ("<repo_name>", "<file_sep>")
DUMMY = tuple(
    token(text, lstrip=True, rstrip=True)
    for text in (ENDOFTEXT, "<|fim_prefix|>", *IM, "<|im_sep|>", "<|dummy_85|>")
)
SOUNDS = {"audio_bos_token": "<|audio_start|>", "image_token": "<|image_pad|>"}
V5 = {"backend": "tokenizers", "is_local": True, "local_files_only": False}

FORMS = [
    byte_level(
        "SmolLM",
        UNFOUND + "remembered of HuggingFaceTB/SmolLM-135M",
        {**GPT2, **ALL_END},
        *(ENDOFTEXT, *IM),
    ),
    byte_level(
        "SmolLM with a token for padding",
        "Jatin-Mehra119/Plagiarism-detector-using-smolLM-@cc47e7b882d3: "
        "model/tokenizer_config.json",
        {
            **GPT2,
            **UNCLEANED,
            **ALL_END,
            "additional_special_tokens": [ENDOFTEXT, *IM, *REPOSITORY],
            "pad_token": "[PAD]",
            "vocab_size": 49152,
        },
        *(ENDOFTEXT, *IM, *REPOSITORY, "[PAD]"),
    ),
    byte_level(
        "SmolLM2",
        "hashvibe007/smollm2@fceb8da945a9: final_model/tokenizer_config.json",
        {
            **GPT2,
            **UNCLEANED,
            **ALL_END,
            "additional_special_tokens": [ENDOFTEXT, *IM, *REPOSITORY],
            "chat_template": CHATML,
            "extra_special_tokens": {},
            "pad_token": ENDOFTEXT,
            "vocab_size": 49152,
        },
        *(ENDOFTEXT, *IM, *REPOSITORY),
    ),
    byte_level(
        "SmolLM2 Instruct",
        UNFOUND + "remembered of HuggingFaceTB/SmolLM2-1.7B-Instruct",
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
    form(
        "SmolLM2 Instruct, names alone",
        "eiszazel/SmolLM2-135M-Instruct-onnx-ryzenai-1.7-hybrid@ded8f825d45f: "
        "special_tokens_map.json",
        "bytes",
        None,
        in_json=(ENDOFTEXT, *IM),
        names={
            "additional_special_tokens": list(IM),
            "bos_token": row(IM[0]),
            "eos_token": row(IM[1]),
            "pad_token": row(IM[1]),
            "unk_token": row(ENDOFTEXT),
        },
    ),
    byte_level(
        "SmolLM3",
        f"{ONNX}@e76b9a2d4486: test/data/v5/smollm3/tokenizer_config.json",
        {
            **FAST,
            **INPUTS,
            "bos_token": None,
            "eos_token": IM[1],
            "extra_special_tokens": {},
            "fast": False,
            "pad_token": IM[1],
        },
        *(OPENS, CLOSES, *IM),
        **jinja(CHATML),
    ),
    byte_level(
        "MiniMind 2, the class without Fast",
        "y-shi23/minimind@56acb305251a: MiniMind2/tokenizer_config.json",
        {
            **UNCLEANED,
            **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), False),
            "additional_special_tokens": [],
            "bos_token": IM[0],
            "chat_template": CHATML,
            "eos_token": IM[1],
            "extra_special_tokens": {},
            "legacy": True,
            "pad_token": ENDOFTEXT,
            "sp_model_kwargs": {},
            "tokenizer_class": "PreTrainedTokenizer",
            "unk_token": ENDOFTEXT,
        },
        *(ENDOFTEXT, *IM),
    ),
    byte_level(
        "GPT-2, its end normalized",
        "GriffinDevelopments/TraXLMistraLForCausalLM@3673a442b869: tokenizer_config.json",
        {**GPT2, **ALL_END, "clean_up_tokenization_spaces": True, "pad_token": ENDOFTEXT},
        token(ENDOFTEXT, normalized=True),
    ),
    byte_level(
        "Granite 3.1",
        "jeremieconte/granite-3.1-1b-a400m-instruct@0a854d48947b: tokenizer_config.json",
        {
            **GPT2,
            **dict.fromkeys((*NAMES, "pad_token"), END_OF_TEXT),
            "add_bos_token": False,
            "additional_special_tokens": list(ROLES),
            "chat_template": GRANITE,
            "clean_up_tokenization_spaces": True,
            "errors": "replace",
            "extra_special_tokens": {},
            "padding_side": "left",
            "vocab_size": 49152,
        },
        *("<fim_prefix>", "<reponame>", *ROLES),
    ),
    byte_level(
        "Phi-4",
        f"{ONNX}@52e1ef5dd14e: test/data/phi-4-base/tokenizer_config.json",
        {
            **GPT2,
            **UNCLEANED,
            "bos_token": ENDOFTEXT,
            "chat_template": CHATML,
            "eos_token": IM[1],
            "pad_token": "<|dummy_85|>",
        },
        *DUMMY,
    ),
    byte_level(
        "Falcon 40B",
        "Decentralised-AI/falcon-40b@6064d605bbbd: tokenizer_config.json",
        {
            "add_prefix_space": False,
            "eos_token": ENDOFTEXT,
            "special_tokens_map_file": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        ENDOFTEXT,
    ),
    byte_level(
        "Falcon 3",
        UNFOUND + "remembered of tiiuae/Falcon3-7B-Base",
        {**FAST, "eos_token": ENDOFTEXT, "additional_special_tokens": [">>TITLE<<", ">>PREFIX<<"]},
        *(">>TITLE<<", ">>PREFIX<<", ENDOFTEXT),
    ),
    byte_level(
        "OLMo",
        UNFOUND + "remembered of allenai/OLMo-1B-hf",
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
        "Avent-IQ/pythia-410m@a7ee1489ecc1: tokenizer_config.json",
        {
            **UNCLEANED,
            **ALL_END,
            **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), False),
            "extra_special_tokens": {},
            "pad_token": "[PAD]",
            "tokenizer_class": "GPTNeoXTokenizer",
        },
        *(ENDOFTEXT, "<|padding|>", *SPACES, "[PAD]"),
    ),
    byte_level(
        "Dolly 2",
        "KushagraIsTaken/Finetuning_Dolly-v2-3b_on_Alpaca_Dataset@0c84c0c22232: "
        "merged_model/tokenizer_config.json; gaurisharan/SFT-Dolly@13c6ffdfd42a: "
        "special_tokens_map.json",
        {
            **ALL_END,
            **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), False),
            "additional_special_tokens": list(FORMAT),
            "clean_up_tokenization_spaces": True,
            "pad_token": ENDOFTEXT,
            "tokenizer_class": "GPTNeoXTokenizer",
        },
        *(ENDOFTEXT, "<|padding|>", *SPACES, *FORMAT),
        names={
            "additional_special_tokens": list(FORMAT),
            **{name: row(ENDOFTEXT) for name in (*NAMES, "pad_token")},
        },
    ),
    byte_level(
        "Command R",
        UNFOUND + "remembered of CohereForAI/c4ai-command-r-v01",
        {
            **FAST,
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "chat_template": [{"name": "default", "template": EOT}],
            "eot_token": "<|END_OF_TURN_TOKEN|>",
        },
        *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    ),
    byte_level(
        "gpt-oss, unsloth",
        "Toui-Imamura/hirakata_llm@08b4cab252fc: merged_model/tokenizer_config.json",
        {
            **FAST,
            **INPUTS,
            **UNCLEANED,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "extra_special_tokens": {},
            "pad_token": "<|reserved_200017|>",
            "padding_side": "left",
            "unk_token": None,
        },
        *("<|startoftext|>", ENDOFTEXT, "<|return|>", "<|channel|>", "<|reserved_200017|>"),
    ),
    # As transformers 5 saves them
    form(
        "Qwen 2.5 Math, of transformers 5",
        "pulaksaha143/wingman@5b9d9dc782ab: fused_model/tokenizer_config.json",
        "bytes",
        {
            **QWEN,
            **V5,
            "eos_token": ENDOFTEXT,
            "extra_special_tokens": [*IM, *BOXES],
            "pad_token": ENDOFTEXT,
            "tool_parser_type": "json_tools",
        },
        in_json=(ENDOFTEXT, *IM, *BOXES),
    ),
    form(
        "Qwen 2.5 Coder, of transformers 5",
        "DharmShah/SLM_PythonCode@1c69004ab22b: adapters/tokenizer_config.json",
        "bytes",
        {
            **QWEN,
            **V5,
            "eos_token": IM[1],
            "extra_special_tokens": [*IM, *BOXES],
            "model_max_length": 1010000,
            "pad_token": IM[1],
        },
        in_json=(ENDOFTEXT, *IM, *BOXES),
    ),
    form(
        "Qwen 3.5, of transformers 5",
        "lawrence3699/Jev-Style-Qwen3.5-2B-Decision-MLX-bf16@1468e07de8fa: tokenizer_config.json",
        "bytes",
        {
            **QWEN,
            **V5,
            **SOUNDS,
            "chat_template": CHATML,
            "eos_token": ENDOFTEXT,
            "model_specific_special_tokens": SOUNDS,
            "pad_token": ENDOFTEXT,
            "tool_parser_type": "qwen3_coder",
        },
        in_json=(ENDOFTEXT, *IM, *SOUNDS.values()),
    ),
    form(
        "Transformers 5",
        UNFOUND + "what transformers 5 saves of a tokenizer with tokens of its own",
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
    # Others
    form(
        "Moonlight, ranks of tiktoken",
        UNFOUND + "remembered of moonshotai/Moonlight-16B-A3B",
        "tiktoken",
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "add_bos_token": True},
        *("[BOS]", "[EOS]", "<|im_end|>", token("[UNK]")),
        base={},
    ),
    form(
        "A template that reads a name of its own",
        UNFOUND + "what a maker may write by hand",
        "bytes",
        {**FAST, **LLAMA3_ENDS, "eot_token": named("<|eot|>")},
        **jinja(EOT),
    ),
]
