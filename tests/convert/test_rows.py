"""Folders with the rows of one host alone: together they hold each row that is dealt out once, and
all else each; what is read through one is what was published; it is not run by itself."""

import json
import shutil

import numpy as np
import pytest

from jlayer.app.cli import main
from jlayer.checkpoint.layout import read_manifest
from jlayer.checkpoint.rows import Host
from jlayer.checkpoint.safetensors import read_header
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint, seal_folder, verify_folder
from jlayer.encodings.registry import split_piece
from jlayer.errors import CheckpointError, UsageError
from jlayer.families.registry import layer_kinds, layer_tensor_name
from jlayer.spec import Role
from tests.campaigns import covering
from tests.convert.checkpoints import edit_json, edit_manifest, files_of, random_checkpoint
from tests.convert.kills import killed
from tests.convert.test_resume import cut_off
from tests.gguf.forms import save as save_for_gguf
from tests.gguf_files import write as write_gguf
from tests.reference import fp8_forms, gpt_oss_forms, latent_forms, mixture_forms, repacked_forms
from tests.tiny import tiny_llama

MODULUS = 1 << 128
GRID_SIZES = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 128}
# name -> (what saves it in a folder and returns where, the options of its conversion).
SOURCES = {
    "biased": (lambda home: tiny_llama(home, attention_bias=True, mlp_bias=True), {}),
    "tied": (lambda home: tiny_llama(home, tied=True), {"dtype": "bfloat16"}),
    "int8": (tiny_llama, {"quantize": "int8"}),
    "int4": (lambda home: tiny_llama(home, sharded=True), {"quantize": "int4"}),
    "experts": (lambda home: mixture_forms.save(home, "qwen2_moe-some"), {"quantize": "int4"}),
    "latent": (lambda home: latent_forms.save(home, "deepseek_v3"), {}),
    "inputs first": (lambda home: mixture_forms.save(home, "llama4"), {}),
    "mxfp4": (lambda home: gpt_oss_forms.write(home, *gpt_oss_forms.drawn()), {}),
    "one scale": (lambda home: fp8_forms.save(home, "qwen3", "tensor")[0], {}),
    "sorted": (lambda home: repacked_forms.save(home, "llama", "gptq sorted")[0], {}),
    "grid": (lambda home: _grid(home), {}),
    "gguf": (lambda home: _gguf(home), {}),
}
QUICK = [(name, 2 + number % 2) for number, name in enumerate(SOURCES)]


def _grid(home):
    def tensors_of(weight):
        codes, scale, plain = fp8_forms.encode(weight, "grid")
        return {".weight": codes, ".weight_scale_inv": scale}, plain

    return fp8_forms.save_encoded(home, "qwen3", fp8_forms.GRID, tensors_of, sizes=GRID_SIZES)[0]


def _gguf(home):
    write_gguf(save_for_gguf("wide", home / "saved"), home / "model.gguf", kind="Q4_K", drawn=True)
    return home / "model.gguf"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> (its source, the folder with all rows, the options); each is made once."""
    made = {}

    def source(name):
        if name not in made:
            home = tmp_path_factory.mktemp("rows")
            (home / "source").mkdir()
            save, options = SOURCES[name]
            found = save(home / "source")
            convert_checkpoint(found, home / "whole", **options)
            made[name] = found, home / "whole", options
        return made[name]

    return source


def arrays(folder):
    """Stored tensor -> its bytes, row by row."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.fromfile(path, np.uint8)
        for name, entry in read_header(path).tensors.items():
            own = raw[entry.offset : entry.offset + entry.n_bytes]
            found[name] = own.reshape(entry.shape[0], -1)
    return found


def digests_of(folder):
    files = read_manifest(folder).files.values()
    return {name: int(digest, 16) for file in files for name, digest in file.digests.items()}


@pytest.mark.parametrize(("name", "hosts"), covering(QUICK, SOURCES, (2, 3)))
def test_the_folders_together_hold_each_dealt_row_once_and_all_else_each(
    sources, tmp_path, name, hosts
):
    source, whole, options = sources(name)
    parts = [tmp_path / str(number) for number in range(hosts)]
    for number, folder in enumerate(parts):
        convert_checkpoint(source, folder, rows=(number, hosts), **options)
        assert verify_folder(folder).findings == ()
    manifests, expected = [read_manifest(folder) for folder in parts], arrays(whole)
    held, digests = [arrays(folder) for folder in parts], [digests_of(each) for each in parts]
    assert {each.source_fingerprint for each in manifests} == {
        read_manifest(whole).source_fingerprint
    }
    n_dealt = 0
    for tensor, rows in expected.items():
        spans = [manifest.spans.get(tensor) for manifest in manifests]
        if None in spans:
            assert set(spans) == {None}
            assert all(np.array_equal(each[tensor], rows) for each in held)
            continue
        n_dealt += rows.nbytes
        taken, times = np.zeros_like(rows), np.zeros(len(rows), int)
        for span, own in zip(spans, (each[tensor] for each in held), strict=True):
            assert span.whole == len(rows)
            assert len(own) == span.n
            taken[span.first : span.end] = own
            times[span.first : span.end] += 1
        assert np.array_equal(taken, rows)
        assert all(span.first % _unit(name, tensor) == 0 for span in spans)
        # Where rows do not come out even, the ends of the last ranges are there twice, no others.
        overlap = hosts * spans[0].n - len(rows)
        assert times.min() == 1
        assert times.sum() - len(rows) == overlap
        assert overlap < hosts * _unit(name, tensor)
        if overlap == 0 and rows.shape[1] > 16 and split_piece(tensor)[0] != tensor:
            assert sum(each[tensor] for each in digests) % MODULUS == digests_of(whole)[tensor]
    assert n_dealt > 0.3 * sum(rows.nbytes for rows in expected.values())


