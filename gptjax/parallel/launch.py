"""How many processes train together, and which one this is: from flags, or from what started them.

Only the standard library is imported here, JAX inside the one function that asks it, so that a command
line is parsed without loading JAX.
"""

import glob
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gptjax.checks import require, require_range, require_types
from gptjax.errors import UserError

FLAGS = ("coordinator", "num_processes", "process_id")
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

ALONE = "--distributed.num-processes 1 trains alone"
RANKS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"), ("WORLD_SIZE", "RANK"))
"""Where Open MPI, other MPIs and torchrun say how many processes they started, and which one this is."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes that train together, one or several on each machine."""

    coordinator: str = ""
    """Address host:port of process 0. Empty: found from Slurm, Open MPI, Kubernetes or Cloud TPU, else one process."""
    num_processes: int | None = None
    """Processes that train together; 1 trains alone, whatever the surroundings say. None: as coordinator."""
    process_id: int | None = None
    """Number of this process, from 0. None: as coordinator."""
    timeout_seconds: int = 300
    """How long to wait for the other processes to start."""

    def __post_init__(self):
        require_types("distributed.", self)
        require_range("distributed.", self, 1, math.inf, "num_processes", "timeout_seconds")
        if self.num_processes is None:
            require_range("distributed.", self, 0, math.inf, "process_id")
        elif self.process_id is not None and not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"distributed.process_id is {self.process_id}, but must be between 0 and {self.num_processes - 1}: "
                f"distributed.num_processes is {self.num_processes}"
            )
        if self.coordinator:
            split_address(self.coordinator)
        given = [name for name in FLAGS if getattr(self, name) not in (None, "")]
        missing = [name for name in FLAGS if name not in given]
        if given and missing and self.num_processes != 1:
            raise UserError(
                f"{' and '.join(f'distributed.{name}' for name in given)} given without "
                f"{' and '.join(f'distributed.{name}' for name in missing)}; give all three to every process, or none "
                "where Slurm, Open MPI, Kubernetes or Cloud TPU know them"
            )


