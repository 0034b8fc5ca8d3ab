"""PyTorch's pickles: what torch.save wrote converts to equal bytes, and nothing else runs.

Every malicious pickle is first run as Python would, to see that its payload works, and then given
to the converter, where it must not.
"""

import builtins
import contextlib
import copyreg
import errno
import io
import json
import mmap
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import pytest

from jlayer.app.cli import main
from jlayer.checkpoint.source import regular_file
from jlayer.convert import convert_checkpoint
from jlayer.convert.sources.files import CHUNK_BYTES, TURNED_BYTES, FileSource
from jlayer.convert.sources.pickles import asked_for
from jlayer.convert.sources.torchfile import read_table
from tests.convert.checkpoints import (
    assert_logits_of_transformers,
    edit_json,
    files_of,
    read_tensors,
)
from tests.convert.pickled import (
    BIN,
    BIN_INDEX,
    as_bin,
    read_archive,
    refused,
    write_archive,
)

torch = pytest.importorskip("torch")

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def bin_of(published, tmp_path):
    """kind -> a fresh copy of a published checkpoint, as pickles."""
    return lambda kind: as_bin(published(kind), tmp_path / "source")


@pytest.fixture
def table_of(tmp_path):
    """What is read of objects that torch.save wrote: name -> tensor, through our reader alone."""

    def read(objects, name="x.bin"):
        if objects is not None:
            torch.save(objects, tmp_path / name)
        table = read_table(regular_file(str(tmp_path), name))
        source = FileSource(
            {key: info for key, (_, info) in table.items()},
            {key: (place,) for key, (place, _) in table.items()},
        )
        return {key: b"".join(map(bytes, source.chunks(key))) for key in table}

    return read


# What torch.save writes.


@pytest.mark.parametrize("kind", ["single", "sharded", "tied", "biased", "bfloat16", "float16"])
def test_pickles_convert_to_the_bytes_of_safetensors(published, bin_of, tmp_path, kind):
    convert_checkpoint(published(kind), tmp_path / "safe")
    convert_checkpoint(bin_of(kind), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "safe")


def test_its_logits_are_those_of_transformers(published, bin_of, tmp_path):
    convert_checkpoint(bin_of("sharded"), tmp_path / "out")
    assert_logits_of_transformers(tmp_path / "out", published("sharded"))


def test_a_state_dict_as_a_model_gives_it(published, tmp_path, bin_of):
    """An OrderedDict with versions as its state; the embedding's storage is the head's as well.

    Its tensors may be parameters.
    """
    transformers = pytest.importorskip("transformers")
    source = bin_of("tied")
    model = transformers.AutoModelForCausalLM.from_pretrained(published("tied"))
    weights = model.state_dict()
    assert weights._metadata
    assert HEAD in weights
    weights[NORM] = torch.nn.Parameter(weights[NORM])
    torch.save(weights, source / BIN)
    assert b"_rebuild_parameter" in (source / BIN).read_bytes()
    convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(published("tied"), tmp_path / "safe")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "safe")


VIEWS = {
    "transposed": lambda t: t.t(),
    "rows": lambda t: t[5:40],
    "columns": lambda t: t[:, 3:9],
    "every-third-row": lambda t: t[1::3],
    "every-other-column": lambda t: t[:, ::2],
    "transposed-columns": lambda t: t.t()[3:, 1::2],
    "one-row": lambda t: t[7],
    "one-column": lambda t: t[:, 4],
    "expanded": lambda t: t[:, :1].expand(-1, 50),
    "expanded-rows": lambda t: t[:1].expand(60, -1),
    "none": lambda t: t[:0],
    "whole": lambda t: t,
}