def _unit(name, tensor):
    """The rows of a stored tensor that stay together."""
    return 128 if name == "grid" and tensor.endswith(".q") else 1


@pytest.mark.parametrize("name", ["biased", "experts", "latent"])
def test_what_each_host_reads_of_a_model(sources, tmp_path, name):
    source, _, options = sources(name)
    convert_checkpoint(source, tmp_path / "part", rows=(1, 2), **options)
    store = Store(tmp_path / "part", host=Host(1, 2))
    cut = {split_piece(tensor)[0] for tensor in store.manifest.spans}
    for layer, kind in enumerate(layer_kinds(store.cfg)):
        for leaf, expert in kind.tensors():
            is_dealt = leaf.role in (Role.MATRIX, Role.BIAS)
            assert (layer_tensor_name(store.cfg, leaf, layer, expert) in cut) == is_dealt, leaf
    assert "model.embed_tokens.weight" not in cut
    assert "lm_head.weight" in cut


@pytest.mark.parametrize("name", ["biased", "int4", "grid"])
def test_rows_are_found_by_their_number_in_the_whole_model(sources, tmp_path, name):
    source, whole, options = sources(name)
    all_rows, expected = Store(whole), arrays(whole)
    for number in range(2):
        convert_checkpoint(source, tmp_path / str(number), rows=(number, 2), **options)
        store = Store(tmp_path / str(number), host=Host(number, 2))
        assert store.manifest.spans
        for tensor, rows in expected.items():
            span = store.manifest.spans.get(tensor)
            first, n = (span.first + span.n // 3, span.n - span.n // 3) if span else (0, len(rows))
            n_bytes = n * rows.shape[1]
            segment = store.rows_segment(tensor, first_row=first, n_bytes=n_bytes)
            found = np.fromfile(segment.file, np.uint8, n_bytes, offset=segment.offset)
            assert found.tobytes() == rows[first : first + n].tobytes()
            # The checks of a run count the rows that are there, by the same numbers.
            n_rows = span.n if span else len(rows)
            if all_rows.expected()[tensor].n_rows > 1:
                assert store.expected()[tensor].n_rows == n_rows
            other = 0 if number else len(rows) - 1
            if span:
                said = f"holds rows {span.first} to {span.end} of {span.whole}, expected {other} to"
                with pytest.raises(CheckpointError, match=f"tensor {tensor}: {said}"):
                    store.rows_segment(tensor, first_row=other, n_bytes=rows.shape[1])
    assert Store(whole, host=Host(1, 2)).manifest.host is None


def test_a_folder_of_one_host_is_not_used_by_itself(sources, tmp_path, capsys):
    source, whole, options = sources("int8")
    part = tmp_path / "part"
    convert_checkpoint(source, part, rows=(0, 2), **options)
    (tmp_path / "in.jsonl").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}'
    )
    (tmp_path / "text").write_text("a b c")
    for words in (
        ["generate", part, "-p", "a"],
        ["generate", whole, "--draft", part, "-p", "a"],
        ["plan", part],
        ["plan", part, "--quantize", "int4"],
        ["bench", part],
        ["eval", "perplexity", part, "--text", tmp_path / "text"],
        ["serve", part],
        ["batch", part, tmp_path / "in.jsonl", tmp_path / "out.jsonl"],
        ["export", part, tmp_path / "exported", "--format", "huggingface"],
        ["convert", part, tmp_path / "again"],
    ):
        before = capsys.readouterr() and files_of(part)
        assert main([str(word) for word in words]) == 3, words
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{part}: holds the rows of host 0 of 2 (the first is 0) alone" in line, words
        assert "expected all rows; use it on that host, together with the others" in line
        assert files_of(part) == before
    with pytest.raises(CheckpointError, match=r"expected those of host 1 of 2 .* --rows 1/2"):
        Store(part, host=Host(1, 2))


