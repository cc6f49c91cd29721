"""The shell launchers as a user calls them. Where only the command matters, a stand-in for `accelerate` prints it."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import children
from tests.caching import cached
from tests.commands import ROOT, warm_programs

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "scripts"
SYSTEM = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}


def program(path: Path, text: str) -> Path:
    """An executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def bash(script: Path, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script from a folder, in an environment with nothing of ours."""
    command = ["bash", str(script), *arguments]
    environment = SYSTEM | environment
    return children.run(command, cwd=folder, env=environment)


@pytest.fixture
def printing(tmp_path) -> dict[str, str]:
    """An environment whose accelerate prints the folder and its arguments, one a line, on a machine without a GPU."""
    program(tmp_path / "env/bin/accelerate", 'printf "%s\\n" "$PWD" "$@"')
    return {"VIRTUAL_ENV": str(tmp_path / "env"), "CUDA_VISIBLE_DEVICES": ""}


def options(done: subprocess.CompletedProcess) -> list[str]:
    """What accelerate was given before the script, without the file that is always named."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    given = lines[lines.index("launch") + 1 : lines.index(str(ROOT / "train/run.py"))]
    assert given[:3] == ["--quiet", "--config_file", str(SCRIPTS / "accelerate.yaml")]
    return given[3:]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("name", ["lbm_2511", "sft_2511", "sft_2509"])
def test_launchers_pass_everything_on_from_any_folder(name, printing, tmp_path):
    """Also through a link, with spaces, quotes and brackets in what is passed."""
    (tmp_path / "link.sh").symlink_to(SCRIPTS / f"train_{name}.sh")
    overrides = ["data.dataset=my pairs.json", "name='it''s'", "phases=[cache,train]", "*", ""]
    for script in (SCRIPTS / f"train_{name}.sh", tmp_path / "link.sh"):
        done = bash(script, *overrides, folder=tmp_path, **printing)
        lines = done.stdout.removesuffix("\n").split("\n")
        assert lines[0] == str(tmp_path)
        assert lines[lines.index(str(ROOT / "train/run.py")) + 1 :] == [f"+exp={name}", *overrides]


def test_every_gpu_is_used_by_default(printing, tmp_path):
    """Those that are visible; one process without any."""
    launch = SCRIPTS / "launch.sh"
    several = ["--num_processes", "3", "--multi_gpu", "--main_process_port", "0"]
    assert options(bash(launch, folder=tmp_path, **printing)) == ["--num_processes", "1"]
    assert options(bash(launch, folder=tmp_path, **printing | {"CUDA_VISIBLE_DEVICES": "0,5,7"})) == several
    assert options(bash(launch, folder=tmp_path, **printing | {"CUDA_VISIBLE_DEVICES": "-1"})) == [
        "--num_processes",
        "1",
    ]
    assert options(bash(launch, folder=tmp_path, **printing, NPROC="3")) == several
    program(tmp_path / "bin/nvidia-smi", "printf 'GPU 0: H200\\n  MIG 1g\\nGPU 1: H200\\nGPU 2: H200\\n'")
    visible = {"VIRTUAL_ENV": printing["VIRTUAL_ENV"], "PATH": f"{tmp_path}/bin:{SYSTEM['PATH']}"}
    assert options(bash(launch, folder=tmp_path, **visible)) == several


def test_several_machines(printing, tmp_path):
    machines = {"NUM_MACHINES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "15000"}
    done = bash(SCRIPTS / "launch.sh", folder=tmp_path, **printing, **machines, MACHINE_RANK="1", NPROC="4")
    assert " ".join(options(done)) == (
        "--num_processes 8 --multi_gpu --num_machines 2 --machine_rank 1 --rdzv_backend static "
        "--main_process_ip node0 --main_process_port 15000"
    )
    done = bash(SCRIPTS / "launch.sh", folder=tmp_path, **printing, **machines)
    assert (done.returncode, done.stderr) == (
        2,
        "error: NUM_MACHINES=2 needs MACHINE_RANK, MASTER_ADDR and MASTER_PORT too\n",
    )


def test_the_users_accelerate_file_decides(printing, tmp_path):
    (tmp_path / "mine.yaml").touch()
    done = bash(SCRIPTS / "launch.sh", folder=tmp_path, **printing, ACCELERATE_CONFIG="mine.yaml")
    assert done.stdout.splitlines()[1:5] == ["launch", "--quiet", "--config_file", "mine.yaml"]
    assert done.stdout.splitlines()[5] == str(ROOT / "train/run.py")
    done = bash(SCRIPTS / "launch.sh", folder=tmp_path, **printing, ACCELERATE_CONFIG="none.yaml")
    assert (done.returncode, done.stderr) == (2, "error: ACCELERATE_CONFIG=none.yaml does not exist\n")


@pytest.mark.parametrize("number", ["0", "two", "-1", "1.5"])
def test_a_wrong_number_of_processes_is_refused(number, printing, tmp_path):
    done = bash(SCRIPTS / "launch.sh", folder=tmp_path, **printing, NPROC=number)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: NPROC must be a positive whole number, got '{number}'\n",
    )


def test_the_environment_that_is_used(tmp_path):
    """The active one, then the repository's, then what is on the path, then uv's; else a sentence."""
    repo, bare = tmp_path / "repo", tmp_path / "bin"
    shutil.copytree(SCRIPTS, repo / "scripts", ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    bare.mkdir()
    for name in ("bash", "dirname", "readlink", "grep", "tr", "mktemp", "rm", "sleep", "touch"):
        (bare / name).symlink_to(str(shutil.which(name)))

    def used(**environment: str) -> str:
        environment = {"PATH": str(bare), "CUDA_VISIBLE_DEVICES": "", **environment}
        command = [str(shutil.which("bash")), str(repo / "scripts/launch.sh")]
        done = children.run(command, env=environment)
        return done.stdout.splitlines()[0] if done.returncode == 0 else f"{done.returncode} {done.stderr}"

    assert used().startswith("2 error: there is no accelerate: install with 'pip install uv'")
    for folder, said in [(bare / "uv", "uv"), (bare / "accelerate", "path"), (repo / ".venv/bin/accelerate", "repo")]:
        program(folder, f'echo {said} "$@"')
        expected = f"uv run --project {repo} accelerate launch" if said == "uv" else f"{said} launch"
        assert used().startswith(expected)
    program(tmp_path / "active/bin/accelerate", "echo active")
    assert used(VIRTUAL_ENV=str(tmp_path / "active")) == "active"
    assert used(VIRTUAL_ENV=str(tmp_path / "deleted")).startswith("repo")


def test_with_the_real_accelerate(tmp_path):
    """Nothing but the configuration is printed, even where an accelerate file was made for another project."""
    stale = tmp_path / "hf/accelerate/default_config.yaml"
    stale.parent.mkdir(parents=True)
    stale.write_text("distributed_type: MULTI_GPU\nmixed_precision: fp16\nnum_processes: 4\nnum_machines: 2\n")
    settings = {"HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = bash(SCRIPTS / "train_sft_2509.sh", "data.dataset=my pairs.json", "--cfg", folder=tmp_path, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dataset: my pairs.json" in done.stdout
    assert "path: Qwen/Qwen-Image-Edit-2509" in done.stdout
    done = bash(SCRIPTS / "train_sft_2509.sh", "data.datset=pairs.json", "--cfg", folder=tmp_path, **settings)
    assert done.returncode != 0
    assert done.stderr.startswith("error: unknown key data.datset: did you mean data.dataset? (")
    assert len(done.stderr.splitlines()) == 1


SCONTROL = """
case "$1 $2" in
  "show hostnames") [ "$3" = "node[0-1]" ] && printf '127.0.0.1\\nlocalhost\\n' ;;
  "show job") printf '   Command=%s +exp=x\\n' "$SUBMITTED" ;;
  *) echo "scontrol $*" ;;
esac
"""
SRUN = """
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node "$@" &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do wait "$process" || code=$?; done
exit $code
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Inside a job of two nodes, which are processes here."""
    program(tmp_path / "slurm/scontrol", SCONTROL)
    program(tmp_path / "slurm/srun", SRUN)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    path = {"PATH": f"{tmp_path}/slurm:{SYSTEM['PATH']}", "SUBMITTED": str(SCRIPTS / "slurm_multinode.sh")}
    return job | path


@pytest.fixture
def spooled(tmp_path) -> Path:
    """The script where sbatch puts it."""
    return Path(shutil.copy(SCRIPTS / "slurm_multinode.sh", tmp_path / "slurm_script"))


def test_slurm_starts_every_node_alike(slurm, spooled, printing, tmp_path):
    overrides = ["+exp=[lbm_2511,smoke]", "run_dir=my runs/a", "name='x y'"]
    done = bash(spooled, *overrides, folder=tmp_path, **printing | slurm)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert sorted(re.findall(r"--machine_rank\n(\d)", text)) == ["0", "1"]
    assert text.count("--main_process_ip\n127.0.0.1\n--main_process_port\n19711\n") == 2
    assert text.count("--num_processes\n2\n--multi_gpu\n") == 2
    assert text.count("\n".join(overrides)) == 2


def test_slurm_finds_the_repository_or_says_so(slurm, spooled, printing, tmp_path):
    nowhere = slurm | {"SUBMITTED": "/nowhere/slurm_multinode.sh", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = bash(spooled, folder=tmp_path, **printing | nowhere)
    assert (done.returncode, done.stderr) == (
        2,
        "error: the repository was not found: submit the job from its folder, or set REPO=FOLDER\n",
    )
    for found in ({"REPO": str(ROOT)}, {"SLURM_SUBMIT_DIR": str(ROOT)}):
        assert bash(spooled, folder=tmp_path, **printing | nowhere | found).returncode == 0


def test_slurm_passes_a_failure_on_and_requeues_before_the_time_limit(slurm, spooled, printing, tmp_path):
    program(tmp_path / "slurm/srun", "exit 3")
    assert bash(spooled, folder=tmp_path, **printing | slurm).returncode == 3
    program(tmp_path / "slurm/scancel", 'echo "scancel $*"')
    for code in (4, 0):  # the training has been stopped, or it was complete: then nothing is left to do
        program(tmp_path / "slurm/srun", f"kill -USR1 $PPID; sleep 1; exit {code}")
        done = bash(spooled, folder=tmp_path, **printing | slurm)
        requeued = "scontrol requeue 4711\n" if code else ""
        assert done.stdout == f"scancel --signal=USR1 4711\n{requeued}"
        assert done.returncode == code  # it has waited on


@pytest.mark.distributed
def test_two_nodes_cache_and_train_together(slurm, spooled, tiny_model_dir, tiny_pairs, tiny_cache, tmp_path):
    data = [f"data.dataset={tiny_pairs}/train.json", f"data.validation={tiny_pairs}/validation.json"]
    settings = ["parallel=ddp", "train.num_steps=1", "train.micro_batch_size=1", "adapter.rank=2", "validate=none"]
    paths = [f"model.path={tiny_model_dir}", "cache.dir=shared cache", "run_dir=runs/two nodes"]
    warm = warm_programs(tmp_path / "programs") | slurm
    done = bash(spooled, "+exp=tiny_lbm", *data, *settings, *paths, "cache.shard_size=2", folder=tmp_path, **warm)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("12 rows cached (12 encoded now)") == 1
    one, two = (cached(folder, tiny_pairs / "train.json") for folder in (tiny_cache, tmp_path / "shared cache"))
    assert one.keys == two.keys
    assert (tmp_path / "runs/two nodes/checkpoints/step-000001/adapter_model.safetensors").exists()


def containerfile(instruction: str) -> list[str]:
    """The arguments of every such instruction of the container file."""
    return re.findall(rf"^{instruction} (.+)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)


def test_the_container_is_built_by_the_documented_steps():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci/run"]
    documented = "\n".join(document.read_text() for document in documents)
    runs = [step.strip() for line in containerfile("RUN") for step in line.split("&&")]
    assert runs == ["pip install uv", "uv sync"]
    for step in runs:
        assert step in documented, f"{step} is not among the documented steps"


def test_what_the_container_copies_is_there_and_not_ignored():
    ignored = [
        line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    for line in containerfile("COPY"):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists()
            assert source not in ignored
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {path.split("/")[0] for path in tracked} & set(ignored)
    assert (ROOT / containerfile("CMD")[0].split('"')[3]).exists()
    assert re.fullmatch(r"[a-z]+:[\d.]+", containerfile("FROM")[0])