@pytest.mark.parametrize(
    ("chunk_bytes", "turned_bytes"),
    [(CHUNK_BYTES, TURNED_BYTES), (CHUNK_BYTES, 2000), (1024, TURNED_BYTES), (1024, 2000), (20, 1)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_views_of_one_storage(table_of, monkeypatch, dtype, chunk_bytes, turned_bytes):
    monkeypatch.setattr("jlayer.convert.sources.files.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("jlayer.convert.sources.files.TURNED_BYTES", turned_bytes)
    whole = torch.randn(70, 30).to(getattr(torch, dtype))
    views = {name: view(whole) for name, view in VIEWS.items()}
    found = table_of(views)
    for name, view in views.items():
        expected = view.contiguous().view(torch.uint8 if view.numel() else view.dtype)
        assert found[name] == expected.numpy().tobytes() if view.numel() else found[name] == b""


def test_a_strided_matrix_in_a_checkpoint(published, bin_of, tmp_path):
    source = bin_of("single")
    weights = torch.load(source / BIN, weights_only=True)
    for name in (HEAD, "model.layers.1.mlp.up_proj.weight"):
        weights[name] = weights[name].t().contiguous().t()
    torch.save(weights, source / BIN)
    convert_checkpoint(source, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(published("single"))


def test_a_file_that_cannot_be_mapped_is_read_all_the_same(bin_of, tmp_path, monkeypatch):
    """Linux refuses to map a file larger than its memory."""
    seen, real = [], torch.load

    def load(*arguments, **options):
        seen.append((options["mmap"], options["weights_only"]))
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    source = bin_of("single")
    convert_checkpoint(source, tmp_path / "mapped")

    def refuse(fd, *arguments, real=mmap.mmap):
        if fd >= 0:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fd, *arguments)

    monkeypatch.setattr(mmap, "mmap", refuse)
    convert_checkpoint(source, tmp_path / "read")
    assert seen == [(True, True), (False, True)]
    assert files_of(tmp_path / "mapped") == files_of(tmp_path / "read")


def test_of_a_large_pickle_a_few_chunks_are_held(tmp_path, monkeypatch):
    """And what is turned at a time of a matrix that lies by its columns."""
    monkeypatch.setattr("jlayer.convert.sources.files.TURNED_BYTES", 3 * CHUNK_BYTES)
    weights = {name: torch.zeros(3072, 1024) for name in "abc"}  # 12.6 MB each
    weights["strided"] = torch.zeros(1024, 3072).t()
    torch.save(weights, tmp_path / BIN)
    tracemalloc.start()
    try:
        table = read_table(regular_file(str(tmp_path), BIN))
        source = FileSource(
            {name: info for name, (_, info) in table.items()},
            {name: (place,) for name, (place, _) in table.items()},
        )
        for name, most in {"a": 3, "b": 3, "c": 3, "strided": 6}.items():
            for _ in source.chunks(name):
                pass
            assert tracemalloc.get_traced_memory()[1] < most * CHUNK_BYTES
    finally:
        tracemalloc.stop()


def test_torch_is_asked_for_where_it_is_missing(bin_of, tmp_path, monkeypatch):
    source = bin_of("single")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(source, tmp_path / "out", ['pip install -e ".[torch]"', BIN])


def test_torch_is_imported_for_pickles_alone(published, bin_of, tmp_path):
    code = (
        "import sys; from jlayer.convert import convert_checkpoint\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2]); print('torch' in sys.modules)"
    )
    for source, expected in ((published("single"), "False"), (bin_of("single"), "True")):
        command = [sys.executable, "-c", code, str(source), str(tmp_path / expected)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_safetensors_are_taken_where_both_are_there_and_no_pickle_is_opened(copy_of, tmp_path):
    source = copy_of("single")
    (source / BIN).write_bytes(b"not even a pickle")
    notes = convert_checkpoint(source, tmp_path / "out").notes
    assert len(notes) == 1
    assert "safetensors are taken" in notes[0]


# Damaged and inconsistent files.


def damage(path, at, value=0xFF):
    raw = bytearray(path.read_bytes())
    raw[at] ^= value
    path.write_bytes(raw)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_in_the_weights_is_found(bin_of, tmp_path, share):
    source = bin_of("single")
    table = read_table(regular_file(str(source), BIN))
    place, info = table["model.layers.1.mlp.up_proj.weight"]
    damage(source / BIN, place.offset + int(share * info.n_bytes), 1)
    words = ["model.layers.1.mlp.up_proj.weight", "CRC-32", "damaged"]
    refused(source, tmp_path / "out", words, begun=True)


def test_archives_without_checksums_are_read(published, tmp_path):
    """torch.serialization.set_crc32_options(False) writes zeros."""
    torch.serialization.set_crc32_options(False)
    try:
        source = as_bin(published("single"), tmp_path / "source")
    finally:
        torch.serialization.set_crc32_options(True)
    convert_checkpoint(source, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(published("single"))


@pytest.mark.parametrize("cut", [1, 22, 5000, 100_000])
def test_cut_off(bin_of, tmp_path, cut):
    source = bin_of("single")
    size = (source / BIN).stat().st_size - cut
    os.truncate(source / BIN, size)
    refused(source, tmp_path / "out", [BIN, "cut off", f"{size} bytes"])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>503</html>", "HTML"),
        (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40), "7z"),
        (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
        (struct.pack("<Q", 2) + b"{}", "safetensors under another name"),
        (b"PK\3\4" + bytes(40), "cut off"),
        (bytes(100), "torch 1.6"),
    ],
)
def test_what_is_no_archive(bin_of, tmp_path, content, word):
    source = bin_of("single")
    (source / BIN).write_bytes(content)
    refused(source, tmp_path / "out", [BIN, word])


def test_the_form_of_before_torch_1_6_is_refused_with_advice(bin_of, tmp_path):
    source = bin_of("single")
    weights = torch.load(source / BIN, weights_only=True)
    torch.save(weights, source / BIN, _use_new_zipfile_serialization=False)
    refused(source, tmp_path / "out", [BIN, "torch 1.6", "weights_only=True"])


@pytest.mark.parametrize("dtype", ["float64", "int64", "bool", "float8_e4m3fn", "uint16"])
def test_other_dtypes_are_refused_by_tensor(bin_of, tmp_path, dtype):
    source = bin_of("single")
    weights = torch.load(source / BIN, weights_only=True)
    weights[NORM] = weights[NORM].to(getattr(torch, dtype))
    torch.save(weights, source / BIN)
    refused(source, tmp_path / "out", [NORM, dtype, "bfloat16, float16, float32"])


def test_what_is_dropped_may_be_of_any_dtype(published, bin_of, tmp_path):
    source = bin_of("single")
    weights = torch.load(source / BIN, weights_only=True)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5, dtype=torch.float64)
    torch.save(weights, source / BIN)
    convert_checkpoint(source, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(published("single"))


def test_missing_stray_and_misshapen_tensors_are_listed_at_once(bin_of, tmp_path):
    source = bin_of("single")
    weights = torch.load(source / BIN, weights_only=True)
    weights["stray.weight"] = weights.pop(NORM)
    weights[HEAD] = weights[HEAD][:-1]
    torch.save(weights, source / BIN)
    words = ["stray.weight", NORM, "missing", HEAD, "[132, 24]", "[133, 24]"]
    refused(source, tmp_path / "out", words)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([torch.ones(2)], ["a list"]),
        (torch.ones(2), ["a tensor"]),
        ({"model": {NORM: torch.ones(2)}}, ["'model' is a dict"]),
        ({"epoch": 3}, ["'epoch' is an int"]),
        ({"../x": torch.ones(2)}, ["'../x'"]),
        ({"a\0b": torch.ones(2)}, [r"'a\x00b'"]),
        ({7: torch.ones(2)}, ["unsafe", "an int as a key"]),
    ],
)
def test_what_is_no_table_of_tensors(bin_of, tmp_path, objects, words):
    source = bin_of("single")
    torch.save(objects, source / BIN)
    refused(source, tmp_path / "out", words)


def names_a_file(name):
    def change(source):
        weight_map = json.loads((source / BIN_INDEX).read_text())["weight_map"]
        edit_json(source / BIN_INDEX, weight_map=weight_map | {NORM: name})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (names_a_file("/etc/passwd"), ["'/etc/passwd'", BIN_INDEX]),
        (names_a_file("../x.bin"), ["'../x.bin'", BIN_INDEX]),
        (names_a_file("pytorch_model-00001-of-00009.bin"), [NORM, f"{BIN_INDEX} says"]),
        (
            lambda source: (source / "pytorch_model-00004-of-00009.bin").unlink(),
            ["pytorch_model-00004-of-00009.bin", "1 of 9"],
        ),
    ],
)
def test_indexes_are_held_against_the_files(bin_of, tmp_path, change, words):
    source = bin_of("sharded")
    change(source)
    refused(source, tmp_path / "out", words)


