"""The sentence at the end of `bench`: what limits a forward pass and what would help, by made-up
figures."""

import re
from dataclasses import replace

import pytest

from jlayer.app.remedies import Helpers, conclude
from jlayer.config import model_config
from jlayer.cores.native import INSTALL
from jlayer.measure import together as measuring
from jlayer.measure.together import together
from jlayer.plan.machine import HostSpeeds, Machine
from jlayer.plan.making import make_plan, matrix_forms, with_host
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier, Weights
from tests.plan.models import LLAMA_70B, machine, weights_of
from tests.tiny import TINY


@pytest.fixture(autouse=True)
def exchange(monkeypatch):
    """The seconds here are worked out with exchanges of 0.3 ms."""
    monkeypatch.setattr(measuring, "EXCHANGE_S", 300e-6)


def found(took, *, block=0.001, bits=16, took_64=None, **limits):
    """Figures of a model of ten layers."""

    def row(tokens, seconds):
        return {
            "tokens": tokens,
            "bytes": 1000,
            "weights": 1000 * 8 / bits,
            "seconds": {"median": seconds, "min": seconds},
            "limits_s": limits,
        }

    alone = {"tokens": 1, "bytes": 100, "seconds": {"min": block}}
    return {"blocks": [alone], "sweeps": [row(1, took), row(64, took_64 or 9 * took)]}


@pytest.mark.parametrize(
    ("figures", "limit", "said"),
    [
        (found(2.0, disk=1.9, link=0.5), "disk", r"The disk limits.* 1.9 s of the 2 s of a for"),
        (found(2.0, disk=1.9, link=0.5), "disk", r"B more host memory \(about 500 ms a for"),
        (found(2.0, disk=1.9, link=1.8), "disk", r"quantizing the weights to 4 bits \(about 534"),
        (found(2.0, disk=1.9, link=1.8, bits=4.5), "disk", "more host memory"),
        (found(2.0, link=1.9), "link", r"The link to the device.*quantizing .*\(about 534 ms"),
        (found(2.0, link=1.9, bits=4.5), "link", r"more device memory \(about 950 ms"),
        (found(2.0, took_64=2.02, link=1.9), "link", "64 tokens take only 1.01 times as long"),
        (found(2.0, block=0.19, disk=1.0), "programs", "faster memory and more cores"),
        (found(2.0, block=0.19, disk=9.0), "disk", "2 s of the 2 s of a forward"),
        (found(2.0, disk=1.0, link=0.5), "steps", "so small a model, but its 4 steps a forward"),
    ],
)
def test_the_sentence_names_the_limit_and_the_best_remedy(figures, limit, said):
    cfg = model_config({"model_type": "llama", "torch_dtype": "bfloat16", **TINY}, where="test")
    machine = Machine("gpu", 4 << 30, 4 << 30, 0)
    weights = Weights(cfg, lambda _: "bfloat16", "bfloat16")
    plan = make_plan(weights, machine, RunShape(), keeps_layers=False)
    drawn = conclude(figures, plan)
    assert drawn["limit"] == limit
    assert re.search(said, drawn["conclusion"]), drawn["conclusion"]


GB = 10**9
LINK = 50e9


def speeds(link=LINK, **forms):
    """The same for any number of tokens up to 64."""
    return HostSpeeds(tuple((f, ((1, s), (64, s))) for f, s in forms.items()), link)


def planned(asked, on_host, *, form="bfloat16", budget=1536 << 20, host_budget=400 << 30):
    """A 70B shape in host memory; `asked`: the share that the user asked for."""
    weights = weights_of(LLAMA_70B, stored=form)
    on = machine(device_budget=budget, host_budget=host_budget)
    on = replace(on, link_speed=LINK, host=on_host)

    def plan_of(shares):
        return make_plan(weights, on, RunShape(1, 1, 64), shares=shares)

    return with_host(plan_of, matrix_forms(weights), asked, on.host)


