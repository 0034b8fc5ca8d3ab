"""A conversion holds a few chunks, never a layer, whatever the size of the model."""

import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from jlayer.checkpoint.layout import encode_header
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.export import export_checkpoint
from jlayer.convert.sources.files import CHUNK_BYTES, WHOLE_FILE_BYTES
from jlayer.convert.target.blocks import BLOCK_BYTES, N_BLOCKS
from jlayer.convert.transform import quantize
from jlayer.encodings.registry import SCHEMES
from jlayer.families.registry import published_tensors, stacked_tensors

# Layers of 55 MB, their largest tensor 12.6 MB; zeros, so that the source is a file of holes.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "torch_dtype": "float32",
}
LAYER_BYTES = 4 * (4 * 1024 * 1024 + 3 * 3072 * 1024 + 2 * 1024)
LARGEST_BYTES = 4 * 3072 * 1024
# Two chunks that are read, up to three results of a cast, half as large; headers, the manifest.
# The blocks that are written are not Python's, and stand in BLOCKS.
BLOCKS = N_BLOCKS * BLOCK_BYTES
LIMIT = {None: 2 * CHUNK_BYTES + (2 << 20), "bfloat16": 7 * CHUNK_BYTES // 2 + (2 << 20)}


def holes(folder, config):
    """A published folder of zeros."""
    (folder / "config.json").write_text(json.dumps(config))
    cfg = model_config(config, where="here")
    stacks, shapes = stacked_tensors(cfg), published_tensors(cfg)
    of_stacks = {part for stack in stacks.values() for part, *_ in stack.parts}
    shapes = {name: shape for name, shape in shapes.items() if name not in of_stacks}
    shapes |= {name: stack.shape for name, stack in stacks.items()}
    header, entries = encode_header(shapes, dict.fromkeys(shapes, "float32"))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.n_bytes for entry in entries.values()))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return holes(tmp_path_factory.mktemp("large"), CONFIG)


@pytest.fixture(scope="module")
def layered(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("large") / "layered"
    convert_checkpoint(source, target)
    return target


@pytest.mark.parametrize("dtype", LIMIT)
def test_peak_is_a_few_chunks(source, tmp_path, dtype):
    assert LIMIT[dtype] < LAYER_BYTES / 3
    tracemalloc.start()
    try:
        convert_checkpoint(source, tmp_path / "out", dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
        assert CHUNK_BYTES < peak < LIMIT[dtype]
        tracemalloc.reset_peak()
        assert verify_folder(tmp_path / "out").findings == ()
        assert tracemalloc.get_traced_memory()[1] < 2 * WHOLE_FILE_BYTES + (2 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_takes_a_few_chunks_more_and_what_each_thread_works_on(source, tmp_path, scheme):
    """And the scales of one matrix, which wait until its rows are written."""
    threads = len(os.sched_getaffinity(0)) * 32 * quantize.BLOCK_WEIGHTS
    tracemalloc.start()
    try:
        convert_checkpoint(source, tmp_path / "out", quantize=scheme)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CHUNK_BYTES < peak < 5 * CHUNK_BYTES + threads + (2 << 20)


# Chunks of a mebibyte: those that are read, and what is made of one of them.
EXPORTS = {
    ("huggingface", None): 3,
    ("gguf", None): 5,
    ("gguf", "f16"): 6,
    ("gguf", "q8_0"): 11,
}


@pytest.mark.parametrize(("form", "kind"), EXPORTS)
def test_an_export_holds_a_few_chunks_too(layered, tmp_path, form, kind):
    assert (limit := EXPORTS[form, kind] * CHUNK_BYTES) < LARGEST_BYTES < LAYER_BYTES / 4
    tracemalloc.start()
    try:
        export_checkpoint(layered, tmp_path / "out.gguf", format=form, type=kind)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CHUNK_BYTES < peak < limit


# The matrices of an expert are published by inputs: 8 MB and 4 MB of each of eight.
BY_INPUTS = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 200,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "intermediate_size_mlp": 600,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
}


def test_of_experts_that_are_turned_one_matrix_is_held(tmp_path):
    (tmp_path / "source").mkdir()
    source = holes(tmp_path / "source", BY_INPUTS)
    convert_checkpoint(source, tmp_path / "layered")
    matrix = 4 * 512 * 2 * 2048
    tracemalloc.start()
    try:
        export_checkpoint(tmp_path / "layered", tmp_path / "out", format="huggingface")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert matrix < peak < matrix + 5 * CHUNK_BYTES < 2 * matrix


def test_resident_memory_of_an_export_is_that_of_chunks(layered, tmp_path):
    done = grown(
        "from jlayer.convert.export import export_checkpoint",
        "export_checkpoint(sys.argv[1], sys.argv[2], format='gguf', type='q8_0')",
        *(layered, tmp_path / "out.gguf"),
    )
    assert done < EXPORTS["gguf", "q8_0"] * CHUNK_BYTES + BLOCKS + (8 << 20) < LAYER_BYTES


def test_resident_memory_of_the_process_is_too(source, tmp_path):
    done = grown(
        "from jlayer.convert import convert_checkpoint",
        "convert_checkpoint(sys.argv[1], sys.argv[2], dtype='bfloat16')",
        *(source, tmp_path / "out"),
    )
    assert done < LIMIT["bfloat16"] + BLOCKS + (8 << 20) < 3 * LAYER_BYTES / 4


def grown(imports, work, *arguments):
    """By how much a process of its own grows. What Python does not count is in the kernel's figure:
    pages, threads, C libraries."""
    code = (
        "import re, sys\n"
        f"{imports}\n"
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) * 1024\n"
        "before = peak()\n"
        f"{work}\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)
