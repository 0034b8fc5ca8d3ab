"""Orbax in and out, and export: equal bytes all the way round, refusals, and what a kill leaves."""

import json
import os
import shutil
import subprocess
import sys

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np
import pytest

from jlayer.app.cli import main
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint, export
from jlayer.convert.export import export_checkpoint
from jlayer.convert.sources import orbax
from jlayer.convert.target.disk import TEMPORARY
from jlayer.errors import CheckpointError, JlayerError, UsageError
from tests.convert.checkpoints import (
    NUMPY,
    edit_json,
    files_of,
    random_checkpoint,
    read_tensors,
)
from tests.convert.test_zarr import counted_frames

KINDS = ["single", "tied", "biased", "bfloat16", "float16"]
CONFIG = "config.json"


def arrays_of(source):
    """name -> numpy array, of a published folder."""
    return {
        name: np.frombuffer(data, NUMPY[dtype]).reshape(shape)
        for name, (dtype, shape, data) in read_tensors(source).items()
    }


def nested(arrays):
    tree = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        home = tree
        for key in path:
            home = home.setdefault(key, {})
        home[last] = array
    return tree


def stacked(arrays):
    """Layers joined along a first axis, under names without their number."""
    rest = {name: array for name, array in arrays.items() if "model.layers." not in name}
    layers = {}
    for name in sorted(set(arrays) - set(rest)):
        _, _, number, leaf = name.split(".", 3)
        layers.setdefault(f"model.layers.{leaf}", {})[int(number)] = arrays[name]
    return rest | {
        name: np.stack([own[layer] for layer in range(len(own))]) for name, own in layers.items()
    }


def listed_layers(arrays):
    tree = nested(arrays)
    layers = tree["model"]["layers"]
    tree["model"]["layers"] = [layers[str(n)] for n in range(len(layers))]
    return tree


def save(folder, tree, source, *, config_in="folder"):
    """Saves as Orbax's users do."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    home = folder if config_in == "folder" else folder.parent
    shutil.copy(source / CONFIG, home / CONFIG)
    return folder


def save_with(folder, tree, source, **options):
    """Saves with options of Orbax's handler."""
    import orbax.checkpoint as ocp

    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(folder, tree)
    shutil.copy(source / CONFIG, folder / CONFIG)
    return folder


def save_without_ocdbt(folder, tree, source):
    return save_with(folder, tree, source, use_ocdbt=False, use_zarr3=True)


def on_two_devices(arrays):
    """Each array cut in halves, some along rows and some across: so Orbax cuts its chunks."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def cut(name, array):
        even = [axis for axis, size in enumerate(array.shape) if size % 2 == 0]
        axis = even[-1 if "mlp" in name else 0]
        spec = PartitionSpec(*("x" if n == axis else None for n in range(array.ndim)))
        return jax.device_put(array, NamedSharding(mesh, spec))

    return {name: cut(name, array) for name, array in arrays.items()}


def save_packed_otherwise(folder, tree, source):
    """As another program might: one array in gzip, which is left to tensorstore."""
    import tensorstore as ts

    save_with(folder, tree, source, use_ocdbt=False)
    path = folder / "model.layers.mlp.up_proj.weight"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    array = ts.open(spec, open=True).result().read().result()
    metadata = {"shape": array.shape, "chunks": array.shape, "compressor": {"id": "gzip"}}
    spec |= {"metadata": metadata, "dtype": "bfloat16"}
    ts.open(spec, create=True, delete_existing=True).result().write(array).result()
    return folder


def save_steps(folder, tree, source, item):
    """A CheckpointManager's folder; returns that of its last step."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        for step in (3, 7):
            args = ocp.args.StandardSave(tree)
            if item != "default":
                args = ocp.args.Composite(**{item: args})
            manager.save(step, args=args)
        manager.wait_until_finished()
    shutil.copy(source / CONFIG, folder / CONFIG)
    return folder / "7"


@pytest.fixture(scope="module")
def plain(published):
    """A checkpoint of three layers, its arrays, and what it is converted to."""
    from pathlib import Path

    source = Path(published("bfloat16"))
    return source, arrays_of(source)


@pytest.fixture(scope="module")
def expected(plain, tmp_path_factory):
    target = tmp_path_factory.mktemp("expected") / "layered"
    convert_checkpoint(plain[0], target)
    return read_tensors(target)