class Launch(NamedTuple):
    """One of several processes that train together."""

    coordinator: str
    """Address host:port of process 0."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    """The accelerators of this machine that this process uses. None: all that it sees."""
    source: str
    """What said so: flags, Slurm, Open MPI, Kubernetes or Cloud TPU."""


def split_address(coordinator: str) -> tuple[str, int]:
    """The host and the port of `host:port`; an IPv6 address may have its brackets.

    Raises:
        UserError: there is no host, or no port.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UserError(
            f"distributed.coordinator is {coordinator!r}, but must be the host of process 0, a colon and a free port "
            f"between 1 and 65535, such as {(coordinator.split(':')[0] or 'node1')}:8476"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def find_launch(config: DistributedConfig) -> Launch | None:
    """This process among those that train together; None where it is alone.

    Flags come first, then what JAX detects in the environment of this process.

    Raises:
        UserError: several processes were started, but where they meet is not known; or those of one machine
            cannot share its GPUs equally.
    """
    if config.num_processes == 1:
        return None
    if config.num_processes is not None:
        return Launch(config.coordinator, config.num_processes, config.process_id, None, "flags")
    environ, source = os.environ, _source(os.environ)
    found = None
    # A pod outside an indexed job (a notebook) is alone; asking Kubernetes about it would end in an exception.
    if source != "Kubernetes" or "JOB_COMPLETION_INDEX" in environ:
        found = _ask_jax(source, config.timeout_seconds)
        if found is None and source == "Kubernetes":
            raise UserError(
                f"this pod is number {environ['JOB_COMPLETION_INDEX']} of an indexed Kubernetes job, but the package "
                'that asks for the others is missing; pip install "jax[k8s]", or give --distributed.coordinator '
                f"HOST:PORT --distributed.num-processes N --distributed.process-id $JOB_COMPLETION_INDEX; {ALONE}"
            )
    if found is None or found[1] == 1:
        _refuse_if_one_of_several(environ)
        return None
    # JAX reads JAX_LOCAL_DEVICE_IDS itself.
    device_ids = None if environ.get("JAX_LOCAL_DEVICE_IDS") else _device_ids(environ, source)
    return Launch(*found, device_ids, source)


def _source(environ: Mapping[str, str]) -> str:
    """What started this process, in the order in which JAX looks."""
    if "OMPI_MCA_orte_hnp_uri" in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        return "Open MPI"
    if all(name in environ for name in SLURM_STEP):
        return "Slurm"
    in_pod = "KUBERNETES_SERVICE_HOST" in environ and "TPU_WORKER_HOSTNAMES" not in environ
    return "Kubernetes" if in_pod else "Cloud TPU"


def _ask_jax(source: str, timeout_seconds: int) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and id as `jax.distributed.initialize` would find them, or None.

    The one use of a private part of JAX: initialize has no public half that looks without connecting, and
    what it finds must be known before, to say in a line who is missing instead of aborting.
    """
    import jax.distributed  # noqa: F401 -- makes the kinds of clusters known
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing kubernetes package, which find_launch says where it matters
            *found, _ = ClusterEnv.auto_detect_unset_distributed_params(
                *(os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout_seconds)
            )
    except Exception as error:  # metadata servers, Kubernetes' API and mpi4py raise what they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"JAX cannot find this process among those that {source} started ({reason}); give --distributed.coordinator"
            f" HOST:PORT, --distributed.num-processes and --distributed.process-id; {ALONE}"
        ) from error
    return None if None in found else tuple(found)


def _refuse_if_one_of_several(environ: Mapping[str, str]) -> None:
    """Several processes that all think they are alone would write over each other's runs.

    Raises:
        UserError: this is one of several, and JAX does not know where they meet.
    """
    for size, rank in RANKS:
        if environ.get(size, "").isdigit() and int(environ[size]) > 1 and rank in environ:
            raise UserError(
                f"this is process {environ[rank]} of {environ[size]} ({rank}, {size}), but JAX does not know where "
                f"they meet; give --distributed.coordinator HOST:PORT --distributed.num-processes ${size} "
                f"--distributed.process-id ${rank}; {ALONE}"
            )


def _device_ids(environ: Mapping[str, str], source: str) -> tuple[int, ...] | None:
    if source == "Slurm":
        return slurm_device_ids(environ, visible_gpus(environ))
    if source == "Open MPI":
        rank, size = (int(environ[f"OMPI_COMM_WORLD_LOCAL_{name}"]) for name in ("RANK", "SIZE"))
        return _share(rank, size, visible_gpus(environ), "--map-by ppr:N:node")
    return None


def visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a process of this machine sees, counted without a driver; 0 where there are none to share."""
    if environ.get("JAX_PLATFORMS") in ("cpu", "tpu"):
        return 0
    if (listed := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return sum(part.strip() not in ("", "-1", "NoDevFiles") for part in listed.split(","))
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(on_node) if on_node.isdigit() else len(glob.glob("/dev/nvidia[0-9]*"))


def slurm_device_ids(environ: Mapping[str, str], num_visible_gpus: int) -> tuple[int, ...] | None:
    """The GPUs of a Slurm task: its equal part of those of the machine. None: all that it sees.

    JAX itself would take the one whose number is SLURM_LOCALID: one task on a machine of eight GPUs would
    silently train on one.

    Raises:
        UserError: the tasks of this machine cannot share its GPUs equally.
    """
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    if environ.get("SLURM_GPUS_PER_TASK") or (on_node.isdigit() and num_visible_gpus < int(on_node)):
        return None  # Slurm has shared them out already
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    counts = []  # machine by machine: 4(x2),1 is [4, 4, 1]
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        require(match is not None, f"SLURM_TASKS_PER_NODE is {tasks!r}, which is not of the form 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    tasks_here = counts[int(environ.get("SLURM_NODEID", "0"))]
    return _share(int(environ["SLURM_LOCALID"]), tasks_here, num_visible_gpus, "--ntasks-per-node")


def _share(rank: int, tasks: int, num_gpus: int, option: str) -> tuple[int, ...] | None:
    """The contiguous part of the GPUs that belongs to one of the tasks of a machine."""
    if tasks == 1 or num_gpus <= 1:
        return None
    if num_gpus % tasks:
        works = [str(n) for n in range(1, num_gpus + 1) if num_gpus % n == 0]
        raise UserError(
            f"{tasks} tasks on this machine cannot share its {num_gpus} GPUs equally; start {', '.join(works[:-1])} or "
            f"{works[-1]} ({option}), or choose each one's GPUs with JAX_LOCAL_DEVICE_IDS"
        )
    return tuple(range(num_gpus))[rank * num_gpus // tasks :][: num_gpus // tasks]
