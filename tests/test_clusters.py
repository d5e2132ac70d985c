"""Several processes that something else starts: SLURM, torchrun, Ray. SLURM is a real one, of three nodes that are this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from tnt_lightning import runs
from tnt_lightning.clusters import Ray, Slurm
from tnt_lightning.errors import UserError
from tnt_lightning.sweep import Job

from .conftest import command
from .test_sweeps import LONG, SHORT, Sweep, gone

SLURM = ("hydra/launcher=slurm", "trainer.devices=2")
KNOBS: dict = dict(partition=None, minutes=None, warning_s=120, cpus_per_task=None, mem_gb=None, setup=[], sbatch={})
ONE = (*SHORT, "trainer.devices=2", "trainer.enable_progress_bar=false")


@pytest.fixture
def cluster(tmp_path_factory):
    """A SLURM that runs; it stays. One test at a time has it."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "slurm.lock"):
        done = subprocess.run([Path(__file__).parent / "slurm_node.sh"], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"no SLURM here: {done.stderr.strip()}")
        yield


def environment(process: int) -> dict[str, str]:
    """What a process was started with."""
    return dict(line.split("=", 1) for line in Path(f"/proc/{process}/environ").read_text().split("\0") if "=" in line)


def children(process: int) -> list[int]:
    stats = [file.read_text() for file in Path("/proc").glob("[0-9]*/stat")]
    return [int(stat.split()[0]) for stat in stats if stat.rpartition(")")[2].split()[1] == str(process)]