SAVES = {
    "nested": lambda folder, arrays, source: save(folder, nested(arrays), source),
    "flat": lambda folder, arrays, source: save(folder, arrays, source, config_in="parent"),
    "list": lambda folder, arrays, source: save(folder, listed_layers(arrays), source),
    "stacked": lambda folder, arrays, source: save(folder, nested(stacked(arrays)), source),
    "zarr3-files": lambda folder, arrays, source: save_without_ocdbt(
        folder, nested(arrays), source
    ),
    "stacked-cut": lambda folder, arrays, source: save(
        folder, on_two_devices(stacked(arrays)), source
    ),
    "stacked-zarr3": lambda folder, arrays, source: save_with(
        folder, on_two_devices(stacked(arrays)), source, use_zarr3=True
    ),
    "stacked-plain": lambda folder, arrays, source: save_with(
        folder, stacked(arrays), source, use_compression=False
    ),
    "stacked-otherwise": lambda folder, arrays, source: save_packed_otherwise(
        folder, stacked(arrays), source
    ),
    "step": lambda folder, arrays, source: save_steps(folder, nested(arrays), source, "default"),
    "step-params": lambda folder, arrays, source: save_steps(
        folder, nested(stacked(arrays)), source, "params"
    ),
}


@pytest.mark.parametrize("kind", SAVES)
def test_what_orbax_has_saved_is_converted_to_equal_bytes(plain, expected, tmp_path, kind):
    source, arrays = plain
    folder = SAVES[kind](tmp_path / "saved", arrays, source)
    done = convert_checkpoint(folder, tmp_path / "layered")
    assert read_tensors(tmp_path / "layered") == expected
    assert convert_checkpoint(folder, tmp_path / "layered").status == "unchanged"
    assert done.n_layers == 3


@pytest.mark.parametrize("kind", KINDS)
def test_all_the_way_round_every_tensor_has_equal_bytes(published, tmp_path, kind):
    """safetensors → layered → Orbax → layered → Hugging Face."""
    from pathlib import Path

    source = Path(published(kind))
    steps = [tmp_path / name for name in ("one", "orbax", "two", "shards")]
    convert_checkpoint(source, steps[0])
    export_checkpoint(steps[0], steps[1], format="orbax")
    convert_checkpoint(steps[1], steps[2])
    export_checkpoint(steps[2], steps[3], format="huggingface", shard_bytes=15_000)
    tensors = read_tensors(source)
    for folder in (steps[0], steps[2], steps[3]):
        assert read_tensors(folder) == tensors
    assert len(list(steps[3].glob("model-0000?-of-0000?.safetensors"))) > 3
    assert (steps[3] / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
    assert Store(steps[3]).cfg == Store(source).cfg
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(s.name for s in steps)


def test_orbax_and_transformers_read_what_is_exported(plain, expected, tmp_path):
    import orbax.checkpoint as ocp
    from transformers import AutoModelForCausalLM

    source, arrays = plain
    convert_checkpoint(source, tmp_path / "layered")
    export_checkpoint(tmp_path / "layered", tmp_path / "orbax", format="orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "orbax")
    for name, array in arrays.items():
        found = tree
        for key in name.split("."):
            found = found[key]
        assert np.array_equal(np.asarray(found), array)
    export_checkpoint(tmp_path / "layered", tmp_path / "hf", format="huggingface")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.state_dict().keys() == arrays.keys()


def test_everything_wrong_with_a_tree_is_said_at_once(plain, tmp_path):
    source, arrays = plain
    arrays = dict(arrays)
    arrays["stray.weight"] = arrays.pop("model.layers.1.mlp.up_proj.weight")
    arrays["model.norm.weight"] = arrays["model.norm.weight"][:-1]
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.int32)
    folder = save(tmp_path / "saved", nested(arrays), source)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder, tmp_path / "layered")
    for words in (
        *("missing: model.layers.1.mlp.up_proj.weight", "stray.weight", "see --allow-extra"),
        *("[23], by config.json [24]", "lm_head.weight in _METADATA is int32"),
    ):
        assert words in str(caught.value)


def refused(folder, tmp_path, *words):
    with pytest.raises(JlayerError) as caught:
        convert_checkpoint(folder, tmp_path / "layered")
    assert caught.value.exit_code == 3
    assert [word for word in words if word not in str(caught.value)] == []
    assert not (tmp_path / "layered").exists()


def test_stacked_layers_must_be_as_many_as_the_config_has(plain, tmp_path):
    source, arrays = plain
    folder = save(tmp_path / "saved", nested(stacked(arrays)), source)
    edit_json(folder / CONFIG, num_hidden_layers=4)
    refused(folder, tmp_path, "model.layers.mlp.up_proj.weight is [3, ", "config.json has 4")


