"""`python -m tests.two_gpus`: what takes two GPUs or more, and so no CI has tried. Some minutes; a table, a verdict, a file to send along.

    equality    training on one GPU and on two: the same images in the same order, weights, averages and figures; every image counted once
    placement   a sweep: each job has GPUs of its own, all GPUs are used, and a job of two has two
    throughput  TNT-S at 224 in bfloat16: images/s on one GPU and on two
    kill        of two ranks one is killed: all end within half a minute with one line, and the same command goes on

Exit code 0: all of them pass; 1: one does not; 2: there are no two GPUs. It runs the commands that anybody runs, in processes of their own.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.soak import lines
from tnt_lightning import benchmark, runs
from tnt_lightning.cli import Parser, fail
from tnt_lightning.speed.data import make_photos

ROOT = Path(__file__).parents[1]
MARK = "TNT_LIGHTNING_TWO_GPUS"  # in the environment of all that is started here
FIGURE = 1e-3  # weights, averages and losses (relative) of one GPU and of two may differ by as much: sums in another order
SCALING = 1.6  # images/s on two GPUs by those on one, at least
END_S = 30  # from the end of one rank to that of all processes
PATIENCE_S = 3600
TESTED = {"val": 216, "test": 359}  # digits; the odd number does not divide among two

# SGD: Adam's first steps take the sign of a gradient, which where that is rounding is not the same twice. What is drawn on the device is
# drawn for each rank, and is left out.
EXACT = (
    "logger=csv", "optimizer=sgd", "recipe.epochs=4", "recipe.warmup_epochs=1", "trainer.precision=32-true", "+trainer.deterministic=warn",
    "data.num_workers=0", "recipe.augmentation.degrees=0", "recipe.augmentation.shift=0", "recipe.augmentation.zoom=0",
    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1",
)  # fmt: skip
IN_FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # the same sums every time
ABOUT = """
import json, torch
from tnt_lightning import runs
nccl = torch.cuda.nccl.version() if torch.cuda.is_available() and torch.distributed.is_nccl_available() else ()
count = torch.cuda.device_count()
print(json.dumps({
    "gpus": [torch.cuda.get_device_name(n) for n in range(count)], "cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl)) or None,
    "peer_access": count > 1 and torch.cuda.can_device_access_peer(0, 1), **runs.origin(),
}))
"""


class Wrong(Exception):
    """Why a check cannot go on."""


class Found(NamedTuple):
    said: str  # what was seen, in a line
    wrong: list[str]  # why it does not pass
    figures: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the checks run. gpus: of the machine; on a CPU names, of GPUs that are not there; batch: images a GPU, of throughput"""

    folder: Path
    cpu: bool
    gpus: list[str]
    batch: int
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def accelerator(self) -> str:
        return f"trainer.accelerator={'cpu' if self.cpu else 'gpu'}"

    def start(self, name: str, *overrides: str, out: Path, **env: str) -> subprocess.Popen:
        """`python -m NAME OVERRIDES`; what it says to stdout and stderr comes into out.out and out.err."""
        drop = ("HYDRA_FULL_ERROR", "TNT_LIGHTNING_SHORT_ERRORS", "LOCAL_RANK")
        kept = {key: value for key, value in os.environ.items() if key not in drop}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".out").open("w") as said, out.with_suffix(".err").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", name, *overrides], cwd=ROOT, stdout=said, stderr=errors, start_new_session=True,
                env={**kept, **hidden, **env, MARK: self.mark},
            )  # fmt: skip

    def run(self, name: str, *overrides: str, out: Path, **env: str) -> str:
        """As `start`, to its end; gives its stdout."""
        process = self.start(name, *overrides, out=out, **env)
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise Wrong(f"{name} took longer than {PATIENCE_S} s") from None
        if code:
            last = [*out.with_suffix(".out").read_text().splitlines(), *out.with_suffix(".err").read_text().splitlines()][-1:]
            raise Wrong(f"{name} ended with exit code {code}: {''.join(last)}")
        return out.with_suffix(".out").read_text()

    def processes(self) -> dict[int, bytes]:
        """All that was started here and lives, with its environment."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                if f"{MARK}={self.mark}".encode() in (content := environ.read_bytes()).split(b"\0"):
                    found[int(environ.parent.name)] = content
        return found

    def end(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# ---- equality


def equality(at: Place) -> Found:
    one, two = (at.folder / "equality" / name for name in ("one", "two"))
    for devices, run in ((1, one), (2, two)):
        at.run("tests.witnessed", *EXACT, at.accelerator, f"trainer.devices={devices}", f"hydra.run.dir={run}", out=run, **IN_FLOAT32)
    wrong = []
    order, seen = (lines(run.with_suffix(".seen")) for run in (one, two))
    shares = [order[rank::2] for rank in (0, 1)]  # of the ranks, each in its order, whoever wrote first
    if len(seen) != len(order) or any([line for line in seen if line in mine] != share for share in shares for mine in [set(share)]):
        wrong.append("not the same images in the same order")
    weights = {name: apart(one, two, key) for name, key in (("weights", "current_model_state"), ("averages", "state_dict"))}
    a, b = runs.result_of(one), runs.result_of(two)
    losses = {name: abs(b[name] / a[name] - 1) for name in ("val/loss", "test/loss")}
    wrong += [f"{name} differ by {value:.1e}" for name, value in {**weights, **losses}.items() if not value <= FIGURE]
    hits = {part: b[f"{part}/top1"] / 100 * size for part, size in TESTED.items()}
    wrong += [f"{part}: {n:.4f} right images of {TESTED[part]}" for part, n in hits.items() if abs(n - round(n)) > 1e-3]
    said = at.run("tnt_lightning.evaluate", f"run={two}", at.accelerator, "trainer.devices=1", out=two.with_name("again"), **IN_FLOAT32)
    again = re.findall(r"(?:test|val)/top\d\s*\D\s*([\d.]+)\s*\D\s*([\d.]+)", said)
    if len(again) != 4 or any(now != recorded for now, recorded in again):
        wrong.append(f"two GPUs measured other figures than one does of the same weights: {again}")
    close = ", ".join(f"{name} within {value:.0e}" for name, value in {**weights, "losses": max(losses.values())}.items())
    said = f"{len(order):,} images in order; {close}"
    return Found(said, wrong, {"images": len(order), "steps": b["steps"], **weights, **losses, "right": hits})


def apart(one: Path, other: Path, key: str) -> float:
    """The largest difference of a weight."""
    import torch

    a, b = (torch.load(runs.checkpoint_path(run, "last"), map_location="cpu", weights_only=True)[key] for run in (one, other))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# ---- placement


def placement(at: Place) -> Found:
    gpus = at.gpus[:4]
    short = ("logger=csv", "recipe.epochs=2", "recipe.warmup_epochs=1", "data.num_workers=0", "trainer.accelerator=auto")
    small = ("model.depth=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1") if at.cpu else ()
    seeds, folder = ("seed=0,1" if at.cpu else "seed=0,1,2,3"), at.folder / "placement"
    sweep = (seeds, "trainer.devices=1,2", *short, *small, f"hydra.launcher.gpus={len(gpus)}", f"hydra.sweep.dir={folder}")
    with watched(at) as samples:
        said = at.run("tnt_lightning.train", "-m", *sweep, out=folder / "sweep", CUDA_VISIBLE_DEVICES=",".join(at.gpus))
    busy: dict[str, tuple[str, str]] = {}
    used: set[str] = set()
    wrong, most = [], 0
    for line in said.splitlines():
        if match := re.match(r"running  (\S+) (\S+) on GPU (\S+)$", line):
            name, given = (match[1], match[2]), match[3].split(",")
            if met := busy.keys() & set(given):
                wrong.append(f"{' '.join(name)} began on GPU {','.join(met)}, which {' '.join(busy[min(met)])} had")
            busy |= dict.fromkeys(given, name)
            used |= busy.keys()
            most = max(most, len(busy))
        elif match := re.match(r"finished (\S+) (\S+):", line):
            busy = {gpu: name for gpu, name in busy.items() if name != (match[1], match[2])}
    if used != set(gpus) or most != len(gpus):
        wrong.append(f"of {len(gpus)} GPUs {len(used)} were used, at most {most} at a time")
    jobs = {}
    for job in sorted(folder.glob("*/job.log")):
        found = re.findall(r"^\S+ \S+ process (\d+): CUDA_VISIBLE_DEVICES=(\S+) python", job.read_text(), re.M)
        devices = runs.result_of(job.parent).get("devices")
        for process, names in found:
            jobs[int(process)] = (job.parent.name, names.split(","))
        if len(found) != 1 or not set(given := found[0][1].split(",")) <= set(gpus) or len(set(given)) != devices:
            wrong.append(f"{job.parent.name}: {devices} device(s), and in its log {found}")
    smi, more = seen_by_nvidia(samples, jobs, gpus_by_id())
    named = "names that are not there" if at.cpu else f"nvidia-smi: {smi}"
    return Found(f"{len(jobs)} jobs on {len(used)} GPUs ({named})", [*wrong, *more], {"jobs": sorted(jobs.values()), "nvidia_smi": smi})


Sample = set[tuple[str, int]]  # (a GPU's id, the session of a process that computes on it)


@contextlib.contextmanager
def watched(at: Place) -> Iterator[list[Sample]]:
    """What computes on which GPU while something runs, as nvidia-smi tells. A job is a session, that of its first process."""
    samples: list[Sample] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            sample = set()
            for row in nvidia("--query-compute-apps=gpu_uuid,pid").splitlines():
                gpu, _, number = row.partition(", ")
                with contextlib.suppress(OSError, ValueError):  # gone meanwhile, or not ours to see
                    sample.add((gpu, os.getsid(int(number))))
            samples.append(sample)

    thread = threading.Thread(target=watch, daemon=True)
    if not at.cpu:
        thread.start()
    try:
        yield samples
    finally:
        over.set()
        if not at.cpu:
            thread.join()


def seen_by_nvidia(samples: Sequence[Sample], jobs: dict[int, tuple[str, list[str]]], ids: dict[str, str]) -> tuple[str, list[str]]:
    """(what was seen in a few words, what is wrong with it). jobs: process -> (name, its GPUs); ids: of the GPUs, by their names."""
    met, wrong = 0, set()
    for sample in samples:
        ours = [(gpu, jobs[session]) for gpu, session in sample if session in jobs]
        met += bool(ours)
        for gpu, (name, given) in ours:
            if gpu not in {ids.get(one, one) for one in given}:
                wrong.add(f"{name} computes on {gpu}, and was given {','.join(given)}")
            if len({other for there, (other, _) in ours if there == gpu}) > 1:
                wrong.add(f"several jobs compute on {gpu}")
    said = f"jobs seen in {met} of {len(samples)} looks" if met else "names no process of ours (a container has other numbers)"
    return said, sorted(wrong)


def gpus_by_id() -> dict[str, str]:
    return dict(row.split(", ") for row in nvidia("--query-gpu=index,uuid").splitlines())


def nvidia(query: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        asked = ["nvidia-smi", *([query, "--format=csv,noheader"] if query.startswith("--") else query.split())]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


# ---- throughput


def throughput(at: Place) -> Found:
    images, photos, size = (64, 8, "64x48") if at.cpu else (80 * at.batch, 256, "500x375")
    root = at.folder / "photos"
    for _ in make_photos(root, size, photos, seed=0):
        pass
    for part, count in (("train", images - photos), ("val", 1)):  # the same ones again, as another class
        (root / part / "again").mkdir()
        for number in range(count):
            os.link(root / part / "photos" / f"{number % photos}.jpg", root / part / "again" / f"{number}.jpg")
    data = ("data=imagenet", f"data.root={root}", "data.num_classes=2", "data.subset=true", "model=tnt_s")
    small = ("image_size=32", "model.depth=1", "data.num_workers=0", "recipe.threads=1") if at.cpu else ()
    plan = ("logger=csv", "recipe.epochs=3", "recipe.warmup_epochs=1", "trainer.precision=bf16-mixed", "trainer.enable_progress_bar=false")
    speed = []
    for devices in (1, 2):
        run = at.folder / "throughput" / str(devices)
        sizes = (f"trainer.devices={devices}", f"data.batch_size={devices * at.batch}")
        at.run("tnt_lightning.train", *data, *plan, *small, *sizes, at.accelerator, f"hydra.run.dir={run}", out=run)
        speed.append((result := runs.result_of(run))["images_per_s"])
    scaling = speed[1] / speed[0]
    flops = [6 * result["flops"] * images_per_s / devices / 1e12 for devices, images_per_s in enumerate(speed, 1)]
    wrong = [f"two GPUs load and train {scaling:.2f} times as many, expected {SCALING}"] if scaling < SCALING and not at.cpu else []
    said = f"{speed[0]:,.0f} images/s, {speed[1]:,.0f} on two: {scaling:.2f} times as many, {scaling / 2:.0%} of twice; "
    figures = {
        "images_per_s": speed, "scaling": scaling, "share_of_linear": scaling / 2, "tflops_a_gpu": flops, "batch_a_gpu": at.batch,
        "cores": len(os.sched_getaffinity(0)), "model": "tnt_s, depth 1, 32 pixels" if at.cpu else "tnt_s", "precision": "bf16-mixed",
    }  # fmt: skip
    return Found(f"{said}{flops[0]:.3g} and {flops[1]:.3g} TFLOP/s a GPU", wrong, figures)


# ---- one rank is killed


def kill(at: Place) -> Found:
    run, whole = at.folder / "kill" / "run", at.folder / "equality" / "two"
    plan = (*EXACT, at.accelerator, "trainer.devices=2", f"hydra.run.dir={run}")
    first = at.start("tnt_lightning.train", *plan, out=run, **IN_FLOAT32)
    last, errors = runs.checkpoint_path(run, "last"), run.with_suffix(".err")
    while not last.exists() and first.poll() is None:
        time.sleep(0.02)
    rank = next((pid for pid, environ in at.processes().items() if b"LOCAL_RANK=1" in environ.split(b"\0")), None)
    if rank is None:
        raise Wrong(f"it ended before it could be killed: {errors.read_text()}")
    os.kill(rank, signal.SIGKILL)
    began = time.monotonic()
    while (left := at.processes() or first.poll() is None) and time.monotonic() < began + END_S:
        time.sleep(0.1)
    took = time.monotonic() - began
    wrong = [f"after {END_S} s processes are left"] if left else []
    at.end()
    said = errors.read_text().splitlines()
    own = [line for line in said if line.startswith("error: ")]
    if len(own) != 1 or not own[0].startswith(f"error: rank 1 (process {rank}) was killed by SIGKILL") or "Traceback" in "".join(said):
        wrong.append(f"it said: {' / '.join(said)}")
    if first.wait() != 128 + signal.SIGKILL:
        wrong.append(f"exit code {first.returncode}, not {128 + signal.SIGKILL}")
    shutil.copy(errors, run.with_suffix(".killed"))
    if "goes on from" not in at.run("tnt_lightning.train", *plan, out=run, **IN_FLOAT32):
        wrong.append("it began anew")
    difference = max(apart(whole, run, key) for key in ("current_model_state", "state_dict"))
    if not difference <= FIGURE:
        wrong.append(f"its weights differ by {difference:.1e} from those of the run that nobody killed")
    others = f" beside {len(said) - len(own)} of libraries" if len(said) > len(own) else ""
    end = f"to weights within {difference:.0e}" if difference else "to the same weights"
    return Found(
        f"all ended in {took:.1f} s with one line{others}; went on {end}", wrong, {"seconds": took, "said": said, "apart": difference}
    )


# ---- all of them


CHECKS: dict[str, Callable[[Place], Found]] = {"equality": equality, "placement": placement, "throughput": throughput, "kill": kill}


def main() -> None:
    parser = Parser(prog="python -m tests.two_gpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("two_gpus.json"), help="the file to send along (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs stay (default: they are deleted)")
    parser.add_argument("--batch", type=int, help="images a GPU, of throughput; lower it where memory is short (default: 128)")
    parser.add_argument(
        "--cpu", action="store_true", help="tries the script itself: two small processes without GPUs; it says nothing of any"
    )
    given = parser.parse_args()
    about = machine(cpu=given.cpu)
    if len(about["gpus"]) < 2 and not given.cpu:
        fail(f"two GPUs are needed, and torch sees {len(about['gpus'])} here; --cpu tries the script itself")
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(len(about["gpus"]))))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        if given.folder and given.folder.exists() and any(given.folder.iterdir()):
            fail(f"--folder {given.folder}: not empty; choose another")
        place = Place(
            folder=folder, cpu=given.cpu, gpus=["97", "98"] if given.cpu else names, batch=given.batch or (8 if given.cpu else 128)
        )
        found, seconds = {}, {}
        for name, check in CHECKS.items():
            print(f"{name} ...", flush=True)
            began = time.monotonic()
            try:
                found[name] = check(place)
            except Exception as why:  # the other checks are looked at all the same
                told = str(why) if isinstance(why, Wrong) else f"{type(why).__name__}: {why}"
                found[name] = Found("could not be looked at to the end", [told], {})
            finally:  # also after a Ctrl-C, which what was started does not get
                place.end()
            seconds[name] = round(time.monotonic() - began, 1)
    table = Table(
        "check", "", "seen", "s", title="two processes without GPUs, which says nothing of any" if given.cpu else " + ".join(about["gpus"])
    )
    for name, one in found.items():
        table.add_row(name, word(one), "\n".join([one.said, *one.wrong]), f"{seconds[name]:.0f}")
    Console().print(table)
    passed = not any(one.wrong for one in found.values())
    checks = {name: {"passed": not one.wrong, "seconds": seconds[name], **one._asdict()} for name, one in found.items()}
    runs.write(given.out, json.dumps({"passed": passed, "cpu": given.cpu, "checks": checks, "machine": about}, indent=1) + "\n")
    print(f"verdict {'PASS' if passed else 'FAIL'}: {', '.join(f'{name} {word(one)}' for name, one in found.items())}")
    print(f"to send along: {given.out}")
    raise SystemExit(0 if passed else 1)


def word(found: Found) -> str:
    return "FAIL" if found.wrong else "PASS"


def machine(*, cpu: bool) -> dict[str, Any]:
    """GPUs, driver, interconnect, versions, commit; asked in a process of its own, since who asks has a part of the first GPU's memory."""
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
    done = subprocess.run([sys.executable, "-c", ABOUT], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        fail(f"torch does not start here: {''.join(done.stderr.splitlines()[-1:])}")
    driver = nvidia("--query-gpu=name,driver_version,memory.total").splitlines()
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "cpu": benchmark.cpu(),
        "nvidia_smi": driver,
        "topology": nvidia("topo -m").splitlines(),
    }


if __name__ == "__main__":
    main()
