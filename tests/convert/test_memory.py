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
from jlayer.convert.sources.files import CHUNK_BYTES, WHOLE_FILE_BYTES
from jlayer.convert.target.blocks import BLOCK_BYTES, N_BLOCKS
from jlayer.convert.transform import quantize
from jlayer.encodings.registry import SCHEMES
from jlayer.families.registry import published_tensors

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


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = published_tensors(model_config(CONFIG, where="here"))
    header, entries = encode_header(shapes, dict.fromkeys(shapes, "float32"))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.n_bytes for entry in entries.values()))
    return folder


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


def test_resident_memory_of_the_process_is_too(source, tmp_path):
    """What Python does not count is in the kernel's figure: pages, threads, C libraries."""
    code = (
        "import re, sys\n"
        "from jlayer.convert import convert_checkpoint\n"
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) * 1024\n"
        "before = peak()\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], dtype='bfloat16')\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < LIMIT["bfloat16"] + BLOCKS + (8 << 20) < 3 * LAYER_BYTES / 4