def test_a_pickle_that_is_cut_off_while_it_is_read(bin_of, tmp_path, monkeypatch):
    """Read, not mapped: a mapping would end the process with SIGBUS."""
    source, real, calls = bin_of("single"), os.preadv, []

    def preadv(fd, buffers, offset):
        calls.append(len(buffers[0]))
        if calls[-1] > 10_000:
            os.truncate(source / BIN, 20_000)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    refused(source, tmp_path / "out", [BIN, "changed"], begun=True)


# Malicious pickles. `call` puts a payload into instructions: it makes the marker, if it ever runs.

EVIL = {}
MARKER = "marker"


def evil(*words):
    """Enters a pickle into the table: a function of the payload, as an argument of exec."""

    def enter(make):
        EVIL[make.__name__.replace("_", "-")] = (make, words)
        return make

    return enter


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


class Reduces:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@evil("__builtin__.exec")
def protocol_2(code):
    return pickle.dumps({"a": Reduces(builtins.exec, (code,))}, 2)


@evil("builtins.exec")
def protocol_4_with_stack_global(code):
    return pickle.dumps({"a": Reduces(builtins.exec, (code,))}, 4)


@evil("builtins.exec")
def protocol_5_with_frames(code):
    return pickle.dumps([Reduces(builtins.exec, (code,)), "x" * 70_000], 5)


