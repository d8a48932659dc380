"""Readers on two Ray nodes give what readers of this machine give, also when a worker is killed while it reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from namm_transfer import NAMM
from namm_transfer.errors import ConfigError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.ray_readers import RayReaders
from namm_transfer.evolution.readers import Job, LocalReaders, Outcome

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")


@pytest.fixture
def two_nodes(offline: EvolutionConfig) -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each, begun after the cache folder was set."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def same(one: list[Outcome], two: list[Outcome]) -> bool:
    return len(one) == len(two) and all(
        a.kind == b.kind
        and a.full == b.full
        and np.array_equal(a.difference, b.difference)
        and np.array_equal(a.kept, b.kept)
        for a, b in zip(one, two, strict=True)
    )


def kill_one_that_reads(killed: list[int]) -> None:
    """SIGKILL the first actor that is seen reading."""
    until = time.monotonic() + 60
    while not killed and time.monotonic() < until:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::RayReader.read"):
                process.kill()
                killed.append(process.pid)
                return
        time.sleep(0.005)


def test_two_nodes_read_what_one_process_reads(offline: EvolutionConfig, two_nodes: str) -> None:
    jobs = [Job("train", (1, i), i, 2) for i in range(12)]
    vectors = np.random.default_rng(0).normal(0, 0.1, (4, 4172))
    namm = NAMM()
    with LocalReaders(offline) as local:
        expected = local.read(jobs, namm, vectors)
        features = local.measure(jobs[:2], vectors)
    with RayReaders(offline, {"address": two_nodes}) as pool:
        nodes = {actor["NodeID"] for actor in ray.nodes() if actor["Alive"]}
        assert len(nodes) == 2 == len(pool._workers)
        assert same(pool.read(jobs, namm, vectors), expected)
        measured = pool.measure(jobs[:2], vectors)
        assert [one.mean.tolist() for one in measured] == [one.mean.tolist() for one in features]

        killed: list[int] = []
        killer = threading.Thread(target=kill_one_that_reads, args=(killed,))
        killer.start()
        again = pool.read(jobs * 8, namm, vectors)
        killer.join()
        assert killed, "no worker was killed while it read"
        assert same(again, expected * 8)


def test_a_cluster_without_room_is_refused(offline: EvolutionConfig, two_nodes: str) -> None:
    with pytest.raises(ConfigError, match="too little for one worker"):
        RayReaders(replace(offline), {"address": two_nodes, "gpus_per_worker": 1})
