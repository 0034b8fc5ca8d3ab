"""The verb `bench`: what it prints in which order."""

import json
from dataclasses import replace

import pytest

from jlayer.app.cli import main
from jlayer.app.verbs.bench import cores_lines, lanes_lines, row_line
from jlayer.measure import bench as measuring
from jlayer.measure import together
from jlayer.measure.cores import CoresMeasured
from jlayer.plan.machine import HostSpeeds
from jlayer.sizes import human


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measuring, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(measuring, "MOST_ROUNDS", 1)


def test_the_ceiling_comes_first_and_one_object_last(fable, tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "arithmetic_speeds", lambda *_: [1e12])  # it takes a while
    opened = []
    measure = measuring.Bench.measure_machine

    def first(self):
        opened.append(capsys.readouterr().out)
        measure(self)

    monkeypatch.setattr(measuring.Bench, "measure_machine", first)
    words = [str(fable), "--device", "cpu", "--host-memory", "4GiB", "--from-disk"]
    assert main(["bench", *words, "--timeline", str(tmp_path / "x.png")]) == 0
    (before,) = opened
    assert "ceiling   a forward pass uses 6.00 MiB of weights" in before
    assert "raw" not in before
    *lines, last = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for row in ("raw memory", "raw disk", "one layer alone   1 token", "forward pass      512 tok"):
        assert f"\n{row}" in f"\n{text}", row
    found = json.loads(last)
    assert lines[-1] == found["conclusion"]
    assert found["model"] == fable.name
    assert [row["tokens"] for row in found["sweeps"]] == [0, 1, 64, 512]
    assert found["sweeps"][1]["bytes"] == found["plan"]["sweep"]["bytes"]
    # The buffers of the raw reads are part of the promise.
    assert found["memory"]["host_budget_bytes"] == (4 << 30) - (32 << 20)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_without_ref_the_bundled_model_streams_from_disk(quick, capsys):
    assert main(["bench", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "fable-3m"
    assert found["plan"]["tiers"] == {"device_layers": 0, "host_layers": 0, "disk_layers": 6}
    assert set(found["raw"]) == {"disk", "memory", "arithmetic"}


@pytest.mark.slow
def test_the_cores_are_measured_where_they_multiply(fable, quick, capsys, monkeypatch):
    for speeds in ("memory_speeds", "arithmetic_speeds"):
        monkeypatch.setattr(measuring, speeds, lambda *_: [1e12])
    monkeypatch.setattr(measuring, "SIZES", (1, 4))
    words = ["bench", str(fable), "--device", "cpu", "--host-share", "0.6"]
    assert main(words) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    moves = {line.split()[0]: line for line in lines[: lines.index("")]}
    assert "(measured at opening)" in moves["cores"]
    of_host = found["plan"]["sweep"]["host_product_bytes"]
    assert f" {human(of_host)} at " in moves["cores"]
    assert f" {human(found['plan']['sweep']['bytes'] - of_host)} at " in moves["CPU"]
    cores = found["cores"]
    assert (cores["encoding"], cores["threads"] > 0) == ("bfloat16", True)
    assert [row["tokens"] for row in cores["speeds"]] == [1, 4, 16, 64]
    assert all(set(row) == {"tokens", "alone_bytes_per_s"} for row in cores["speeds"])  # no link
    said = [line for line in lines if line.startswith("cores ")]
    assert [line.split()[1:3] for line in said] == [
        ["1", "token"],
        ["4", "tokens"],
        ["16", "tokens"],
        ["64", "tokens"],
    ]
    assert all(line.endswith("B/s  bfloat16") for line in said)
    assert all("cores" in row["limits_s"] for row in found["sweeps"])
    assert not any("together_s" in row for row in found["sweeps"])
    assert found["advised_host_share"] is None


@pytest.mark.slow
def test_with_a_link_it_says_what_both_move_and_which_share_would_help(
    fable, quick, capsys, monkeypatch
):
    """A link of 100 MB/s and cores of 1 GB/s are made up, exchanges, and the seconds of a pass."""
    monkeypatch.setattr(together, "EXCHANGE_S", 300e-6)
    for found in ("memory_speeds", "arithmetic_speeds", "link_speeds"):
        monkeypatch.setattr(measuring, found, lambda *_: [1e8])
    speeds = HostSpeeds((("bfloat16", ((1, 1e9), (64, 1e9))),), 1e8)
    cores = CoresMeasured("bfloat16", 2, replace(speeds, link=None), speeds)
    monkeypatch.setattr(measuring, "measure_cores", lambda *_: cores)
    monkeypatch.setattr(measuring, "SIZES", (1, 4))
    monkeypatch.setattr(measuring.Bench, "time_in_a_row", lambda *_: 0.06)
    measure = measuring.Bench.measure_machine

    def with_link(self):
        self.has_link = True
        measure(self)

    monkeypatch.setattr(measuring.Bench, "measure_machine", with_link)
    words = ["--device", "cpu", "--host-share", "0.2", "--from-disk"]
    assert main(["bench", str(fable), *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    (one,) = [line for line in lines if line.startswith("cores             1 token ")]
    assert one.endswith("bfloat16; 1 GB/s beside the link, which moves 100 MB/s: together 1.1 GB/s")
    n_bytes = found["plan"]["sweep"]["bytes"]
    for row in found["sweeps"][1:]:
        assert row["together_s"] == pytest.approx(n_bytes / 1.1e9)
    least = f"{n_bytes / 1.1e9 / 0.06:.2f} of cores and link together"
    assert sum(line.endswith(least) for line in lines) == 2
    assert found["limit"] == "link"
    assert found["advised_host_share"] == pytest.approx(0.8, abs=0.05)
    assert f"--host-share {found['advised_host_share']:g}" in found["conclusion"]


def test_a_line_of_the_cores_names_the_link_beside_them():
    row = {"tokens": 1, "alone_bytes_per_s": 74.6e9, "beside_bytes_per_s": 71.2e9}
    row |= {"link_bytes_per_s": 48.7e9, "together_bytes_per_s": 119.9e9}
    assert cores_lines({"encoding": "int4", "threads": 13, "speeds": [row]}) == (
        "cores             1 token                74.6 GB/s  int4; 71.2 GB/s beside the link, "
        "which moves 48.7 GB/s: together 120 GB/s"
    )


def test_lines_say_how_links_and_disks_add_up():
    gpus = {"host": "", "disk": 2e9, "links": [55e9, 55e9], "together": 99e9}
    assert lanes_lines([gpus]).split(maxsplit=1) == [
        *("links", "links alone 55 GB/s, 55 GB/s; together 99 GB/s, 1.80 times one"),
    ]
    cpu = {"host": "", "disk": 1e9, "links": [], "together": None}
    first, second, both = lanes_lines([gpus, gpus]).splitlines()
    assert first.startswith("host 0 ")
    assert "disk 2 GB/s; links alone 55 GB/s, 55 GB/s; together 99 GB/s" in second
    assert both.split(maxsplit=2)[2] == "disks 4 GB/s; links 198 GB/s"
    assert lanes_lines([cpu, {**cpu, "disk": None}]).splitlines()[2].split()[-1] == "-"


def test_a_line_names_the_share_of_both():
    seconds = {"median": 0.07, "min": 0.07, "max": 0.07, "n": 1}
    share = {"median": 0.9, "min": 0.9, "max": 0.9, "n": 1}
    row = {"tokens": 2, "seconds": seconds, "share": share, "limit": "cores", "bytes_per_s": 7e10}
    assert row_line("forward pass", row).endswith("of the cores' speed (0.90 to 0.90, 1 times)")
    row["together_share"] = share | {"median": 0.92}
    assert row_line("forward pass", row).endswith("times), 0.92 of cores and link together")


@pytest.mark.slow
def test_a_draft_model_is_measured_too_and_what_is_assumed_says_so(
    fable, quick, capsys, monkeypatch
):
    for speeds in ("memory_speeds", "arithmetic_speeds"):
        monkeypatch.setattr(measuring, speeds, lambda *_: [1e12])
    assert main(["bench", str(fable), "--device", "cpu", "--draft", str(fable)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["draft"]
    (draft,) = [line for line in lines if line.startswith("draft model ")]
    assert f"{fable.name}, bfloat16, " in draft
    assert sum(line.startswith("a step of it") for line in lines) == len(found["steps"])
    passes = [line for line in lines if line.startswith("pass with a tree")]
    assert len(passes) == len(found["passes"])
    assert all(line.endswith("(assumed)") for line in passes)
    (said,) = [line for line in lines if line.startswith("at these assumed figures")]
    guesses = found["assumed_best_rows"] - 1
    assert (f"about {guesses} guesses" if guesses else "no guesses") in said
    assert lines[-1] == json.loads(last)["conclusion"]