def drawn(plan, *, cores=None, disk=None, took=None, asked=None, bits=16, block=0.01, **more):
    """What is concluded of a forward pass that takes as long as its longest part, or `took`."""
    n_bytes = plan.tiling.n_bytes
    limits = {"link": (plan.put_bytes - plan.host_product_bytes) / LINK}
    if disk is not None:
        limits["disk"] = disk
    if plan.host_product_bytes:
        both = together(plan, cores, 1)
        limits["cores"] = both.cores_s * plan.host_product_bytes / plan.put_bytes
    seconds = took or max(limits.values())
    row = {"tokens": 1, "bytes": n_bytes, "weights": n_bytes * 8 / bits, "limits_s": limits}
    row["seconds"] = {"median": seconds, "min": seconds}
    alone = {"tokens": 1, "bytes": n_bytes, "seconds": {"min": block}}
    helpers = Helpers(cores, asked, **more)
    return conclude({"blocks": [alone], "sweeps": [row]}, plan, helpers)


@pytest.mark.parametrize(
    ("asked", "on_host", "advised", "words"),
    [
        (0, 75 * GB, 0.58, "more of the rows"),  # none now
        (0.2, 75 * GB, 0.58, "more of the rows"),
        (0.9, 75 * GB, 0.58, "fewer of the rows"),
        (0.68, 75 * GB, 0.58, "fewer of the rows"),  # so that the cores wait for their input too
        (0.6, 75 * GB, None, None),
        (0.56, 75 * GB, None, None),  # not clearly shorter
        (0, 3 * GB, None, None),  # the cores are too slow for it
        (0, 20 * GB, 0.28, "more of the rows"),
    ],
)
def test_a_better_share_is_named_as_it_is_typed(asked, on_host, advised, words):
    known = speeds(bfloat16=on_host)
    plan = planned(asked, known)
    said = drawn(plan, cores=known, asked=asked, bits=4.5)  # so that quantizing is no remedy
    if advised is None:
        assert said["advised_host_share"] is None
        assert "--host-share" not in said["conclusion"]
        return
    assert said["advised_host_share"] == pytest.approx(advised, abs=0.011)
    option = said["advised_host_share"]
    (remedy,) = [name for name in said["remedies_s"] if name.endswith(f"--host-share {option:g}")]
    assert remedy.startswith(words)
    # It holds what it says: the plan with this share takes about as long.
    then = planned(option, known)
    link_s = (then.put_bytes - then.host_product_bytes) / LINK
    both = together(plan, known, 1)
    cores_s = then.host_product_bytes / on_host + both.exchange_s
    assert said["remedies_s"][remedy] == pytest.approx(max(link_s, cores_s), rel=0.05)
    parts = said["parts_s"]
    waiting = parts["cores"] + both.exchange_s if asked else 0
    assert said["remedies_s"][remedy] < 0.9 * max(parts["link"], waiting)


def test_the_advised_share_counts_the_rows_on_the_device():
    """Half of the model stays there, so half of the number is typed."""
    known = speeds(bfloat16=50 * GB)
    plan = planned(0, known, budget=70 << 30)
    on_device = plan.tier_bytes(Tier.DEVICE) / plan.tiling.n_bytes
    assert 0.4 < on_device < 0.6
    said = drawn(plan, cores=known, asked=0)
    assert said["advised_host_share"] == pytest.approx((1 - on_device) / 2, abs=0.03)


def test_the_rows_that_go_back_to_the_device_take_it_their_time():
    known = speeds(bfloat16=75 * GB)
    said = drawn(planned(0.9, known), cores=known, asked=0.9, block=3.0)
    (remedy,) = [name for name in said["remedies_s"] if "--host-share" in name]
    assert said["remedies_s"][remedy] == pytest.approx(3.0 * (1 - 0.58), rel=0.03)
    said = drawn(planned(0.9, known), cores=known, asked=0.9, block=9.0)
    assert said["advised_host_share"] is None


def test_a_share_is_advised_only_where_it_can_be_had_and_helps():
    known = speeds(bfloat16=75 * GB)
    plan = planned(0, known)
    assert drawn(plan, cores=known, asked=0)["advised_host_share"] is not None
    asked = []
    said = drawn(plan, cores=known, asked=0, fits=lambda share: asked.append(share))
    assert said["advised_host_share"] is None
    assert asked == [0.58]
    # The disk takes as long whatever is done with what it reads.
    assert drawn(plan, cores=known, asked=0, disk=60.0)["advised_host_share"] is None
    assert drawn(plan, asked=0)["advised_host_share"] is None  # not measured
    no_link = speeds(None, bfloat16=75 * GB)
    assert drawn(plan, cores=no_link, asked=0)["advised_host_share"] is None