@evil("__builtin__.exec")
def protocol_0_in_text(code):
    return pickle.dumps(Reduces(builtins.exec, (code,)), 0)


@evil("posix.system")
def shell_command(code):
    return pickle.dumps(Reduces(os.system, (f"{sys.executable} -c {code!r}",)), 2)


@evil("builtins.exec")
def instance_by_inst(code):
    return b"\x80\x02(" + text(code) + b"ibuiltins\nexec\n."


@evil("builtins.exec")
def instance_by_obj(code):
    return b"\x80\x02(cbuiltins\nexec\n" + text(code) + b"o."


@evil("functools.partial")
def object_by_newobj_ex(code):
    # partial.__new__(partial, exec, code) does not run it: the call of that object does.
    inner = b"\x80\x04cfunctools\npartial\n" + b"(cbuiltins\nexec\n" + text(code) + b"t}\x92"
    return inner + b")R."


@evil("functools.partial")
def object_by_newobj(code):
    return b"\x80\x02cfunctools\npartial\n(cbuiltins\nexec\n" + text(code) + b"t\x81)R."


@evil("builtins.exec")
def stack_global_from_the_memo(code):
    named = text("builtins") + b"q\x010" + text("exec") + b"q\x020"
    return b"\x80\x04" + named + b"h\x01h\x02\x93" + text(code) + b"\x85R."


@evil("unsafe", "MEMOIZE")
def stack_global_with_a_memo_shifted_by_memoize(code):
    named = text("collections") + b"\x940" + text("builtins") + b"\x940" + text("exec") + b"\x940"
    return b"\x80\x02" + named + b"h\x01h\x02\x93" + text(code) + b"\x85R."


@evil("builtins.exec")
def stack_global_of_short_strings(code):
    return b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + text(code) + b"\x85R."


@evil("os.system.__call__")
def dotted_name(code):
    command = f"{sys.executable} -c {code!r}"
    return b"\x80\x04" + text("os") + text("system.__call__") + b"\x93" + text(command) + b"\x85R."


@evil("builtins.getattr")
def allowed_module_with_a_dotted_name(code):
    """From collections._sys.modules every module can be reached."""
    modules = text("collections") + text("_sys.modules.__getitem__") + b"\x93"
    system = b"cbuiltins\ngetattr\n(" + modules + text("os") + b"\x85R" + text("system") + b"tR"
    return b"\x80\x04" + system + text(f"{sys.executable} -c {code!r}") + b"\x85R."


@evil("builtins.getattr")
def method_of_a_string(code):
    """str.format reads attributes, and getattr reaches the rest."""
    method = b"cbuiltins\ngetattr\n(" + text("{0.__class__}") + text("format") + b"tR"
    run = b"cbuiltins\nexec\n" + text(code) + b"\x85R"
    return b"\x80\x02" + method + run + b"\x85R."


@evil("unsafe", "EXT1")
def extension_registry(code):
    return b"\x80\x02\x82\xf0" + text(code) + b"\x85R."


@evil("unsafe", "EXT4")
def extension_registry_of_four_bytes(code):
    return b"\x80\x02\x84\xf0\0\0\0" + text(code) + b"\x85R."


@evil("unsafe", "PERSID")
def persistent_id_in_text(code):
    return b"\x80\x02Pexec\n" + text(code) + b"\x85R."


@evil("unsafe", "a reference to something other than a storage")
def persistent_id_of_another_kind(code):
    return b"\x80\x02" + text("exec") + b"Q" + text(code) + b"\x85R."


@evil("builtins.exec")
def broken_after_it_ran(code):
    return b"\x80\x02cbuiltins\nexec\n" + text(code) + b"\x85R\xff\xff\xff"


@evil("builtins.exec")
def cut_off_after_it_ran(code):
    return b"\x80\x02cbuiltins\nexec\n" + text(code) + b"\x85R(X\xff\xff\xff\x7f"


@evil("builtins.exec")
def underflow_after_it_ran(code):
    return b"\x80\x02cbuiltins\nexec\n" + text(code) + b"\x85R0000."


@evil("collections.UserDict")
def set_by_build(code):
    class_ = b"ccollections\nUserDict\n)\x81"
    state = b"}" + text("a") + b"cbuiltins\nexec\n" + text(code) + b"\x85Rs"
    return b"\x80\x02" + class_ + state + b"b."