def processes(sweep: Sweep, name: str) -> dict[int, int]:
    """rank -> process of a job's tasks that train."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        rank = re.search(rb"\0SLURM_PROCID=(\d+)\0", environment)
        if rank and b"tnt_lightning.train" in line and f"hydra.run.dir='{sweep.folder / name}'".encode() in line:
            found[int(rank[1])] = int(folder.name)
    return found


def number(sweep: Sweep, name: str) -> str:
    return json.loads((sweep.folder / name / "slurm" / "job.json").read_text())["job"]


def said(sweep: Sweep, name: str) -> str:
    log = sweep.folder / name / "job.log"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["hydra/launcher=slurm", "hydra.launcher.minutes=0"], "hydra.launcher.minutes=0 is not null or a whole number from 1"),
        (["hydra/launcher=slurm", "hydra.launcher.partitoin=a"], "hydra.launcher.partitoin=a: no such key; did you mean hydra.launcher.p"),
        (["hydra/launcher=ray", "hydra.launcher.gpus=many"], "hydra.launcher.gpus=many is not null or a whole number from 0"),
        pytest.param(
            ["hydra/launcher=ray", "hydra.launcher.gpus=1", "hydra.launcher.address=auto"],
            "hydra.launcher.gpus, cpus: of a Ray on this machine",
            marks=pytest.mark.skipif(find_spec("ray") is None, reason="Ray is an extra"),
        ),
    ],
)
def test_what_does_not_fit_is_said_before_any_job(tmp_path, overrides, line):
    told = Sweep(tmp_path, "seed=0,1", *overrides).ended(2)
    assert told.startswith(f"error: {line}") and told.count("\n") == 1
    assert not list((tmp_path / "sweep").glob("*/*"))


def test_a_machine_without_slurm_or_an_extra_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        Slurm(**KNOBS)
    monkeypatch.setattr("tnt_lightning.clusters.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"submitit is not installed; pip install '.\[slurm\]'"):
        Slurm(**KNOBS)
    with pytest.raises(UserError, match=r"ray is not installed; pip install '.\[ray\]'"):
        Ray(address=None, gpus=None, cpus=None, cpus_per_device=1)


@pytest.mark.parametrize(
    "told", ["", "{", "[]", "7", '{"job": 7}', '{"argv": []}', '{"job": 7, "argv": []}', '{"job": "--user=you", "argv": []}', "[" * 100_000]
)
def test_of_a_damaged_file_no_job_is_known(tmp_path, monkeypatch, told):
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho asked >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text(told)
    job = Job(number=0, swept=(), argv=[], run=tmp_path, config={})
    assert not Slurm(**KNOBS).at_it(job) and job.where == ""


@pytest.mark.cluster
def test_what_is_missing_is_installed_and_nothing_stays_behind_where_that_fails(tmp_path):
    """Of SLURM's programs one alone is there; apt-get fails."""
    for name, lines in {"slurmctld": "exit 0", "sinfo": "exit 1", "apt-get": f'echo "$@" >>{tmp_path}/asked; exit 100'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    policy = Path("/usr/sbin/policy-rc.d")
    before = policy.exists()
    script = Path(__file__).parent / "slurm_node.sh"
    done = subprocess.run(["bash", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 100 and "install -y -qq --no-install-recommends slurm-wlm munge" in (tmp_path / "asked").read_text()
    assert policy.exists() == before


def test_of_several_tasks_the_directory_is_given_by_the_command(tmp_path):
    """The first one says it, and is not cut off by the end of another."""
    line = [sys.executable, "-m", "tnt_lightning.train"]
    other = subprocess.Popen(line, cwd=tmp_path, env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"}, stderr=subprocess.PIPE)
    first = command("train", cwd=tmp_path, env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"})
    assert first.returncode == 2 and first.stderr.count("error: hydra.run.dir: of several tasks (srun, torchrun)") == 1
    assert other.poll() is None and other.communicate() == (None, b"") and other.returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_sweep_of_jobs_of_two_tasks_in_slurm(tmp_path):
    sweep = Sweep(tmp_path, "inner_heads=1,5,2", *SHORT, *SLURM)
    told = sweep.ended(1)
    for heads in (1, 2):
        run = sweep.folder / f"inner_heads={heads}"
        assert runs.result_of(run)["devices"] == 2 and "a device x 2 device(s)" in (run / "job.log").read_text()
        assert f"queued   inner_heads={heads} (SLURM's job {number(sweep, run.name)})" in told
    assert re.search(r"^failed inner_heads=5: inner_heads=5 does not divide ", told, re.M), told
    again = Sweep(tmp_path, "inner_heads=1,2", *SHORT, *SLURM)
    assert "2 of 2 jobs are finished already" in again.ended(0)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_in_slurm_a_killed_job_fails_and_goes_on_and_the_end_of_the_sweep_cancels(tmp_path):
    sweep = Sweep(tmp_path, "seed=0", *LONG, *SLURM)
    sweep.trained("0")
    ranks = processes(sweep, "0")
    os.kill(ranks[1], signal.SIGKILL)
    assert "failed 0: tnt1: task 1: Killed" in sweep.ended(1) and gone(ranks[0])
    last = sweep.folder / "0" / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns
    again = Sweep(tmp_path, "seed=0", *LONG, *SLURM)
    again.until(lambda: last.exists() and last.stat().st_mtime_ns != before)
    assert "goes on from" in said(sweep, "0")
    again.process.send_signal(signal.SIGINT)
    assert "cut off before its end, and goes on: 0" in again.ended(130)
    assert "stopped by SIGTERM at" in said(sweep, "0") and again.states() == {"0": "stopped"}
    assert not processes(sweep, "0")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_slurms_warning_hands_a_job_back_which_goes_on_as_the_same_one(tmp_path):
    sweep = Sweep(tmp_path, "seed=0", *LONG, *SLURM, "recipe.epochs=30")
    sweep.trained("0")
    job = number(sweep, "0")
    subprocess.run(["scancel", "--signal=USR1", job], check=True)  # as at its time limit
    told = sweep.ended(0)
    assert re.search(r"running .*\nqueued .*\nrunning ", told), told
    log = said(sweep, "0")
    assert f"job {job} handed back to SLURM" in log and "stopped by SIGUSR1 at" in log and "goes on from" in log
    assert number(sweep, "0") == job and runs.result_of(sweep.folder / "0")["epochs"] == 30


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_in_slurm_a_preempted_job_goes_on_as_the_same_one(tmp_path):
    sweep = Sweep(tmp_path, "seed=0", *LONG, *SLURM, "recipe.epochs=30")
    sweep.trained("0")
    subprocess.run(["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"], check=True)
    sweep.ended(0)
    assert "goes on from" in said(sweep, "0") and runs.result_of(sweep.folder / "0")["epochs"] == 30


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_slurm_gives_each_job_gpus_of_its_own(tmp_path):
    """Two on each of two nodes, of which only the names are there; what a job has is what its tasks were started with."""
    plan = [*(one for one in LONG if "accelerator" not in one), "trainer.accelerator=auto", "hydra/launcher=slurm"]
    sweep = Sweep(tmp_path, "seed=0,1", "trainer.devices=1", *plan, "+hydra.launcher.sbatch.nodelist=tnt1")
    (tmp_path / "other").mkdir()
    both = Sweep(tmp_path / "other", "seed=2", "trainer.devices=2", *plan, "+hydra.launcher.sbatch.nodelist=tnt2")
    names = ((sweep, "seed=0"), (sweep, "seed=1"), (both, "0"))
    for one, name in names:
        one.trained(name)
        assert f"#SBATCH --gpus-per-node={1 + (one is both)}\n" in next((one.folder / name / "slurm").glob("*.sh")).read_text()
    seen = [[environment(process) for process in processes(one, name).values()] for one, name in names]
    assert [[task["SLURMD_NODENAME"] for task in job] for job in seen] == [["tnt1"], ["tnt1"], ["tnt2", "tnt2"]]
    gpus = [[task["CUDA_VISIBLE_DEVICES"] for task in job] for job in seen]
    assert sorted(gpus[:2]) == [["0"], ["1"]] and gpus[2] == ["0,1", "0,1"]
    for one in (sweep, both):
        one.process.send_signal(signal.SIGTERM)
    for one in (sweep, both):
        one.ended(143)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_partition_without_gpus_refuses_a_job_in_one_line(tmp_path):
    plan = [*(one for one in SHORT if "accelerator" not in one), "hydra/launcher=slurm", "hydra.launcher.partition=cpu"]
    told = Sweep(tmp_path, "seed=0,1", *plan, "trainer.accelerator=auto").ended(2)
    assert re.fullmatch(
        r"error: seed=0: not taken by SLURM: .*not available; it asks for 1 GPU\(s\) a node, trainer.accelerator=cpu for none\n", told
    )


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_slurms_jobs_outlive_the_sweep_which_finds_them_again(tmp_path):
    sweep = Sweep(tmp_path, "seed=0", *LONG, *SLURM)
    sweep.trained("0")
    sweep.process.kill()
    sweep.process.wait()
    other = Sweep(tmp_path, "seed=0", *LONG, *SLURM, "optimizer.lr=0.001")
    job = number(sweep, "0")
    assert f"error: 0: SLURM's job {job} trains in {sweep.folder}/0 by another configuration" in other.ended(2)
    again = Sweep(tmp_path, "seed=0", *LONG, *SLURM)
    assert again.process.stdout.readline() == "note   at it since before: 0\n"
    assert again.process.stdout.readline() == f"queued   0 (SLURM's job {job})\n"
    assert len(processes(sweep, "0")) == 2
    again.process.send_signal(signal.SIGTERM)
    again.ended(143)
    assert "stopped by SIGTERM at" in said(sweep, "0") and "goes on from" not in said(sweep, "0")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_one_run_on_two_nodes_by_srun(tmp_path):
    run = tmp_path / "run"
    train = [sys.executable, "-m", "tnt_lightning.train", *SHORT, "trainer.num_nodes=2", "trainer.devices=1"]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    done = subprocess.run([*srun, *train, f"hydra.run.dir={run}"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.result_of(run)["devices"] == 2 and "a device x 2 device(s)" in done.stdout
    done = subprocess.run([*srun, *train], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stderr.count("error: hydra.run.dir: of several tasks (srun, torchrun)") == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_gives_each_job_gpus_of_its_own(tmp_path):
    """Three GPUs that only the names of are there; what each job has is what its own process says."""
    pytest.importorskip("ray")
    overrides = [*SHORT[:-1], "trainer.accelerator=auto", "recipe.epochs=1", "recipe.warmup_epochs=0", "+trainer.limit_val_batches=1"]
    ray = ("hydra/launcher=ray", "hydra.launcher.gpus=3", "hydra.launcher.cpus=4")
    sweep = Sweep(tmp_path, "inner_heads=1,5", "trainer.devices=1,2", *overrides, *ray)
    told = sweep.ended(1)
    for heads, devices in ((1, 1), (1, 2)):
        name = f"inner_heads={heads},trainer.devices={devices}"
        assert runs.result_of(sweep.folder / name)["devices"] == devices
        [(_, gpus)] = sweep.headings(name)
        assert len(set(gpus.split(","))) == devices and set(gpus.split(",")) <= {"0", "1", "2"}
    assert len(re.findall(r"^failed inner_heads=5 .* does not divide", told, re.M)) == 2
    refused = Sweep(tmp_path, "seed=0,1", "trainer.devices=4", *overrides, *ray).ended(2)
    assert "error: seed=0: trainer.devices=4, and no machine of Ray's has more than 3 GPUs; lower it" in refused


@pytest.mark.slow
@pytest.mark.cluster
def test_a_ray_without_gpus_says_so_and_refuses_what_it_never_has(tmp_path):
    """By its address, as a cluster is."""
    pytest.importorskip("ray")
    start = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port=0", "--disable-usage-stats"]
    env = {"RAY_AUTH_MODE": "disabled"}  # otherwise as ~/.ray has a token or not
    options = ["--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    head = subprocess.Popen(
        [*start, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}, start_new_session=True
    )
    try:
        address = next(match[1] for line in head.stdout if (match := re.search(r"ray start --address='(\S+)'", line)))
        ray = ("hydra/launcher=ray", f"hydra.launcher.address={address}", *(one for one in SHORT if "accelerator" not in one))
        told = Sweep(tmp_path, "seed=0,1", *ray, "trainer.accelerator=auto", **env).ended(0)
        note = f"note   no machine of Ray's at {address} has a GPU now: jobs train without; trainer.accelerator=gpu refuses that\n"
        assert told.startswith(note) and told.count("note") == 1
        sweep = Sweep(tmp_path, "seed=2", *ray, "trainer.accelerator=cpu,gpu", **env)
        assert sweep.ended(2).endswith(
            "error: trainer.accelerator=gpu: trainer.accelerator=gpu, and no machine of Ray's has a GPU; cpu trains without\n"
        )
        assert set(sweep.states().values()) == {"stopped"}
        claims = "trainer.devices=3 with hydra.launcher.cpus_per_device=1 each, and no machine of Ray's has more than 2 cores"
        assert f"error: seed=3: {claims}; lower one of the two" in Sweep(tmp_path, "seed=3,4", "trainer.devices=3", *ray, **env).ended(2)
    finally:
        below = children(head.pid)
        os.killpg(head.pid, signal.SIGKILL)  # a SIGTERM it thinks over for half a minute
        head.wait()
    assert all(gone(process) for process in below)


@pytest.mark.slow
@pytest.mark.cluster
def test_rays_jobs_end_with_the_sweep_after_a_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a number of one's own wins
    ray = ("hydra/launcher=ray", "hydra.launcher.cpus=6", "hydra.launcher.cpus_per_device=3", "trainer.devices=2")
    sweep = Sweep(tmp_path, "seed=0", *LONG, *ray)
    sweep.trained("0")
    first = sweep.started("0")
    other = next(process for process in children(first) if environment(process).get("LOCAL_RANK") == "1")
    assert [environment(process)["OMP_NUM_THREADS"] for process in (first, other)] == ["3", "3"]
    sweep.process.send_signal(signal.SIGTERM)
    sweep.ended(143)
    assert said(sweep, "0").count("stopped by SIGTERM at") == 1 and sweep.states() == {"0": "stopped"}
    again = Sweep(tmp_path, "seed=0", *LONG, *ray)
    process = again.started("0", times=2)
    last = sweep.folder / "0" / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns
    again.until(lambda: last.exists() and last.stat().st_mtime_ns != before)
    again.process.kill()
    assert gone(process) and "goes on from" in said(sweep, "0") and said(sweep, "0").count("stopped by SIGTERM at") == 2


@pytest.mark.slow
def test_two_processes_by_torchrun_end_in_the_figures_of_lightnings_own(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tnt_lightning.train"]
    done = subprocess.run([*torchrun, *ONE, "hydra.run.dir=run"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert command("train", *ONE, "hydra.run.dir=plain", cwd=tmp_path).returncode == 0
    by_torchrun, plain = (runs.result_of(tmp_path / name) for name in ("run", "plain"))
    for name in ("devices", "steps", "val/loss", "test/loss", "test/top1"):
        assert by_torchrun[name] == plain[name], name
    before = (tmp_path / "run" / ".hydra" / "overrides.yaml").read_bytes()
    again = subprocess.run([*torchrun, *ONE, "hydra.run.dir=run", "resume=null"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and (tmp_path / "run" / ".hydra" / "overrides.yaml").read_bytes() == before
