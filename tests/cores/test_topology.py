"""How many threads multiply, on machines that are made up."""

import pytest

from jlayer.cores.topology import topology


def machine(root, *, n_cores, threads_a_core=1, n_nodes=1, quota=None):
    """The files of a machine whose processors n, n + n_cores, ... are one core."""
    for processor in range(n_cores * threads_a_core):
        siblings = range(processor % n_cores, n_cores * threads_a_core, n_cores)
        folder = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")
    share = n_cores // n_nodes
    for node in range(n_nodes):
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{node * share}-{(node + 1) * share - 1}\n")
    if quota:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text(quota)
    return set(range(n_cores * threads_a_core))


@pytest.mark.parametrize(
    ("about", "threads", "reason"),
    [
        ({"n_cores": 1}, 1, "1 thread: 1 core"),
        ({"n_cores": 2}, 2, "2 threads: 2 cores"),
        ({"n_cores": 16}, 15, "15 threads: 16 cores less one for the readers"),
        (
            {"n_cores": 8, "threads_a_core": 2},
            7,
            "7 threads: 8 cores of 16 hardware threads less one for the readers",
        ),
        ({"n_cores": 4, "quota": "max 100000"}, 4, "4 threads: 4 cores"),
        (
            {"n_cores": 8, "quota": "250000 100000"},
            2,
            "2 threads: 8 cores and a quota of 2.5 of them",
        ),
        ({"n_cores": 4, "n_nodes": 2}, 4, "4 threads: 4 cores over 2 memory nodes"),
    ],
)
def test_threads(tmp_path, about, threads, reason):
    allowed = machine(tmp_path, **about)
    found = topology(tmp_path, allowed=allowed, group="0::/some/where")
    assert (found.threads, found.reason) == (threads, reason)
    assert found.n_numa_nodes == about.get("n_nodes", 1)


def test_only_processors_that_are_allowed_count(tmp_path):
    machine(tmp_path, n_cores=8, n_nodes=2)
    found = topology(tmp_path, allowed={0, 1, 2}, group="")
    assert (found.threads, found.n_numa_nodes) == (3, 1)


def test_the_older_control_groups_have_a_quota_too(tmp_path):
    allowed = machine(tmp_path, n_cores=4)
    folder = tmp_path / "sys/fs/cgroup/cpu/box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("50000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    found = topology(tmp_path, allowed=allowed, group="2:cpuacct:/\n1:cpu:/box\n0::/")
    assert (found.threads, found.reason) == (1, "1 thread: 4 cores and a quota of 0.5 of them")


def test_a_machine_that_tells_nothing(tmp_path):
    assert topology(tmp_path, allowed={0, 1}, group="").threads == 2


def test_this_machine():
    assert topology().threads >= 1