@evil("builtins.exec")
def key_of_a_dict(code):
    return b"\x80\x02}(cbuiltins\nexec\n" + text(code) + b"\x85RK\x01u."


@evil("builtins.exec")
def hidden_in_the_versions_of_a_state_dict(code):
    state = b"}" + text("_metadata") + b"cbuiltins\nexec\n" + text(code) + b"\x85Rs"
    return b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"b."


@evil("pickle.loads")
def pickle_inside_a_pickle(code):
    inner = b"\x80\x02cbuiltins\nexec\n" + text(code) + b"\x85R."
    return pickle.dumps(Reduces(pickle.loads, (inner,)), 2)


@evil("unsafe", "bytes after its end")
def two_pickles_in_one_stream(code):
    return b"\x80\x02}." + b"\x80\x02cbuiltins\nexec\n" + text(code) + b"\x85R."


@evil("torch.hub.load")
def function_of_torch_itself(code):
    run = b"cbuiltins\nexec\n" + text(code) + b"\x85R0"
    return b"\x80\x02ctorch.hub\nload\n0" + run + b"N."


@evil("torch.load")
def torchs_own_unpickler(code):
    """torch.load(BytesIO(...), None, pickle), which is not weights_only."""
    raw = io.BytesIO()
    torch.save(Reduces(builtins.exec, (code,)), raw)
    body = b"c_codecs\nencode\n" + text(raw.getvalue().decode("latin1")) + text("latin1")
    stream = b"cio\nBytesIO\n" + body + b"\x86R\x85R"
    return b"\x80\x02ctorch\nload\n(" + stream + b"Nctorch.serialization\npickle\ntR."