def test_a_folder_of_one_host_is_sealed_and_verified_as_any_other(sources, tmp_path, capsys):
    part = tmp_path / "part"
    convert_checkpoint(sources("biased")[0], part, rows=(2, 3))
    (part / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert seal_folder(part).status == "sealed"
    assert read_manifest(part).host == Host(2, 3)
    assert verify_folder(part).findings == ()
    edit_json(part / "config.json", vocab_size=134)
    with pytest.raises(CheckpointError, match="describes other weights than those that are there"):
        seal_folder(part)


def _another_host(manifest):
    manifest["rows"]["host"] = 1


def _no_span(manifest):
    for tensor in manifest["files"]["final.safetensors"]["tensors"].values():
        tensor.pop("rows", None)


@pytest.mark.parametrize("change", [_another_host, _no_span])
def test_verify_finds_rows_of_another_host(sources, tmp_path, change):
    part = tmp_path / "part"
    convert_checkpoint(sources("biased")[0], part, rows=(0, 2))
    edit_manifest(part, change)
    assert any("rows" in line or "shapes" in line for line in verify_folder(part).findings)


@pytest.mark.parametrize(
    "rows", [{"host": 2, "hosts": 2}, {"host": 0}, {"host": 0, "hosts": 1}, None, [0, 2]]
)
def test_a_manifest_of_no_host_is_damaged(sources, tmp_path, rows):
    part = tmp_path / "part"
    convert_checkpoint(sources("biased")[0], part, rows=(0, 2))
    edit_manifest(part, lambda manifest: manifest.update(rows=rows))
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(part)


# Stopped, and gone on with.


def test_a_conversion_that_is_killed_anywhere_resumes_to_the_same_bytes(tmp_path):
    source = random_checkpoint(tmp_path / "source", n_shards=1, num_hidden_layers=1)
    convert_checkpoint(source, tmp_path / "whole", rows=(1, 2))
    states = killed("convert 1/2", source, tmp_path / "whole", n_last=20)
    assert set(states) == {"none", "new"}


@pytest.mark.parametrize("options", [{}, {"quantize": "int4"}])
def test_rows_of_another_host_are_refused_on_resume(copy_of, tmp_path, options):
    source, target = copy_of("single"), tmp_path / "target"
    cut_off(source, target, rows=(0, 2), **options)
    before = files_of(target)
    for rows, said in (((1, 2), "1/2"), ((0, 3), "0/3"), (None, "of all hosts")):
        with pytest.raises(UsageError, match=rf"began with rows 0/2, not {said}; .* to resume"):
            convert_checkpoint(source, target, rows=rows, **options)
    assert files_of(target) == before
    assert convert_checkpoint(source, target, rows=(0, 2), **options).n_resumed == 3
    assert verify_folder(target).findings == ()


def test_a_finished_folder_of_another_host_is_left_alone(sources, tmp_path):
    source, whole, _ = sources("biased")
    part, copy = tmp_path / "part", shutil.copytree(whole, tmp_path / "copy")
    convert_checkpoint(source, part, rows=(0, 2))
    before = files_of(part)
    with pytest.raises(UsageError, match=r"rows 0/2 there, 1/2 here"):
        convert_checkpoint(source, part, rows=(1, 2))
    with pytest.raises(UsageError, match=r"rows of all hosts there, 1/2 here"):
        convert_checkpoint(source, copy, rows=(1, 2))
    assert convert_checkpoint(source, part, rows=(0, 2)).status == "unchanged"
    assert files_of(part) == before
    convert_checkpoint(source, part, rows=(1, 2), overwrite=True)
    assert read_manifest(part).host == Host(1, 2)


# The command.


def test_the_command_says_whose_rows_it_wrote(published, tmp_path, capsys):
    words = ["convert", str(published("single")), str(tmp_path / "part"), "--rows", "1/2"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"host": 1, "hosts": 2}
    assert main(words) == 0
    assert "already holds all of the rows of host 1 of 2 of" in capsys.readouterr().out


@pytest.mark.parametrize("rows", ["2/2", "0/1", "0/0", "1", "a/2", "-1/2", "0/2/3", "", "0.5/2"])
def test_rows_of_no_host_are_refused(published, tmp_path, capsys, rows):
    source = str(published("single"))
    assert main(["convert", source, str(tmp_path / "part"), f"--rows={rows}"]) == 2
    assert "--rows: found" in capsys.readouterr().err
    assert not (tmp_path / "part").exists()


def test_the_other_hosts_rows_are_not_removed_with_the_source(copy_of, tmp_path, capsys):
    source = copy_of("single")
    before = files_of(source)
    words = ["convert", str(source), str(tmp_path / "part"), "--rows", "0/2"]
    assert main([*words, "--delete-source", "--yes"]) == 2
    assert "--delete-source and --rows: the rows of the other hosts" in capsys.readouterr().err
    assert files_of(source) == before
