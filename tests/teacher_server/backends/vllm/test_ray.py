"""Two nodes of a Ray cluster, with a worker on each, say what two processes of one node say.

vLLM's platform for CPUs names no resource of Ray's, for which alone its Ray executor refuses it; the tests name one
and give each node one of it. All else is Ray's and vLLM's own. Both nodes are on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Field, ScoreSpec, Sequence
from teacher_server.backends.vllm_backend import VllmBackend
from tests.teacher_server.backends.helpers import ids_of
from tests.teacher_server.backends.vllm.conftest import Run, options

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

PLATFORM = """
from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
"""
ENTRY = "[vllm.platform_plugins]\ncpu_ray = cpu_ray:platform\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with one device each, whose workers know the platform."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="no Ray here; pip install ray")
    (tmp_path / "cpu_ray.py").write_text("def platform():\n    return 'cpu_ray_platform.RayCpuPlatform'\n")
    (tmp_path / "cpu_ray_platform.py").write_text(PLATFORM)
    about = tmp_path / "cpu_ray-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-ray\nVersion: 0\n")
    (about / "entry_points.txt").write_text(ENTRY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    found = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    found.add_node(**node)
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    found.shutdown()


def test_workers_on_two_nodes_of_a_ray_cluster_give_the_scores_of_two_processes(
    cluster: Any, folder: Callable[[str], Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert len(cluster.list_all_nodes()) == 2
    rng = np.random.default_rng(0)
    candidates = np.argsort(rng.random((595, 261)), axis=1)[:, :9].astype(np.int32)
    case = (Sequence(ids_of(rng, 600, 261), 5, candidates), ScoreSpec(40, (1.0, 0.5, 3.0), frozenset(Field)))

    async def scores(executor: str) -> Any:
        two = {"tensor_parallel_size": 2, "distributed_executor_backend": executor}
        backend = VllmBackend(options(folder("qwen3"), engine=two))
        await backend.start()
        try:
            return await backend.score(*case)
        finally:
            await backend.close()

    want, got = run(scores("mp")), run(scores("ray"))
    for name, array in want.arrays().items():
        np.testing.assert_allclose(getattr(got, name), array, atol=1e-5, err_msg=name)
