"""launch/*: local.sh with a stand-in for Python, the rest as far as it can be checked without a cluster; and
docs/distributed.md.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from gptjax import cli

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "launch" / "local.sh"
SHELL = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
YAML = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "launch").glob("*.yaml"))}
DOC = ROOT / "docs" / "distributed.md"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in [DOC, *sorted((ROOT / "launch").iterdir())]}

# Says what it was given on both streams, waits for a signal if told to, and ends with the status of its number.
PROCESS = """#!/usr/bin/env bash
trap 'echo TERM; exit 75' TERM
trap 'echo INT; exit 130' INT
echo "arguments: $*"
printf 'unfinished line' >&2
[[ -z ${READY-} ]] || touch "$READY.${@: -1}"
while [[ -n ${READY-} ]]; do sleep 0.05; done
codes=($CODES)
exit "${codes[${@: -1}]}"
"""


@pytest.fixture
def python(tmp_path) -> str:
    """Path of a program that stands in for Python."""
    path = tmp_path / "process"
    path.write_text(PROCESS)
    path.chmod(0o755)
    return str(path)


def start(python: str, *arguments: str, **environment: str) -> subprocess.Popen:
    variables = os.environ | {"PYTHON": python} | environment
    command = ["bash", str(LOCAL), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_parses(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("codes", "expected"), [("0 0 0", 0), ("0 3 2", 3), ("1 75 2", 75), ("75 1 0", 75), ("0 0 137", 137)]
)
def test_local_starts_each_process_once_and_ends_with_the_status_that_matters(python, codes, expected):
    process = start(python, "3", "a config.py", "--run-dir", "x", CODES=codes)
    out, err = process.communicate(timeout=20)
    assert process.returncode == expected
    lines = sorted(out.splitlines())
    (port,) = {re.search(r"localhost:(\d+)", line)[1] for line in lines}
    assert 1024 < int(port) < 65536
    assert lines == [
        f"{number}: arguments: {ROOT}/train.py a config.py --run-dir x --distributed.coordinator localhost:{port} "
        f"--distributed.num-processes 3 --distributed.process-id {number}"
        for number in range(3)
    ]
    assert sorted(err.splitlines()) == [f"{number}: unfinished line" for number in range(3)]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_passes_signals_on_once_and_waits(python, tmp_path, number, expected):
    process = start(python, "2", READY=str(tmp_path / "ready"), CODES="0 0")
    deadline = time.monotonic() + 10
    while not all((tmp_path / f"ready.{i}").exists() for i in range(2)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == expected
    said = sorted(line for line in out.splitlines() if "arguments" not in line)
    assert said == [f"{i}: {number.name.removeprefix('SIG')}" for i in range(2)]


@pytest.mark.parametrize("arguments", [[], ["0"], ["two"], ["configs/quickstart.py"]])
def test_local_says_how_it_is_used(python, arguments):
    process = start(python, *arguments)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("usage: ")


def slurm(folder: Path, status: int, *arguments: str) -> tuple[int, list[str]]:
    """Run slurm.sbatch with stand-ins for Slurm's commands: its status, and what they were called with."""
    for name, code in (("srun", status), ("scontrol", 0)):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{folder}/calls"\nexit {code}\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    calls = folder / "calls"
    return result.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75, 137])
def test_slurm_queues_a_preempted_job_again_and_no_other(tmp_path, status):
    code, calls = slurm(tmp_path, status, "a.py", "--run-dir", "run")
    assert code == status
    run, *others = calls
    assert run.endswith("python train.py a.py --run-dir run")
    assert others == ["scontrol requeue 7"] * (status == 75)


def test_slurm_refuses_a_run_that_could_not_continue(tmp_path):
    assert slurm(tmp_path, 0, "a.py") == (2, [])
    (tmp_path / "run").mkdir()
    assert slurm(tmp_path, 0, "run") == (2, [])
    (tmp_path / "run" / "config.json").touch()
    assert slurm(tmp_path, 0, "run")[0] == 0


def test_cloud_tpu_quotes_what_it_is_given(tmp_path):
    """A shell on the workers reads the command again."""
    (tmp_path / "gcloud").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "gcloud").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU": "name", "ZONE": "zone"}
    command = ["bash", str(ROOT / "launch" / "cloud_tpu.sh"), "a.py", "--data.path", "two words/*.txt"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *options, last = result.stdout.splitlines()
    assert options == ["compute", "tpus", "tpu-vm", "ssh", "name", "--zone=zone", "--worker=all"]
    remote = shlex.split(last.removeprefix("--command="))
    assert remote[remote.index("train.py") :] == ["train.py", "a.py", "--data.path", "two words/*.txt"]


def test_jobset_agrees_with_itself():
    spec = YAML["jobset.yaml"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (processes,) = (int(v["value"]) for v in container["env"] if v["name"] == "NUM_PROCESSES")
    assert job["completionMode"] == "Indexed"
    assert processes == job["completions"] == job["parallelism"]
    name = YAML["jobset.yaml"]["metadata"]["name"]
    (port,) = (p["containerPort"] for p in container["ports"])
    assert f"--distributed.coordinator {name}-{replicated['name']}-0-0.{name}:{port} " in container["command"][-1]
    # Kubernetes accepts a podFailurePolicy only for pods that are not restarted in place.
    assert pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    codes = {cli.EXIT_USER_ERROR, *cli.EXIT_OF.values()} - {0, cli.EXIT_OF["interrupted"]}
    assert {*rule["onExitCodes"]["values"]} == codes
    # The first rule that matches is the one that counts. The message is Kubernetes' own.
    for code in codes:
        message = f"Container train for pod default/pod failed with exit code {code} matching FailJob rule at index 0"
        action = next(
            rule["action"]
            for rule in spec["failurePolicy"]["rules"]
            if all(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", ()))
        )
        preempted = code == cli.EXIT_OF["preempted"]
        assert action == ("RestartJobSetAndIgnoreMaxRestarts" if preempted else "FailJobSet")
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_sky_recovers_from_preemption():
    assert YAML["sky.yaml"]["resources"]["job_recovery"]["recover_on_exit_codes"] == [cli.EXIT_OF["preempted"]]


def commands(text: str) -> list[list[str]]:
    """The words of each train.py command, and of those that are handed to it by a launch file."""
    text = text.replace("\\\n", " ")
    for variable, value in {"NUM_PROCESSES": "2", "SKYPILOT_NUM_NODES": "2", "JOB_COMPLETION_INDEX": "0"}.items():
        text = text.replace(f'"${variable}"', value)
    text = text.replace('"$SKYPILOT_NODE_RANK"', "0")
    text = re.sub(r'"\$\(.*?\):(\d+)"', r"node:\1", text)
    found = re.findall(r"(?:python train\.py|local\.sh \d+|slurm\.sbatch|cloud_tpu\.sh) +(configs/.*)$", text, re.M)
    return [shlex.split(line.partition("`")[0], comments=True) for line in found]


def test_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {name: commands(text) for name, text in TEXTS.items()}
    assert len(found["jobset.yaml"]) == len(found["sky.yaml"]) == 1
    assert len(found[DOC.name]) >= 4
    for words in (words for lines in found.values() for words in lines):
        config, _, launch, *_ = cli.parse_train(words, ROOT / "configs" / "quickstart.py")
        assert config.run_dir is not None
        if "--distributed.coordinator" in words:
            assert (launch.num_processes, launch.process_id) == (2, 0)
            assert launch.coordinator.endswith(":8476")


@pytest.mark.parametrize("name", TEXTS)
def test_every_option_of_a_section_exists(name, capsys):
    """`--section.field` anywhere, in prose and comments, too."""
    with pytest.raises(SystemExit) as ended:
        cli.parse_train(["--help"], ROOT / "configs" / "quickstart.py")
    assert ended.value.code == 0
    known = {*re.findall(r"--[a-z]+\.[a-z-]+", capsys.readouterr().out)}
    assert len(known) > 50
    used = {*re.findall(r"--[a-z]+\.[a-z-]+[a-z]", TEXTS[name])} - {"--section.field"}
    assert used <= known
    assert used or name in {"slurm.sbatch", "cloud_tpu.sh"}


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    text = TEXTS[name]
    named = {*re.findall(r"\b(?:configs|launch|benchmarks|gptjax|tests)/[\w/]+\.\w+", text)}
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (DOC.parent / link).exists()] == []


def test_every_launch_file_has_its_section():
    for name in TEXTS:
        assert name == DOC.name or f"### {name}" in TEXTS[DOC.name] or f"(../launch/{name})" in TEXTS[DOC.name]


def test_one_machine_s_paths_stay_out():
    for name, text in TEXTS.items():
        assert not re.search(r"/(work|tmp|root|home|Users)/", text), name
