"""Jobs of a study: each is started, waited for, and what became of it is said."""

import json
import os
import sys

import jax
import pytest

from gptjax.errors import UserError
from gptjax.scaling.launchers import local_launcher, slurm_launcher

JOB = "import os, sys; print('cores', sorted(os.sched_getaffinity(0))); sys.exit(int(sys.argv[1][-1]))"


def test_local_jobs_end_with_their_status_and_keep_a_log(tmp_path):
    jax.devices()  # its threads forbid a fork, and it warns of one
    said = []
    statuses = local_launcher([sys.executable, "-c", JOB], 2, said.append)(["a0", "b3", "c0"], tmp_path)
    assert statuses == {"a0": 0, "b3": 3, "c0": 0}
    assert [line for line in said if "started" in line] == ["a0: started", "b3: started", "c0: started"]
    logs = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "logs").iterdir()}
    assert set(logs) == {"a0", "b3", "c0"}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2:
        shares = [set(json.loads(logs[name].split("cores ")[1])) for name in ("a0", "b3")]
        assert not shares[0] & shares[1], "jobs do not share cores"
        assert shares[0] | shares[1] == set(cores)


def test_jobs_by_submitit(tmp_path):
    """With its executor for this machine, which goes the same ways as Slurm's."""
    pytest.importorskip("submitit")
    said = []
    launch = slurm_launcher([sys.executable, "-c", JOB], {"cluster": "local", "timeout_min": 2}, said.append)
    assert launch(["a0", "b3"], tmp_path) == {"a0": 0, "b3": 1}
    assert said[0].startswith("2 jobs submitted")
    with pytest.raises(UserError, match=r"Slurm's jobs cannot be submitted: .*gpu_per_node"):
        slurm_launcher([sys.executable], {"cluster": "local", "gpu_per_node": 1}, said.append)(["a0"], tmp_path)


def test_without_submitit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install .gptjax\[slurm\]"):
        slurm_launcher([], {}, print)