def test_a_layer_by_itself_and_in_the_stack_is_refused(plain, tmp_path):
    source, arrays = plain
    name = "model.layers.1.mlp.up_proj.weight"
    folder = save(tmp_path / "saved", {**stacked(arrays), name: arrays[name]}, source)
    refused(folder, tmp_path, f"{name} is there by itself and in the stacked")


def test_a_tied_head_that_is_there_too_is_compared_with_the_embedding(published, tmp_path):
    """Also where one is in two chunks side by side, and read in whole rows. One that differs is a
    head of its own, as in transformers."""
    from pathlib import Path

    source = Path(published("tied"))
    convert_checkpoint(source, tmp_path / "expected")
    arrays = arrays_of(source)
    head = arrays["model.embed_tokens.weight"].copy()
    (cut,) = on_two_devices({"lm_head.weight": head}).values()
    folder = save(tmp_path / "same", arrays | {"lm_head.weight": cut}, source)
    convert_checkpoint(folder, tmp_path / "layered")
    assert read_tensors(tmp_path / "layered") == read_tensors(tmp_path / "expected")
    head[-1, -1] += 1
    folder = save(tmp_path / "other", arrays | {"lm_head.weight": head}, source)
    notes = convert_checkpoint(folder, tmp_path / "apart").notes
    assert any("lm_head.weight" in note and "differs" in note for note in notes)
    assert read_tensors(tmp_path / "apart") == {
        **read_tensors(tmp_path / "expected"),
        "lm_head.weight": ("F32", head.shape, head.tobytes()),
    }
    assert not json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"]


WRAPPED = {
    "params": lambda arrays: {"params": nested(arrays)},
    "params-twice": lambda arrays: {"params": {"params": nested(arrays)}},
    "params-stacked": lambda arrays: {"params": stacked(arrays)},
    "params-without-model": lambda arrays: {"params": nested(without_model(arrays))},
    "without-model": lambda arrays: nested(without_model(arrays)),
    "without-model-stacked": lambda arrays: without_model(stacked(arrays)),
}


def without_model(arrays):
    return {name.removeprefix("model."): array for name, array in arrays.items()}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_tree_under_one_name_or_without_model(plain, expected, tmp_path, kind):
    source, arrays = plain
    folder = save(tmp_path / "saved", WRAPPED[kind](arrays), source)
    convert_checkpoint(folder, tmp_path / "target")
    assert read_tensors(tmp_path / "target") == expected


def test_of_a_trainers_state_the_weights_are_taken(plain, expected, tmp_path):
    source, arrays = plain
    moments = {name: np.zeros_like(array) for name, array in arrays.items()}
    state = {"opt_state": {"mu": nested(moments)}, "step": np.ones(1, np.int32)}
    tree = {"params": nested(arrays), **state}
    folder = save(tmp_path / "saved", tree, source)
    refused(folder, tmp_path, "opt_state.mu.model.norm.weight", "step", "--allow-extra")
    convert_checkpoint(folder, tmp_path / "target", allow_extra=True)
    assert read_tensors(tmp_path / "target") == expected


def test_a_save_that_did_not_end_is_refused(plain, tmp_path):
    source, arrays = plain
    folder = save(tmp_path / "saved.orbax-checkpoint-tmp-1", nested(arrays), source)
    refused(folder, tmp_path, "unfinished Orbax save")
    (tmp_path / "step" / "default.orbax-checkpoint-tmp-2").mkdir(parents=True)
    refused(tmp_path / "step", tmp_path, "default.orbax-checkpoint-tmp-2", "unfinished")


def test_of_several_steps_one_is_to_be_named(plain, tmp_path):
    source, arrays = plain
    save_steps(tmp_path / "steps", nested(arrays), source, "default")
    refused(tmp_path / "steps", tmp_path, "holds the steps 3, 7", "steps/7")


def test_without_a_config_beside_it(plain, tmp_path):
    source, arrays = plain
    folder = save(tmp_path / "saved", nested(arrays), source)
    (folder / CONFIG).unlink()
    refused(folder, tmp_path, "config.json: missing", "one folder up")


def test_a_damaged_or_missing_chunk_is_found(plain, tmp_path):
    source, arrays = plain
    folder = save_without_ocdbt(tmp_path / "saved", nested(arrays), source)
    (chunk,) = (folder / "model.norm.weight" / "c").rglob("*")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"array model\.norm\.weight cannot be read"):
        convert_checkpoint(folder, tmp_path / "layered")
    chunk.unlink()
    with pytest.raises(CheckpointError, match=r"array model\.norm\.weight cannot be read"):
        convert_checkpoint(folder, tmp_path / "again")