def test_what_costs_nothing_is_said_beside_the_best_remedy():
    known = speeds(bfloat16=75 * GB, int4=75 * GB)
    said = drawn(planned(0, known), cores=known, asked=0)["conclusion"]
    assert (
        "most is quantizing the weights to 4 bits (about 781 ms a forward pass); on this machine "
        "as it is, more of the rows for the host's cores, --host-share 0.58 would do (about 1.17 s)"
    ) in said
    known = speeds(bfloat16=75 * GB)
    said = drawn(planned(0.1, known), cores=known, asked=0.1, bits=4.5)["conclusion"]
    assert said.count("--host-share") == 1
    assert "what would help most is more of the rows for the host's cores, --host-share" in said


QUANTIZING = "quantizing the weights to 4 bits"
SMALLER = 4.5 / 16


def test_quantizing_counts_with_the_cores_speed_of_4_bits():
    """Divided anew under `auto`; where the user asked for a share, the cores keep their rows."""
    unknown, known = speeds(bfloat16=75 * GB), speeds(bfloat16=75 * GB, int4=25 * GB)
    for asked in (None, 0.6):
        plan = planned(asked, unknown)
        now = drawn(plan, cores=unknown, asked=asked)
        longest = max(now["parts_s"].values())
        assert now["remedies_s"][QUANTIZING] == pytest.approx(SMALLER * longest)  # in proportion
    plan = planned(None, known)
    n_bytes, exchange_s = plan.put_bytes * SMALLER, together(plan, known, 1).exchange_s
    found = drawn(plan, cores=known)["remedies_s"][QUANTIZING]
    assert found == pytest.approx((n_bytes + exchange_s * 25e9) / 75e9)
    plan = planned(0.6, known)
    found = drawn(plan, cores=known, asked=0.6)["remedies_s"][QUANTIZING]
    assert found == pytest.approx(plan.host_product_bytes * SMALLER / 25e9)  # the cores' part
    plan = planned(0, known)
    found = drawn(plan, cores=known, asked=0)["remedies_s"][QUANTIZING]
    assert found == pytest.approx(plan.put_bytes * SMALLER / LINK)  # the user wants no share


def test_more_device_memory_takes_from_both_unless_a_share_was_asked_for():
    known = speeds(bfloat16=75 * GB)
    auto, fixed = planned(None, known), planned(0.6, known)
    for plan, asked in ((auto, None), (fixed, 0.6)):
        said = drawn(plan, cores=known, asked=asked)
        parts = said["parts_s"]
        (remedy,) = [name for name in said["remedies_s"] if name.endswith("more device memory")]
        then = parts["cores"] if asked else max(parts["link"], parts["cores"]) / 2
        assert said["remedies_s"][remedy] == pytest.approx(then)
        size = float(remedy.split()[0]) * 2**30
        moved = plan.put_bytes - (plan.host_product_bytes if asked else 0)
        assert size == pytest.approx(moved / 2, rel=0.01)


def test_more_host_memory_leaves_link_and_cores():
    known = speeds(bfloat16=75 * GB)
    plan = planned(0.6, known, host_budget=20 << 30)
    said = drawn(plan, cores=known, asked=0.6, disk=60.0)
    (remedy,) = [name for name in said["remedies_s"] if name.endswith("more host memory")]
    parts = said["parts_s"]
    assert said["remedies_s"][remedy] == max(parts["link"], parts["cores"]) < 60
    assert said["limit"] == "disk"


def test_the_cores_are_named_as_the_limit():
    known = speeds(bfloat16=75 * GB)
    said = drawn(planned(0.9, known), cores=known, asked=0.9)
    assert said["limit"] == "cores"
    assert said["conclusion"].startswith(
        "The host's cores, which multiply where the weights lie, limit this machine, 1."
    )
    said = drawn(planned(0.6, known), cores=known, asked=0.6, took=9.0)
    assert said["conclusion"].startswith("Neither disk, link, cores nor arithmetic limits")


def test_where_there_are_no_kernels_it_says_what_to_install():
    plan = planned(0, None)
    said = drawn(plan, asked=0, install=f"llvmlite is not installed: {INSTALL}")["conclusion"]
    assert f"could multiply a part of the rows, but llvmlite is not installed: {INSTALL}" in said
    assert "install" not in drawn(plan, asked=0)["conclusion"]
    said = drawn(plan, asked=0, disk=60.0, install=INSTALL)["conclusion"]
    assert INSTALL not in said  # the disk is the limit