def runs(raw):
    """Runs a pickle as Python's own reader does, with all that such a file could count on."""

    class Reader(pickle.Unpickler):
        def persistent_load(self, identity):
            return exec

    copyreg.add_extension("builtins", "exec", 0xF0)
    stream = io.BytesIO(raw)
    # After it ran, most of them are broken, or call something that takes no such call.
    with contextlib.suppress(Exception):
        while stream.tell() < len(raw):
            Reader(stream).load()
    copyreg.remove_extension("builtins", "exec", 0xF0)
    return os.path.exists(MARKER)


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """An empty folder to stand in, and code that leaves its marker there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return f"open({MARKER!r},'w')"


@pytest.mark.parametrize("name", EVIL)
def test_a_payload_never_runs(bin_of, marked, tmp_path, capsys, name):
    make, words = EVIL[name]
    raw = make(marked)
    assert runs(raw), "the payload itself does not work"
    os.unlink(MARKER)
    source = bin_of("single")
    for content in ({"archive/data.pkl": raw, "archive/version": b"3\n"}, None):
        if content is None:
            (source / BIN).write_bytes(raw)  # the pickle by itself, as before torch 1.6
        else:
            write_archive(source / BIN, content)
        assert main(["convert", str(source), str(tmp_path / "out")]) == 3
        said = capsys.readouterr().err
        assert "unsafe" in said
        assert said.count("\n") == 1
        assert not os.path.exists(MARKER)
        assert not (tmp_path / "out").exists()
        if content is not None:
            assert all(word in said for word in words), said


def test_a_checkpoint_with_a_payload_among_its_tensors(bin_of, marked, tmp_path):
    source = bin_of("single")
    weights = torch.load(source / BIN, weights_only=True)
    torch.save(weights | {"extra": Reduces(builtins.exec, (marked,))}, source / BIN)
    refused(source, tmp_path / "out", ["unsafe", "__builtin__.exec"], allow_extra=True)
    assert not os.path.exists(MARKER)


def test_the_instructions_alone_decide_whatever_the_names_are_called():
    assert list(asked_for(protocol_4_with_stack_global("1"))) == ["builtins.exec"]
    assert list(asked_for(b"\x80\x02garbage")) == []


# Malicious archives. Each holds a good checkpoint for one reader and a payload for another, or
# would take more than there is.


@pytest.fixture
def good(published, tmp_path):
    """The entries of a good archive."""
    folder = as_bin(published("single"), tmp_path / "good")
    return {f"archive/{k.partition('/')[2]}": v for k, v in read_archive(folder / BIN).items()}


def payload(code):
    return b"\x80\x02cbuiltins\nexec\n" + text(code) + b"\x85R."


ARCHIVES = {
    "another-folder": ({"other/data.pkl": payload}, "2 folders"),
    "other-case": ({"archive/DATA.PKL": payload}, "two entries named"),
    "folder-of-other-case": ({"Archive/data.pkl": payload}, "two entries named"),
    "path-upwards": ({"../../evil.pkl": payload}, "'../../evil.pkl'"),
    "path-inside": ({"archive/../data.pkl": payload}, "'archive/../data.pkl'"),
    "absolute-path": ({"/etc/data.pkl": payload}, "'/etc/data.pkl'"),
    "backslashes": ({"archive\\data.pkl": payload}, r"archive\\data.pkl"),
    "drive": ({"c:/data.pkl": payload}, "'c:/data.pkl'"),
    "no-folder": ({"data.pkl": payload}, "'data.pkl'"),
    "a-folder-itself": ({"archive/": b""}, "'archive/'"),
    "control-characters": ({"archive/a\x1bb": b""}, r"'archive/a\x1bb'"),
    "deeper": ({"archive/data/data.pkl": payload}, "data/data.pkl"),
    "another-pickle": ({"archive/evil.pkl": payload}, "evil.pkl"),
    "torchscript": ({"archive/constants.pkl": payload, "archive/code/a.py": b""}, "TorchScript"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_with_more_in_them(bin_of, good, marked, tmp_path, name):
    more, word = ARCHIVES[name]
    source = bin_of("single")
    more = {k: make(marked) if callable(make) else make for k, make in more.items()}
    for entries in (good | more, more | good):
        write_archive(source / BIN, entries)
        refused(source, tmp_path / "out", ["unsafe", word])
        assert not os.path.exists(MARKER)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_pickles_of_one_name(bin_of, good, marked, tmp_path):
    source = bin_of("single")
    for first, second in ((good["archive/data.pkl"], payload(marked)), (payload(marked), b"")):
        with zipfile.ZipFile(source / BIN, "w") as archive:
            archive.writestr("archive/data.pkl", first)
            archive.writestr("archive/data.pkl", second)
        refused(source, tmp_path / "out", ["unsafe", "two entries named 'archive/data.pkl'"])


def test_a_pickle_of_the_old_form_before_the_archive(bin_of, marked, tmp_path):
    """torch decides by the first bytes, a zip reader by the last."""
    source = bin_of("single")
    (source / BIN).write_bytes(payload(marked) + (source / BIN).read_bytes())
    refused(source, tmp_path / "out", ["unsafe", "builtins.exec"])
    assert not os.path.exists(MARKER)


def test_something_behind_the_archive(bin_of, marked, tmp_path):
    source = bin_of("single")
    with open(source / BIN, "ab") as file:
        file.write(payload(marked))
    refused(source, tmp_path / "out", ["followed by other bytes"])


def test_a_comment_that_holds_another_end(bin_of, good, tmp_path):
    source = bin_of("single")
    with zipfile.ZipFile(source / BIN, "a") as archive:
        archive.comment = (source / BIN).read_bytes()[-22:]
    refused(source, tmp_path / "out", ["unsafe", "not where it says"])


@pytest.mark.parametrize("entry", ["archive/data.pkl", "archive/data/3"])
def test_compressed_entries_are_refused_whatever_they_unpack_to(bin_of, good, tmp_path, entry):
    source = bin_of("single")
    bomb = good | {entry: bytes(50_000_000)}
    write_archive(source / BIN, bomb, compressed=(entry,))
    assert (source / BIN).stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        words = ["archive bomb", "limit", "50000000", repr(entry)]
        refused(source, tmp_path / "out", words)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def directory_of(raw):
    """Offset of the table of contents, and of each of its entries by name."""
    start = struct.unpack_from("<L", raw, len(raw) - 6)[0]
    at, found = start, {}
    while raw[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<3H", raw, at + 28)
        found[raw[at + 46 : at + 46 + lengths[0]].decode()] = at
        at += 46 + sum(lengths)
    return start, found


def patched(at, form, value):
    def change(raw, entries):
        struct.pack_into(form, raw, entries["archive/data/3"] + at, value)

    return change


PATCHES = {
    "encrypted": (patched(8, "<H", 1), "flags"),
    "size-beyond-the-file": (patched(24, "<L", 1 << 30), "archive bomb"),
    "both-sizes-beyond-the-file": (
        patched(20, "<Q", (1 << 30) * ((1 << 32) + 1)),
        "is another one",
    ),
    "offset-beyond-the-file": (patched(42, "<L", 1 << 30), "beyond the data"),
    "sizes-of-64-bits-that-are-not-there": (patched(24, "<L", 0xFFFFFFFF), "64-bit sizes"),
    "longer-name": (patched(28, "<H", 60_000), "other entries"),
    "another-disk": (patched(34, "<H", 1), "other entries"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_archives_that_contradict_themselves(bin_of, good, tmp_path, name):
    change, word = PATCHES[name]
    source = bin_of("single")
    write_archive(source / BIN, good)
    raw = bytearray((source / BIN).read_bytes())
    change(raw, directory_of(raw)[1])
    (source / BIN).write_bytes(raw)
    refused(source, tmp_path / "out", [word, BIN])


def test_an_entry_whose_own_header_has_another_name(bin_of, good, tmp_path):
    source = bin_of("single")
    write_archive(source / BIN, good)
    raw = (source / BIN).read_bytes().replace(b"archive/data.pkl", b"archive/data.pkI", 1)
    (source / BIN).write_bytes(raw)
    refused(source, tmp_path / "out", ["unsafe", "another one than its table says"])


def test_overlapping_entries_are_a_bomb(bin_of, good, tmp_path):
    source = bin_of("single")
    inner = {"archive/data/0": bytes(100) + b"PK\3\4" + bytes(200)}
    write_archive(source / BIN, good | inner)
    raw = bytearray((source / BIN).read_bytes())
    entries = directory_of(raw)[1]
    # data/1 claims what data/0 holds: the same bytes, and a header of its own name before them.
    at = raw.index(b"PK\3\4", raw.index(b"archive/data/0") + 20)
    name = b"archive/data/1"
    raw[at : at + 30 + len(name)] = (
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0) + name
    )
    struct.pack_into("<3L", raw, entries["archive/data/1"] + 16, 0, 50, 50)
    struct.pack_into("<L", raw, entries["archive/data/1"] + 42, at)
    (source / BIN).write_bytes(raw)
    refused(source, tmp_path / "out", ["archive bomb", "overlaps another"])


def test_too_many_entries(bin_of, tmp_path, monkeypatch):
    monkeypatch.setattr("jlayer.convert.sources.archive.MAX_ENTRIES", 20)
    refused(bin_of("single"), tmp_path / "out", ["archive bomb", "over the limit of 20"])


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("torchfile.MAX_PICKLE_BYTES", ["over the limit of 200"]),
        ("pickles.MAX_INSTRUCTIONS", ["200", "the limit"]),
    ],
)
def test_pickles_have_limits(bin_of, tmp_path, monkeypatch, limit, words):
    monkeypatch.setattr(f"jlayer.convert.sources.{limit}", 200)
    refused(bin_of("single"), tmp_path / "out", words)


def with_pickle(good, change):
    return good | {"archive/data.pkl": change(good["archive/data.pkl"])}


def dumped(*arguments, key="0", n=3192, kind=b"ctorch\nFloatStorage\n", tail=b"\x89"):
    """A pickle of one tensor: storage, offset, sizes, strides, as they are given."""
    offset, sizes, strides = arguments
    identity = b"(" + text("storage") + kind + text(key) + text("cpu") + number(n) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    views = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (sizes, strides))
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + number(offset) + views
    return b"\x80\x02}" + text("a") + body + tail + hooks + b"tRs."


def number(n):
    raw = n.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (dumped(0, (133, 24), (24, 1), key="99"), ["storage '99' is missing"]),
        (dumped(0, (133, 24), (24, 1), n=3193), ["12768 bytes, expected 12772"]),
        (dumped(0, (133, 24), (24, 1), n=1 << 60), ["expected 4611686018427387904 bytes"]),
        (dumped(0, (133, 24), (25, 1)), ["strides [25, 1]", "3192"]),
        (dumped(1, (133, 24), (24, 1)), ["reaches to element 3193 of the 3192"]),
        (dumped(0, (1 << 61, 2), (1 << 61, 1)), ["reaches to element"]),
        (dumped(-1, (133, 24), (24, 1)), ["unsafe", "make no tensor"]),
        (dumped(0, (-133, 24), (24, 1)), ["unsafe", "make no tensor"]),
        (dumped(0, (133, 24), (-24, 1)), ["unsafe", "make no tensor"]),
        (dumped(0, (133, 24), (1,)), ["unsafe", "make no tensor"]),
        (dumped(0, [1] * 9, [1] * 9), ["unsafe", "make no tensor"]),
        (dumped(0, (133, 24), (24, 1), kind=b"ccollections\nOrderedDict\n"), ["no known kind"]),
        (dumped(0, (133, 24), (24, 1), key="../0"), ["storage '../0' is missing"]),
        (dumped(0, (133, 24), (24, 1), tail=b"N"), ["unsafe", "make no tensor"]),
    ],
)
def test_tensors_that_reach_beyond_their_storage(bin_of, good, tmp_path, pickled, words):
    source = bin_of("single")
    size = 4 * 3192
    entries = {"archive/data.pkl": pickled, "archive/data/0": bytes(size)}
    write_archive(source / BIN, entries)
    refused(source, tmp_path / "out", words)


def test_that_pickle_with_nothing_wrong(table_of, tmp_path):
    """What the ones above are made of is read: so each is refused for what it says."""
    entries = {"data.pkl": dumped(0, (133, 24), (24, 1)), "data/0": bytes(12768), "version": b"3"}
    write_archive(tmp_path / "x.bin", {f"archive/{name}": raw for name, raw in entries.items()})
    assert table_of(None) == {"a": bytes(12768)}


def test_a_key_twice(bin_of, good, tmp_path):
    source = bin_of("single")
    once = dumped(0, (133, 24), (24, 1))  # PROTO, EMPTY_DICT, key, tensor, SETITEM, STOP
    twice = once[:-1] + once[3:]
    write_archive(source / BIN, {"archive/data.pkl": twice, "archive/data/0": bytes(12768)})
    refused(source, tmp_path / "out", ["'a'", "twice"])


def test_a_damaged_pickle(bin_of, tmp_path):
    source = bin_of("single")
    raw = bytearray((source / BIN).read_bytes())
    raw[raw.index(b"_rebuild_tensor_v2") + 3] ^= 1
    (source / BIN).write_bytes(raw)
    refused(source, tmp_path / "out", ["data.pkl is damaged", "CRC-32"])


def test_big_endian_archives(bin_of, good, tmp_path):
    source = bin_of("single")
    write_archive(source / BIN, good | {"archive/byteorder": b"big"})
    refused(source, tmp_path / "out", ["byte order"])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (text("exec") + text("1") + b"\x85R.", ["a call of a str"]),
        (b"ccollections\nOrderedDict\n(K\x01tR.", ["a call of collections.OrderedDict"]),
        (b"ctorch\nFloatStorage\n)R.", ["a call of torch.FloatStorage"]),
        (b"ccollections\nOrderedDict\n)R}" + text("get") + b"Nsb.", ["state other than"]),
        (b"}}b.", ["BUILD on a dict"]),
        (b"}K\x01a.", ["APPEND on a dict"]),
        (b"]" + text("a") + b"K\x01s.", ["SETITEM on a list"]),
        (b")K\x01\x85R.", ["a call of a tuple"]),
        (b"K\x01\x87.", ["damaged"]),
        (b"h\x07.", ["damaged"]),
        (b"u.", ["damaged"]),
        (b"0.", ["POP"]),
        (b"}2.", ["DUP"]),
        (b"}", ["damaged"]),
        (b"", ["damaged"]),
        (b"\x80\x02.", ["damaged"]),
        (b"\x8b\xff\xff\xff\x7f.", ["damaged"]),
        (b"\x8d" + b"\xff" * 8 + b".", ["damaged"]),
        (b"L" + b"9" * 6000 + b"L\n.", ["damaged"]),
    ],
)
def test_instructions_that_make_no_table(bin_of, tmp_path, raw, words):
    source = bin_of("single")
    write_archive(source / BIN, {"archive/data.pkl": b"\x80\x02" + raw})
    refused(source, tmp_path / "out", ["unsafe", *words])


def test_nesting_without_end(bin_of, tmp_path):
    source = bin_of("single")
    for raw in (b"\x80\x02" + b"(" * 100_000 + b".", b"\x80\x02)" + b"\x85" * 300_000 + b"."):
        write_archive(source / BIN, {"archive/data.pkl": raw})
        assert re.search("nested|holds a tuple", refused(source, tmp_path / "out", []))


def test_a_file_that_torch_reads_in_another_way(bin_of, tmp_path, monkeypatch):
    """Should our reader and torch's ever differ, neither is believed."""
    source, real = bin_of("single"), torch.load

    def load(*arguments, **options):
        found = real(*arguments, **options)
        return found | {NORM: found[NORM][1:]}

    monkeypatch.setattr(torch, "load", load)
    refused(source, tmp_path / "out", ["unsafe", NORM, "to torch"])


def test_what_torch_refuses_is_refused(bin_of, tmp_path, monkeypatch):
    calls = []

    def load(*arguments, **options):
        calls.append(options)
        raise pickle.UnpicklingError("no\nand no")

    monkeypatch.setattr(torch, "load", load)
    refused(bin_of("single"), tmp_path / "out", ["torch", "UnpicklingError: no and no"])
    assert [options["weights_only"] for options in calls] == [True]


def test_the_table_holds_twenty_ways_and_more():
    assert len(EVIL) >= 20
