"""What must be equal on all hosts of a model, and what all of them have of a machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from jlayer import __version__
from jlayer.checkpoint.rows import Host
from jlayer.checkpoint.store import Store
from jlayer.engine import device as choosing
from jlayer.engine.deciding import agree, follows, joined, least
from jlayer.engine.device import link_speed
from jlayer.engine.hosts import Hosts, placement_of
from jlayer.engine.report import anonymous_bytes, available_bytes
from jlayer.errors import UsageError
from jlayer.plan.machine import DEFAULT_DISK, Machine
from jlayer.plan.plan import Plan
from jlayer.run_config import RunConfig
from jlayer.streaming.devices import Devices
from jlayer.streaming.direct import disk_speed
from jlayer.streaming.watch import Watch

# Options of a run that a host has for itself.
OWN = (
    *("host_memory", "coordinator", "processes", "process_id", "follow_links"),
    *("adapter", "adapters"),
)
# The most of all hosts; of everything else they have the least.
MOST = ("context_bytes", "baseline_bytes")


def hosts_of(run: RunConfig) -> Hosts | None:
    """The other processes that the options name, once all are there; None without some. Raises
    UsageError, also for an option that several processes cannot have yet, and StorageError."""
    placement = placement_of(run)
    if placement is None:
        return joined(None)
    if run.host_share:
        raise UsageError(
            "host_share: the host's cores multiply nothing where there are several processes; "
            "leave it out, or set it to 0"
        )
    return joined(placement)


def opened(folder: str | os.PathLike, run: RunConfig, hosts: Hosts | None) -> Store:
    """The weights of a model, of which each host may have its own rows alone. Raises
    CheckpointError, UnsupportedModelError or StorageError, and UsageError in every process where
    options, versions or the model differ in one."""
    names = ("follow_links", "adapter", "adapters", "without_layers")
    how = {name: getattr(run, name) for name in names}
    if hosts is None:
        return Store(folder, **how)
    store = Store(folder, **how, host=Host(hosts.number, hosts.n))
    _compare(run, store)
    return store


def _compare(run, store):
    options = {name: _said(value) for name, value in asdict(run).items() if name not in OWN}
    # Not the digests: a host may have its own rows alone, of which each checks its own.
    weights = store.manifest and (store.fingerprint, store.quantization)
    agree(
        {
            "the version of jlayer": __version__,
            "the version of jax": version("jax"),
            **options,
            "the model's config": _digest(repr(store.cfg)),
            "the model's weights": _digest(repr(weights)),
            "the adapters": store.adapter_digest,
        }
    )


def _said(value):
    """An option as hosts tell it each other: JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def refuse_follower() -> None:
    """Raises UsageError in a process that only does what process 0 tells."""
    if follows():
        raise UsageError(
            "hosts: process 0 alone takes prompts; call follow() of the model in this one, which "
            "does the same on its own devices until process 0 closes the model"
        )


def told_of(plan: Plan) -> str:
    """What must be equal of the plans that all processes make, in a few letters."""
    cut, load = plan.tiling.cut_as, plan.load
    return _digest(repr((cut, plan.tiers, plan.cache, load, plan.ring, plan.ahead, plan.experts)))


def machine_of_all(devices: Devices, **found: float | None) -> Machine:
    """The machine of a plan, of these figures of this host. Of each it has what every host has: a
    plan must fit all, and be the same on each."""
    signed = {name: _signed(name, value) for name, value in found.items()}
    of_all = {name: _signed(name, value) for name, value in least("machine", signed).items()}
    return Machine(
        platform=devices.platform,
        n_devices=len(devices.own),
        n_hosts=devices.n_hosts,
        host_number=devices.number,
        collectives=devices.collectives,
        **of_all,
    )


def machine_for(
    run: RunConfig, store: Store, hosts: Hosts | None, watch: Watch
) -> tuple[Devices, Machine]:
    """Chooses the devices of a model, and measures the speeds and memory that a plan depends on."""
    watch.phase("starting the device")
    host_budget = run.host_memory or available_bytes() * 4 // 5
    devices, budget, context_bytes = choosing.choose(
        run.device,
        run.device_memory,
        n_devices=run.devices,
        hosts=hosts,
        pinned_bytes=min(host_budget, store.weight_bytes if run.keeps_layers else 0),
        host_memory=host_budget,
    )
    watch.phase("measuring the disk and the link")
    given = {"device_budget": budget, "host_budget": host_budget, "context_bytes": context_bytes}
    found = measured_machine(devices, store.files, **given)
    return devices, found.holding(store.memory_bytes)


def measured_machine(devices: Devices, files: Sequence[str], **given: int) -> Machine:
    """The machine of a plan over the files of a model, whose disk and link are measured. `given`:
    its budgets, and the bytes of the driver's context."""
    return machine_of_all(
        devices,
        **given,
        baseline_bytes=anonymous_bytes(),
        disk_speed=disk_speed(files) or DEFAULT_DISK,
        link_speed=link_speed(devices),
        cores=len(os.sched_getaffinity(0)),
    )


def _signed(name, value):
    return -value if name in MOST else value


def _digest(words):
    return hashlib.sha256(words.encode()).hexdigest()[:16]
