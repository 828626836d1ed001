"""Who trains together: flags, what a launcher left in the environment, and the GPUs of one task."""

import os
import subprocess
import sys
import types
import warnings

import pytest

from gptjax.errors import UserError
from gptjax.parallel import launch
from gptjax.parallel.launch import DistributedConfig, Launch, find_launch, slurm_device_ids, visible_gpus

LAUNCHERS = ("SLURM", "OMPI", "PMI", "KUBERNETES", "JOB_COMPLETION", "TPU", "MEGASCALE", "JAX_COORD", "JAX_LOCAL")
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_GPUS_ON_NODE": "8",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.7:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
FLAGS = DistributedConfig("node1:8476", 4, 3)


@pytest.fixture
def environ(monkeypatch):
    """Makes the environment that of a machine on which nothing but these variables says who trains together."""
    for name in os.environ:
        if name.startswith(LAUNCHERS) or name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
            monkeypatch.delenv(name)

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((":8476", 2, 0), "is ':8476', but must be the host of process 0, a colon and a free port .* node1:8476"),
        (("node1", 2, 0), "is 'node1', but must be .*, such as node1:8476"),
        (("node1:", 2, 0), "such as node1:8476"),
        (("node1:80.5", 2, 0), "such as node1:8476"),
        (("node1:65536", 2, 0), "between 1 and 65535"),
        (("node1:1", 2, 2), "process_id is 2, but must be between 0 and 1: distributed.num_processes is 2"),
        (("node1:1", 2, -1), "process_id is -1, but must be between 0 and 1"),
        (("node1:1", 0, 0), "num_processes is 0, but must be at least 1"),
        (("", None, -1), "process_id is -1, but must be at least 0"),
        (("node1:1",), "^distributed.coordinator given without distributed.num_processes and distributed.process_id; "),
        (("node1:1", 2), "^distributed.coordinator and distributed.num_processes given without distributed.process_id"),
        (("", 2, 0), "^distributed.num_processes and distributed.process_id given without distributed.coordinator; "),
        (("", None, 0), "given without distributed.coordinator and distributed.num_processes"),
        (("node1:1", 2, 0, 0), "timeout_seconds is 0"),
        (("node1:1", "2", 0), "num_processes is '2', but must be of type"),
    ],
)
def test_refuses_flags_that_do_not_fit(fields, message):
    with pytest.raises(UserError, match=message):
        DistributedConfig(*fields)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("node1:80", ("node1", 80)), ("[fe80::1]:80", ("fe80::1", 80)), ("fe80::1:80", ("fe80::1", 80))],
)
def test_addresses_are_split(address, parts):
    assert launch.split_address(address) == parts


def test_flags_win_over_slurm(environ):
    """And leave every device to the process: it did not ask Slurm for its share."""
    environ(**SLURM)
    assert find_launch(FLAGS) == Launch("node1:8476", 4, 3, None, "flags")


def test_one_process_is_no_launch(environ):
    environ()
    assert find_launch(DistributedConfig()) is None
    assert find_launch(DistributedConfig("node1:1", 1, 0)) is None
    environ(**SLURM)
    assert find_launch(DistributedConfig(num_processes=1)) is None
    environ(SLURM_NTASKS="1", SLURM_PROCID="0")
    assert find_launch(DistributedConfig()) is None


def test_finds_slurm(environ):
    """The third of four tasks on two machines of eight GPUs: the first of its machine, with four of them."""
    environ(**SLURM)
    assert find_launch(DistributedConfig()) == Launch("node007:61444", 4, 2, (0, 1, 2, 3), "Slurm")
    environ(JAX_LOCAL_DEVICE_IDS="5", JAX_COORDINATOR_ADDRESS="other:9")
    assert find_launch(DistributedConfig()) == Launch("other:9", 4, 2, None, "Slurm")


def test_a_slurm_job_without_srun_is_one_process(environ):
    """A batch script itself runs once, on the first machine, and no step is around it."""
    environ(**SLURM)
    os.environ.pop("SLURM_STEP_NODELIST")
    assert find_launch(DistributedConfig()) is None