def test_metadata_that_is_none_is_refused(plain, tmp_path):
    source, arrays = plain
    folder = save(tmp_path / "saved", nested(arrays), source)
    for content, words in (
        ("{}", "not what Orbax writes"),
        ('{"tree_metadata": {"a": []}}', "not what Orbax writes"),
        ("[", "not JSON"),
        (
            '{"tree_metadata": {"a": {"key_metadata": [{"key": "../x"}], "value_metadata": {}}}}',
            "not names",
        ),
    ):
        (folder / "_METADATA").write_text(content)
        refused(folder, tmp_path, "_METADATA", words)


def test_an_orbax_checkpoint_does_not_run_in_place_and_the_command_is_told(plain, tmp_path):
    source, arrays = plain
    folder = save(tmp_path / "saved", nested(arrays), source)
    with pytest.raises(CheckpointError, match=f"jlayer convert {folder} {folder}-jlayer"):
        Store(folder)


# Export.


@pytest.fixture(scope="module")
def layered(plain, tmp_path_factory):
    target = tmp_path_factory.mktemp("layered") / "layered"
    convert_checkpoint(plain[0], target)
    return target


@pytest.mark.parametrize("form", ["huggingface", "orbax"])
@pytest.mark.parametrize("nth", [0, 3, 100])
def test_an_export_that_is_cut_off_leaves_no_target_and_can_be_done_again(
    layered, tmp_path, monkeypatch, form, nth
):
    calls = []

    def stopping(real):
        def call(self, name, *arguments, **options):
            calls.append(name)
            if len(calls) > nth:
                raise KeyboardInterrupt
            return real(self, name, *arguments, **options)

        return call

    target = tmp_path / "out"
    options = {"format": form, "shard_bytes": 15_000}
    with monkeypatch.context() as patch:
        for kind in (export.TargetWriter, orbax.OrbaxWriter):
            patch.setattr(kind, "write", stopping(kind.write))
        if nth == 100:  # all is written, and only the name is missing
            patch.setattr(export, "_put_in_place", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            export_checkpoint(layered, target, **options)
    assert not target.exists()
    assert len(calls) > nth or nth == 100
    export_checkpoint(layered, target, **options)
    export_checkpoint(layered, tmp_path / "undisturbed", **options)
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == ["out", "undisturbed"]
    if form == "huggingface":
        assert files_of(target) == files_of(tmp_path / "undisturbed")
    else:
        convert_checkpoint(target, tmp_path / "back")
        assert read_tensors(tmp_path / "back") == read_tensors(layered)


def test_an_export_goes_on_with_the_shards_that_are_finished_and_right(
    layered, tmp_path, monkeypatch
):
    real, written = export.TargetWriter.write, []

    def write(self, name, *arguments, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(name)
        return real(self, name, *arguments, **options)

    monkeypatch.setattr(export.TargetWriter, "write", write)
    options = {"format": "huggingface", "shard_bytes": 15_000}
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(layered, tmp_path / "out", **options)
    first, *others = written
    (damaged,) = tmp_path.glob(f"out*/{first}")
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    written.clear()

    def noted(self, name, *arguments, **options):
        written.append(name)
        return real(self, name, *arguments, **options)

    monkeypatch.setattr(export.TargetWriter, "write", noted)
    done = export_checkpoint(layered, tmp_path / "out", **options)
    assert done.n_resumed == len(others) == 3
    assert written[0] == first
    assert not set(written) & set(others)
    export_checkpoint(layered, tmp_path / "undisturbed", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("kind", ["outside", "inside", "nowhere", "folder", "fifo"])
def test_what_is_no_file_in_an_unfinished_export_is_written_again(layered, tmp_path, kind):
    """A link has the right bytes, and may lead to what is removed, or changed later."""
    options = {"format": "huggingface", "shard_bytes": 15_000}
    export_checkpoint(layered, tmp_path / "undisturbed", **options)
    aside = shutil.copytree(tmp_path / "undisturbed", tmp_path / f"out{TEMPORARY}")
    shard = next(aside.glob("model-00002-*"))
    other = (aside if kind == "inside" else tmp_path) / "other"
    shard.rename(other)
    if kind == "folder":
        shard.mkdir()
    elif kind == "fifo":
        os.mkfifo(shard)
    else:
        shard.symlink_to(tmp_path / "none" if kind == "nowhere" else other)
    done = export_checkpoint(layered, tmp_path / "out", **options)
    assert done.n_resumed == len(list(aside.parent.glob("out/*.safetensors"))) - 1
    assert (tmp_path / "out" / shard.name).is_file()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_shard_whose_header_says_anything_else_is_written_again(layered, tmp_path):
    options = {"format": "huggingface", "shard_bytes": 15_000}
    export_checkpoint(layered, tmp_path / "undisturbed", **options)
    aside = shutil.copytree(tmp_path / "undisturbed", tmp_path / f"out{TEMPORARY}")
    shard = next(aside.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes().replace(b'"format":"pt"', b'"format":"qt"'))
    export_checkpoint(layered, tmp_path / "out", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("form", ["huggingface", "orbax"])
def test_a_flipped_bit_does_not_leave_the_layered_folder(layered, tmp_path, form):
    folder = shutil.copytree(layered, tmp_path / "copy")
    path = folder / "layer-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"layer-00001.*damaged"):
        export_checkpoint(folder, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_exports_that_are_refused(layered, plain, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for folder, target, code, words in (
        (layered, tmp_path / "full", 2, "is there already"),
        (layered, layered / "inside", 2, "inside the source"),
        (plain[0], tmp_path / "out", 3, "only a converted folder"),
        (tmp_path / "none", tmp_path / "out", 3, "no such folder"),
    ):
        assert main(["export", str(folder), str(target), "--format", "orbax"]) == code
        assert words in capsys.readouterr().err
    with pytest.raises(UsageError, match="did you mean 'orbax'"):
        export_checkpoint(layered, tmp_path / "out", format="orbx")
    assert (tmp_path / "full" / "mine").exists()


def test_nothing_is_written_inside_a_conversion(layered, plain, tmp_path, capsys):
    """A folder within it was a foreign file to the seal, and `verify` failed ever after."""
    other = shutil.copytree(layered, tmp_path / "other")
    started = tmp_path / "started"
    started.mkdir()
    (started / ".jlayer-journal").write_text("{}")
    (tmp_path / "manifest.json").write_text("{}")  # another program's
    before = sorted(other.iterdir())
    for within in (other / "sub", other / "a" / "b", started / "sub"):
        for words in (["convert", str(plain[0])], ["export", str(layered), "--format", "orbax"]):
            assert main([*words[:2], str(within), *words[2:]]) == 2
            assert "is inside the layered checkpoint" in capsys.readouterr().err
    assert sorted(other.iterdir()) == before
    assert main(["verify", str(other)]) == 0


def test_no_room_for_an_export_is_said_before_the_first_byte(layered, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    little = os.statvfs_result((*real[:3], 3, 3, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    for form in ("huggingface", "orbax"):
        with pytest.raises(JlayerError, match="need") as caught:
            export_checkpoint(layered, tmp_path / "out", format=form)
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("options", [{}, {"use_zarr3": True}, {"use_compression": False}])
def test_a_stacked_checkpoint_takes_less_memory_than_one_array(tmp_path, options):
    """Measured by the kernel in a process of its own, above what it holds before."""
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
    source = random_checkpoint(tmp_path / "source", **shape, vocab_size=1000)
    arrays = stacked(arrays_of(source))
    folder = save_with(tmp_path / "saved", nested(arrays), source, **options)
    largest = max(array.nbytes for array in arrays.values())
    code = (
        "import sys, tensorstore, threading, time, jlayer.convert\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().split('RssAnon:')\n"
        "    return int(lines[1].split()[0]) << 10\n"
        "peak, before = 0, anonymous()\n"
        "def watch():\n"
        "    global peak\n"
        "    while True: peak = max(peak, anonymous()); time.sleep(0.001)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "jlayer.convert.convert_checkpoint(sys.argv[1], sys.argv[2])\n"
        "print(peak - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "layered"],
        capture_output=True,
        text=True,
        check=True,
        # Arrays of a real size are mapped one by one, and given back; so are these, then.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"},
    )
    assert 1 << 20 < int(done.stdout) < 20 << 20 < largest, (int(done.stdout), largest)


def test_each_chunk_of_a_stacked_checkpoint_is_unpacked_once(
    plain, expected, tmp_path, monkeypatch
):
    """Though it holds a part of every layer, and they are written one by one."""
    source, arrays = plain
    folder = save(tmp_path / "saved", on_two_devices(stacked(arrays)), source)
    begun = counted_frames(monkeypatch)
    convert_checkpoint(folder, tmp_path / "layered")
    assert read_tensors(tmp_path / "layered") == expected
    assert len(begun) == 2 * len(stacked(arrays))
    convert_checkpoint(folder, tmp_path / "quantized", quantize="int8")
    assert len(begun) == 4 * len(stacked(arrays))
