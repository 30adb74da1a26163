"""The launch scripts: what they print, what they run, and that a command arrives on the other side as it was given."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
SCRIPTS = ("tpu_vm.sh", "slurm.sh", "kubernetes.sh")
AWKWARD = ["llmos", "train", "a b.py", "--set", "x='1' \"2\"", "$HOME `id` \\ @IMAGE@ & ;|*", "två\nrader", ""]
TPU = ["slice", "--zone", "us-east5-b", "--project", "p"]
SLURM = ["--nodes", "2", "--gpus-per-node", "8"]
GKE_TPU = ["run1", "--image", "r/llmos:1", "--tpu", "tpu-v6e-slice", "--topology", "4x4"]
GKE_GPU = ["run1", "--image", "r/llmos:1", "--gpus-per-node", "8", "--nodes", "2"]


def launch(script, *arguments, path=None, env=None, **kwargs):
    environment = {"PATH": path or os.defpath, "TMPDIR": "/tmp", **(env or {})}
    command = [shutil.which("bash"), str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **kwargs)


@pytest.fixture
def bare(tmp_path):
    """A PATH with the few commands that a dry run may use."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for tool in ("sed", "dirname", "cat"):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


@pytest.fixture
def fake(tmp_path):
    """Makes a command of that name, ahead of everything else on the PATH."""
    folder = tmp_path / "fake"
    folder.mkdir()

    def make(name, script):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
        return f"{folder}:{os.defpath}"

    return make


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax_help_and_shellcheck(script, bare):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], check=False).returncode == 0
    assert os.access(LAUNCH / script, os.X_OK)
    told = launch(script, "--help", path=bare)
    assert told.returncode == 0 and "--dry-run" in told.stdout and "#" not in told.stdout
    for option in re.findall(r"^    (--[a-z-]+)", (LAUNCH / script).read_text(), re.M):
        assert option in told.stdout, f"{option} is not in the help"
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(LAUNCH / script)], capture_output=True, text=True, check=False)
        assert checked.stdout == ""


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_vm.sh", [], "the name of the TPU VM is missing"),
        ("tpu_vm.sh", ["a", "b"], "two names, 'a' and 'b'"),
        ("tpu_vm.sh", ["a", "--zone"], "--zone needs a value"),
        ("tpu_vm.sh", ["a"], "--zone is missing"),
        ("tpu_vm.sh", ["a", "--zone", "z"], "--project is missing"),
        ("tpu_vm.sh", TPU, "there is no command to run"),
        ("tpu_vm.sh", [*TPU, "--wrong"], "--wrong is not an option"),
        ("tpu_vm.sh", [*TPU, "--repo", "/nowhere", "--", "llmos"], "/nowhere has no pyproject.toml"),
        ("tpu_vm.sh", [*TPU, "--create", "v1-8", "--", "llmos"], "no runtime is known"),
        ("slurm.sh", [], "--nodes is missing"),
        ("slurm.sh", ["--nodes", "two", "--gpus-per-node", "8"], "--nodes two is not a number"),
        ("slurm.sh", ["--nodes", "2"], "--gpus-per-node is missing"),
        ("slurm.sh", SLURM, "there is no command to run"),
        ("slurm.sh", [*SLURM, "--name", "a b"], "'a b' has a space in it"),
        ("slurm.sh", [*SLURM, "llmos"], "llmos is not an option"),
        ("kubernetes.sh", [], "the name of the run is missing"),
        ("kubernetes.sh", ["Run_1"], "'Run_1' cannot name a JobSet"),
        ("kubernetes.sh", ["run1"], "--image is missing"),
        ("kubernetes.sh", ["run1", "--image", "i"], "give --tpu and --topology, or --gpus-per-node"),
        ("kubernetes.sh", [*GKE_TPU, "--gpus-per-node", "8"], "exclude each other"),
        ("kubernetes.sh", [*GKE_TPU[:-1], "4*4", "--", "llmos"], "'4*4' is not a topology"),
        ("kubernetes.sh", [*GKE_TPU, "--chips-per-host", "3", "--", "llmos"], "does not divide the 16 chips"),
        ("kubernetes.sh", [*GKE_GPU, "--grace", "0", "--", "llmos"], "--grace 0 is not a number"),
        ("kubernetes.sh", [*GKE_GPU, "--node-selector", "x", "--", "llmos"], "'x' is not KEY=VALUE"),
        ("kubernetes.sh", GKE_GPU, "there is no command to run"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(script, arguments, message, bare):
    done = launch(script, *arguments, path=bare)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{script}: ") and message in done.stderr and done.stderr.count("\n") == 1


# TPU VM


def test_tpu_dry_run_needs_nothing_and_changes_nothing(bare):
    done = launch("tpu_vm.sh", *TPU, "--create", "v6e-16", "--spot", "--dry-run", "--", *AWKWARD[:5], path=bare)
    assert done.returncode == 0 and done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    commands = [shlex.split(line) for line in lines]
    assert [" ".join(c[:5]) if c[0] == "gcloud" else c[0] for c in commands] == [
        "gcloud compute tpus queued-resources create",
        "gcloud compute tpus queued-resources describe",
        "tar",
        "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
    ]
    assert {"--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"} <= set(commands[0])
    assert all({"--zone=us-east5-b", "--project=p"} <= set(c) for c in commands if c[0] == "gcloud")
    assert [next((a for a in c if a.startswith("--worker")), None) for c in commands[3:]] == [
        *("--worker=all",) * 3,
        "--worker=0",
    ]


def test_tpu_actions(bare):
    for action, expected in [
        ("--delete", "queued-resources delete slice"),
        ("--stop", "pkill -TERM -P"),
        ("--follow", "tail"),
    ]:
        done = launch("tpu_vm.sh", *TPU, action, "--dry-run", path=bare)
        assert done.returncode == 0 and expected in done.stdout and done.stdout.count("\n") == 1


@pytest.fixture
def tpu_host(fake, tmp_path):
    """A stand-in for a TPU host: gcloud runs what it is given here, in a home of its own, and nothing is installed."""
    home = tmp_path / "home"
    (home / "llmos" / ".venv" / "bin").mkdir(parents=True)
    (home / "llmos.tar.gz").write_bytes(gzip.compress(bytes(10240)))  # an empty archive
    fake("python3", "exit 0")
    path = fake(
        "gcloud",
        f"""
printf '%s\\0' "$@" >> {tmp_path}/calls; printf '\\n\\0' >> {tmp_path}/calls
for argument in "$@"; do
  case $argument in --command=*) HOME={home} exec bash -c "${{argument#--command=}}" ;; esac
done""",
    )

    def llmos(script):
        program = home / "llmos" / ".venv" / "bin" / "llmos"
        program.write_text(f"#!/usr/bin/env bash\n{script}\n")
        program.chmod(0o755)
        return path

    return llmos, home


def test_a_command_arrives_on_the_tpu_host_as_it_was_given(tpu_host, tmp_path):
    llmos, home = tpu_host
    path = llmos(f'printf "%s\\0" "$@" > {tmp_path}/got; echo "distributed $LLMOS_DISTRIBUTED in $PWD"; exit 7')
    done = launch("tpu_vm.sh", *TPU, "--", *AWKWARD, path=path, env={"TMPDIR": str(tmp_path)})
    assert (tmp_path / "got").read_text().split("\0")[:-1] == AWKWARD[1:]
    assert done.returncode == 7  # that of the command
    assert f"distributed 1 in {home}/llmos" in done.stdout
    assert (tmp_path / "llmos-slice.tar.gz").stat().st_size > 1000


def test_a_run_on_a_tpu_is_stopped_after_it_has_saved(tpu_host, tmp_path):
    llmos, home = tpu_host
    path = llmos('trap "echo saved; exit 75" TERM; echo started; for i in {1..300}; do sleep 0.1; done')
    environment = {"PATH": path, "TMPDIR": str(tmp_path)}
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), *TPU, "--", "llmos", "train"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for _ in range(1200):
            if (home / "llmos.log").exists() and "started" in (home / "llmos.log").read_text():
                break
            time.sleep(0.05)
        second = launch("tpu_vm.sh", *TPU, "--", "llmos", "train", path=path, env={"TMPDIR": str(tmp_path)})
        assert second.returncode == 2 and "a run is in progress" in second.stderr
        assert launch("tpu_vm.sh", *TPU, "--stop", path=path).returncode == 0
        out, _ = run.communicate(timeout=30)
    assert run.returncode == 75
    assert out.split() == ["started", "saved"]


# Slurm


def test_slurm_script_asks_for_what_was_given(bare):
    options = ["--time", "4:00:00", "--sbatch", "--partition=h200", "--sbatch", "--account=lab", "--venv", "/my envs/x"]
    done = launch("slurm.sh", *SLURM, *options[:6], "--dry-run", "--", *AWKWARD, path=bare)
    assert done.returncode == 0 and done.stderr == ""
    head = [line.removeprefix("#SBATCH ") for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64", "--time=4:00:00"} <= set(
        head
    )
    assert {"--requeue", "--signal=TERM@180", "--partition=h200", "--account=lab"} <= set(head)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    refused = launch("slurm.sh", *SLURM, *options, "--dry-run", "--", "llmos", path=bare)
    assert refused.returncode == 2 and "has a space in it" in refused.stderr


@pytest.mark.parametrize(
    "status, state, requeued", [(0, "RUNNING", 0), (75, "RUNNING", 1), (75, "CANCELLED", 0), (2, "RUNNING", 0)]
)
def test_slurm_starts_one_process_a_node_and_requeues_a_saved_run(fake, tmp_path, status, state, requeued):
    fake("sbatch", "exec bash")
    fake("scontrol", f'case $1 in show) printf "node7\\nnode8\\n" ;; *) echo "$@" >> {tmp_path}/scontrol ;; esac')
    fake("squeue", f"echo {state}")
    fake(
        "srun",
        'while [[ $1 == --* ]]; do shift; done; worst=0; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; '
        "code=$?; ((code > worst)) && worst=$code; done; exit $worst",
    )
    path = fake(
        "llmos",
        f'echo "$LLMOS_COORDINATOR $LLMOS_NUM_PROCESSES $LLMOS_PROCESS_ID" >> {tmp_path}/seen; '
        f'printf "%s\\0" "$@" > {tmp_path}/got; exit {status}',
    )
    slurm = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "5",
        "SLURM_CPUS_PER_TASK": "9",
    }
    done = launch("slurm.sh", *SLURM, "--port", "1234", "--", *AWKWARD, path=path, env=slurm)
    assert done.returncode == status
    assert (tmp_path / "seen").read_text() == "node7:1234 2 0\nnode7:1234 2 1\n"
    assert (tmp_path / "got").read_text().split("\0")[:-1] == AWKWARD[1:]
    assert (tmp_path / "scontrol").exists() == bool(requeued)
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 5\n"


def test_slurm_uses_the_virtual_environment(bare):
    done = launch("slurm.sh", *SLURM, "--venv", "/shared/venv", "--dry-run", "--", "llmos", path=bare)
    assert 'export PATH=/shared/venv/bin:"$PATH"' in done.stdout


# Kubernetes


def rendered(bare, *arguments):
    yaml = pytest.importorskip("yaml")
    done = launch("kubernetes.sh", *arguments, "--dry-run", "--", *AWKWARD, path=bare)
    assert done.returncode == 0 and done.stderr == ""
    assert not re.search(r"# [tg]pu$", done.stdout, re.M)
    jobset = yaml.safe_load(done.stdout)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return jobset, job, pod, pod["containers"][0]


def test_jobset_for_a_tpu_slice(bare):
    jobset, job, pod, container = rendered(bare, *GKE_TPU, "--service-account", "writer", "--grace", "90")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [
        {"name": "LLMOS_STOPPED_EXIT_CODE", "value": "75"},
        {"name": "LLMOS_DISTRIBUTED", "value": "1"},
    ]
    assert container["command"] == AWKWARD
    assert pod["serviceAccountName"] == "writer" and pod["terminationGracePeriodSeconds"] == 90


@pytest.mark.parametrize(
    "topology, per_host, hosts, chips",
    [("4x4", "4", 4, 4), ("2x4", "8", 1, 8), ("1x1", "4", 1, 1), ("4x4x8", "4", 32, 4)],
)
def test_hosts_of_a_topology(bare, topology, per_host, hosts, chips):
    _, job, _, container = rendered(bare, *GKE_TPU[:-1], topology, "--chips-per-host", per_host)
    assert job["parallelism"] == hosts and container["resources"]["limits"] == {"google.com/tpu": chips}


def test_jobset_for_gpus(bare):
    selector = "cloud.google.com/gke-accelerator=nvidia-h200-141gb"
    jobset, job, pod, container = rendered(bare, *GKE_GPU, "--node-selector", selector, "--namespace", "ml")
    assert jobset["metadata"] == {"name": "run1", "namespace": "ml"}
    assert job["parallelism"] == job["completions"] == 2
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert env == {
        "LLMOS_STOPPED_EXIT_CODE": "75",
        "LLMOS_COORDINATOR": "run1-worker-0-0.run1:8476",
        "LLMOS_NUM_PROCESSES": "2",
        "LLMOS_PROCESS_ID": index,
    }
    assert "securityContext" not in container


def test_a_pod_that_is_taken_away_does_not_use_up_a_restart(bare):
    jobset, job, pod, _ = rendered(bare, *GKE_GPU, "--max-restarts", "5")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    disrupted, saved = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert saved["action"] == "FailJob" and saved["onExitCodes"]["values"] == [75]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # what a pod failure policy asks for


def test_default_grace_is_longer_than_a_save_may_take(bare):
    from llmos_jax.config import FaultConfig

    _, _, pod, _ = rendered(bare, *GKE_GPU)
    assert pod["terminationGracePeriodSeconds"] >= FaultConfig().grace_seconds
    script = launch("slurm.sh", *SLURM, "--dry-run", "--", "llmos", path=bare).stdout
    # Slurm may send its signal up to a minute early or late.
    assert int(re.search(r"TERM@(\d+)", script)[1]) >= FaultConfig().grace_seconds + 60


def test_kubectl_gets_what_the_dry_run_prints(bare, fake, tmp_path):
    path = fake("kubectl", f'printf "%s\\n" "$@" > {tmp_path}/arguments; cat > {tmp_path}/input')
    assert launch("kubernetes.sh", *GKE_GPU, "--", "llmos", "doctor", path=path).returncode == 0
    dry = launch("kubernetes.sh", *GKE_GPU, "--dry-run", "--", "llmos", "doctor", path=bare)
    assert (tmp_path / "arguments").read_text() == "apply\n-f\n-\n"
    assert (tmp_path / "input").read_text() == dry.stdout
    stop = launch("kubernetes.sh", "run1", "--stop", "--dry-run", path=bare)
    assert stop.stdout == "kubectl delete jobset run1 --namespace=default\n"


def test_dockerfile_copies_what_the_package_needs():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?:--\S+ )?(.*) \S+$", text, re.M) for name in line.split()}
    assert copied >= {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "llmos_jax",
        "pallas_kernels",
        "configs",
    }
    assert "USER 1000" in text and json.loads(re.search(r"ENTRYPOINT (.*)", text)[1]) == ["llmos"]