def test_finds_open_mpi(environ):
    environ(**OPEN_MPI)
    assert find_launch(DistributedConfig()) == Launch("10.0.0.7:61442", 4, 3, (2, 3), "Open MPI")


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}, None),  # all eight: JAX would take one
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5"}, (5,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}, (4, 5, 6, 7)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),2", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}, (4, 5, 6, 7)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,4(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "3"}, (6, 7)),
        ({"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "1"}, (2, 3)),
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "0"}, (0, 1, 2, 3)),
        ({"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_PER_TASK": "2", "SLURM_LOCALID": "2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "24", "SLURM_LOCALID": "2"}, None),  # --gpu-bind
        ({"SLURM_LOCALID": "0"}, None),
    ],
)
def test_slurm_tasks_share_the_gpus_of_their_machine(variables, ids):
    assert slurm_device_ids(variables, 8) == ids


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_slurm_has_nothing_to_share_out(num_gpus):
    assert slurm_device_ids({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "1"}, num_gpus) is None


def test_refuses_tasks_that_cannot_share(environ):
    with pytest.raises(UserError, match=r"3 tasks .* cannot share its 8 GPUs equally; start 1, 2, 4 or 8 \(--ntasks"):
        slurm_device_ids({"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "1"}, 8)
    with pytest.raises(UserError, match=r"SLURM_TASKS_PER_NODE is '4\(x', which is not of the form"):
        slurm_device_ids({"SLURM_STEP_TASKS_PER_NODE": "4(x", "SLURM_LOCALID": "1"}, 8)
    environ(**OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    with pytest.raises(UserError, match=r"2 tasks .* its 3 GPUs equally; start 1 or 3 \(--map-by"):
        find_launch(DistributedConfig())


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "3,GPU-1f,MIG-2", "SLURM_GPUS_ON_NODE": "8"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "JAX_PLATFORMS": "cpu"}, 0),
        ({}, 2),
    ],
)
def test_visible_gpus(monkeypatch, variables, count):
    """What the process was given counts before what the machine has."""
    monkeypatch.setattr(launch.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    assert visible_gpus(variables) == count


def test_a_pod_outside_a_job_is_alone(environ, monkeypatch):
    """A notebook's pod: JAX would warn, or with the kubernetes package raise whatever Kubernetes answers."""
    environ(KUBERNETES_SERVICE_HOST="10.0.0.1")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_launch(DistributedConfig()) is None


def test_a_pod_of_an_indexed_job_needs_the_kubernetes_package(environ, monkeypatch):
    environ(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match=r'pod is number 3 .*; pip install "jax\[k8s\]", or give --distributed.coord'):
        find_launch(DistributedConfig())
    assert find_launch(DistributedConfig(num_processes=1)) is None


def test_what_kubernetes_refuses_is_said_in_a_line(environ, monkeypatch):
    def load_incluster_config():
        raise OSError("Service token file\ndoes not exist")

    config = types.SimpleNamespace(load_incluster_config=load_incluster_config)
    monkeypatch.setitem(sys.modules, "kubernetes", types.SimpleNamespace(config=config))
    environ(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    with pytest.raises(
        UserError, match=r"that Kubernetes started \(OSError: Service token file does not exist\); give"
    ):
        find_launch(DistributedConfig())


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},  # Open MPI 5, which leaves no address
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "1"},
    ],
)
def test_refuses_to_train_alone_beside_others(environ, variables):
    """Each of several processes would take itself for the only one, and write over the others' run."""
    environ(**variables)
    size, rank = variables
    with pytest.raises(UserError, match=rf"this is process 1 of 2 .* --distributed.process-id \${rank}; ") as error:
        find_launch(DistributedConfig())
    assert f"${size}" in str(error.value)
    environ(**{size: "1", rank: "0"})
    assert find_launch(DistributedConfig()) is None


def test_flags_need_no_jax():
    """A command line is parsed, and a launch by flags found, before JAX loads."""
    code = "import sys; sys.modules['jax'] = None\nfrom gptjax.parallel.launch import *\n"
    code += "print(find_launch(DistributedConfig('node1:1', 2, 1)).process_id)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr
