"""The comparison's own arithmetic, its links, what llama.cpp is given, and one run with jlayer
alone."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gguf_model, make_model, peer, table
from benchmarks.published import published, weight_bytes
from tests.conftest import BUNDLED, REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "versus.py"


def call(name, *arguments):
    """A function of versus.py, in a process of its own: the scripts import each other by their bare
    names."""
    code = f"import json, sys, versus; print(json.dumps(versus.{name}(*json.load(sys.stdin))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(arguments),
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def compare(*runs):
    return call("compare", *runs)


def test_other_tokens_are_told_with_their_place_and_how_close_the_choice_was():
    ours = {"token_ids": [7, 8, 9], "top": [[[7, -1.0], [8, -3.0]], [[8, -1.0], [5, -1.25]], []]}
    theirs = {"token_ids": [7, 5, 1], "top": [[[7, -1.5], [6, -3.0]], [[5, -1.0], [8, -1.125]], []]}
    found = compare(ours, theirs)
    assert not found["same_tokens"]
    assert found["first_difference"] == 1
    assert found["gap_there"] == 0.25
    assert found["largest_logprob_difference"] == 0.5  # what follows the difference is not compared
    same = compare(ours | {"top": theirs["top"][:2]}, ours | {"top": theirs["top"][:2]})
    assert same["same_tokens"]
    assert same["largest_logprob_difference"] == 0.0


def test_a_layered_folder_is_read_under_published_names_without_a_copy(fable, tmp_path):
    found = published(fable, tmp_path / "published")
    index = json.loads((found / "model.safetensors.index.json").read_text())["weight_map"]
    own = json.loads((fable / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == own.keys()
    for tensor, name in index.items():
        assert (found / name).samefile(fable / own[tensor])
        assert 1 <= int(name.split("-")[1]) <= len(set(own.values()))  # AirLLM reads the number
    names = sorted(set(index.values()))
    assert index["model.embed_tokens.weight"] == names[0]
    assert (found / "tokenizer.json").read_bytes() == (fable / "tokenizer.json").read_bytes()
    assert not (found / "manifest.json").exists()
    assert weight_bytes(found) == weight_bytes(fable) == weight_bytes(BUNDLED)
    assert published(BUNDLED, tmp_path / "none") == BUNDLED


@pytest.mark.slow
def test_a_run_becomes_a_table(tmp_path):
    out = tmp_path / "result.json"
    words = ["--programs", "jlayer", "--new-tokens", "3", "--prompt-tokens", "4", "--here"]
    command = [sys.executable, str(SCRIPT), str(BUNDLED), *words, "--out", str(out)]
    subprocess.run([*command, "--work", str(tmp_path / "work")], check=True, capture_output=True)
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert len(row["token_ids"]) == 3
    assert row["agreement"]["same_tokens"]
    assert row["anonymous_bytes"] > 10 << 20  # seen from outside while it ran
    assert row["runs"][0]["other_cores"] >= 0
    failed = {"name": "airllm", "failed": "Killed"}
    slower = {**row, "name": "transformers", "versions": {"transformers": "5.0"}}
    slower["s_per_token"] = {"median": 2 * row["s_per_token"]["median"]}
    printed = table.versus({**result, "rows": [row, slower, failed]})
    assert "| transformers 5.0, whole model in memory |" in printed
    assert "| 2.00 |" in printed
    assert "| AirLLM  | failed |" in printed
    assert "All of them gave the same tokens" in printed


def test_a_sweep_of_a_folder_without_weights_ends_before_anything_is_measured(tmp_path):
    for folder in (tmp_path, "/no/such/folder"):
        done = subprocess.run(
            [sys.executable, "sweep.py", folder, "--device", "cpu"],
            cwd=SCRIPT.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stdout == ""
        line = f"sweep.py: {folder}: no *.safetensors there; name a folder with weights\n"
        assert done.stderr == line


@pytest.fixture
def small():
    """A config whose axes are all different, and which both programs can have."""
    sizes = {"num_hidden_layers": 2, "head_dim": 32, "num_key_value_heads": 3}
    return {**make_model.config("tiny", 2), **sizes, "num_attention_heads": 5}


def test_a_gguf_has_the_tensors_of_the_shape_and_the_types_of_llama_cpp(small):
    found = gguf_model.tensors(small, "Q4_0")
    assert found["token_embd.weight"] == ("Q4_0", (1024, 256))
    assert found["output.weight"] == ("Q6_K", (1024, 256))
    assert found["blk.1.attn_q.weight"] == ("Q4_0", (160, 256))
    assert found["blk.1.attn_v.weight"] == ("Q4_0", (96, 256))
    assert found["blk.0.attn_output.weight"] == ("Q4_0", (256, 160))
    assert found["blk.0.ffn_down.weight"] == ("Q4_0", (256, 704))
    assert found["blk.0.ffn_norm.weight"] == ("F32", (256,))
    assert len(found) == 2 * 9 + 3
    eight = gguf_model.tensors(small, "Q8_0")
    assert {kind for kind, _ in eight.values()} == {"F32", "Q8_0"}
    tied = gguf_model.tensors(small | {"tie_word_embeddings": True}, "Q4_0")
    assert tied["token_embd.weight"][0] == "Q6_K"
    assert "output.weight" not in tied
    narrow = gguf_model.tensors(small | {"hidden_size": 160}, "Q4_0")
    assert narrow["output.weight"][0] == "Q8_0"  # 160 is no multiple of Q6_K's 256
    with pytest.raises(SystemExit, match="not 'qwen3'"):
        gguf_model.tensors(small | {"model_type": "qwen3"}, "Q4_0")


def test_a_weight_of_a_gguf_is_about_as_large_as_one_of_make_model():
    rng = np.random.default_rng(0)
    blocks = gguf_model.drawn("Q4_0", (64, 4096), rng).reshape(-1, 18)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    numbers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    assert (scales * (numbers - 8)).std() == pytest.approx(0.01, rel=0.02)
    blocks = gguf_model.drawn("Q8_0", (64, 4096), rng).reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    assert (scales * blocks[:, 2:].view(np.int8)).std() == pytest.approx(0.01, rel=0.02)
    assert (gguf_model.drawn("F32", (7,), rng) == 1).all()


class Writer:
    """Stands in for gguf.GGUFWriter: keeps the tensors, writes their bytes."""

    def __init__(self, path, arch):
        self.path, self.tensors = path, {}

    def add_tensor(self, name, values, raw_dtype):
        self.tensors[name] = (values, raw_dtype)

    def close(self):
        self.path.write_bytes(b"".join(values.tobytes() for values, _ in self.tensors.values()))

    def __getattr__(self, name):  # its settings
        return lambda *_: None


def test_a_gguf_is_as_large_as_its_sizes_say(small, tmp_path, monkeypatch):
    types = {kind: kind for kind in gguf_model.BLOCKS}
    fake = SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=types)
    monkeypatch.setitem(sys.modules, "gguf", fake)
    for kind, a_token_less in (("Q4_0", 1024 * 256 // 32 * 18), ("Q8_0", 1024 * 256 // 32 * 34)):
        path = tmp_path / f"{kind}.gguf"
        gguf_model.write(small, kind, path)
        assert path.stat().st_size - a_token_less == gguf_model.weight_bytes(small, kind)
        assert [*tmp_path.glob("*.part")] == []


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_the_weights_of_a_quantized_folder_are_counted_without_the_embedding(scheme, tmp_path):
    folder = tmp_path / "model"
    make_model.make(folder, "tiny", 2, scheme)
    total = 0
    for path in folder.glob("*.safetensors"):
        if path.name != "embed.safetensors":
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            places = [one["data_offsets"] for name, one in header.items() if name[0] != "_"]
            total += sum(end - start for start, end in places)
    assert weight_bytes(folder) == total > 0


class Server:
    """Stands in for llama.cpp: a chunk for each token, then one without text."""

    asked = ()  # each test has a list of its own
    lost = 0

    def __init__(self, params):
        self.params = params

    def handle_completions(self, request, callback):
        self.asked.append((self.params, request))
        for token in range(request["max_tokens"] - self.lost):
            callback({"choices": [{"text": f"t{token + 40}"}]})
        callback({"choices": [{"text": ""}]})


@pytest.fixture
def llama_cpp(monkeypatch):
    def params():
        return SimpleNamespace(
            model=SimpleNamespace(),
            cpuparams=SimpleNamespace(),
            cpuparams_batch=SimpleNamespace(),
        )

    fake = SimpleNamespace(CommonParams=params, Server=Server, get_system_info=lambda: "AVX2 = 1")
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    monkeypatch.setattr(Server, "asked", [])


def test_llama_cpp_runs_on_the_cores_it_is_given_and_forgets_the_prompt(llama_cpp):
    args = SimpleNamespace(folder="model.gguf", new_tokens=3, threads=5, device="gpu")
    clock = peer.Clock()
    found = peer.run_llamacpp(args, [11, 12], clock)
    assert found["token_ids"] == [40, 41, 42]
    assert len(clock.times) == 4  # the prompt and each token
    assert found["prompt_s"] > 0
    (params, timed), (_, again) = Server.asked
    assert (params.model.path, params.n_gpu_layers) == ("model.gguf", 0)
    assert params.cpuparams.n_threads == params.cpuparams_batch.n_threads == 5
    assert timed["prompt"] == again["prompt"] == [11, 12]
    assert not timed["cache_prompt"]
    assert not again["cache_prompt"]
    assert (timed["max_tokens"], again["max_tokens"]) == (3, 1)


def test_llama_cpp_that_gives_fewer_chunks_than_tokens_is_not_timed(llama_cpp, monkeypatch):
    monkeypatch.setattr(Server, "lost", 1)
    args = SimpleNamespace(folder="model.gguf", new_tokens=3, threads=1)
    with pytest.raises(RuntimeError, match="2 chunks for 3 tokens"):
        peer.run_llamacpp(args, [11, 12], peer.Clock())


def ran(seconds, **more):
    common = {"first_s": 1.0, "prompt_s": 0.25, "s_per_token": seconds, "token_ids": [7]}
    memory = {"anonymous_bytes": 1 << 30, "resident_bytes": 2 << 30}
    return {**common, **memory, "top": [[[7, -1.0], [8, -2.0]]], "versions": {}, **more}


def test_the_row_of_llama_cpp_has_its_own_weights_and_says_that_tokens_are_not_compared():
    theirs = ran(0.5, versions={"xllamacpp": "1.2"}, threads=16, token_ids=[9])
    del theirs["top"]
    runs = {"llama.cpp": [theirs], "jlayer": [ran(1.0), ran(3.0)]}
    weights = {"llama.cpp": {"weight_bytes": 10**9, "format": "Q4_0"}}
    weights["jlayer"] = {"weight_bytes": 3 * 10**9}
    other, ours = call("summarised", runs, weights)
    assert other["bytes_per_s"] == 2e9
    assert ours["bytes_per_s"] == 1.5e9
    assert ours["agreement"]["same_tokens"]
    assert other["agreement"]["same_tokens"] is None
    assert "tokens not compared: its weights are random" in call("same_tokens", other["agreement"])
    config = {"num_hidden_layers": 4, "hidden_size": 4096, "vocab_size": 128256}
    config["quantization_config"] = {"by": "jlayer", "scheme": "int4"}
    options = {"dtype": "bfloat16", "prompt_tokens": "64", "new_tokens": "16", "rounds": "2"}
    result = {"config": config, "options": options, "weight_bytes": 3e9, "rows": [ours, other]}
    printed = table.versus(result | {"card": {"gpu": None, "cores": 2}})
    assert "weights in int4, computed in bfloat16: 3.00 GB of weights a token" in printed
    assert "| program | seconds for the prompt | seconds a token |" in printed
    words = (
        "| llama.cpp (xllamacpp 1.2), 16 threads of the CPU | 0.250 | 0.500 | 2.0 GB/s | 1024 MiB"
    )
    assert words in printed
    assert "The tokens of llama.cpp (Q4_0, 1.00 GB a token) are not compared" in printed
    assert "same tokens" not in printed
    on_gpu = [one | {"gpu_bytes": 5 << 20} for one in (ours | {"name": "jlayer 4GiB"}, other)]
    printed = table.versus(result | {"card": {"gpu": "H100"}, "rows": on_gpu})
    assert "| GPU memory, whole process | process memory (anonymous) |" in printed
    assert "| 5 MiB | 1024 MiB | 2048 MiB | 0.25 |" in printed


def test_llama_cpp_and_the_others_are_told_apart_by_the_folder(tmp_path):
    def refused(*words):
        command = [sys.executable, str(SCRIPT), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert "needs a folder that jlayer quantized" in refused(BUNDLED, "--programs", "llama.cpp")
    own = {"quantization_config": {"by": "jlayer", "scheme": "int4"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert "airllm cannot read a folder" in refused(tmp_path, "--programs", "llama.cpp,airllm")


def test_a_page_may_show_a_further_comparison_by_the_name_of_its_result(monkeypatch):
    monkeypatch.setattr(table, "blocks", dict)
    monkeypatch.setattr(table, "versus", lambda result: f"{len(result['rows'])} rows\n")
    page = "<!-- table: versus-cpu -->\nold\n<!-- end of table -->\n"
    (text,) = table.rewritten({"page": page}).values()
    assert "rows\n" in text
    assert "old" not in text
