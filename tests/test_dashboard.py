"""Weights & Biases for real: offline, unreachable, silent, killed, unwritable; its own record files are read back."""

import csv
import gzip
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tnt_lightning import dashboard, runs, workspace
from tnt_lightning.callbacks import Throughput
from tnt_lightning.classifier import Classifier
from tnt_lightning.config import KNOBS, check
from tnt_lightning.data import Digits
from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model

from .conftest import QUICK, command, compose, resolved

KEY = "0123456789abcdef" * 2 + "01234567"
MADE_UP = r'"(__)?(id|ref)(__)?": ?"[^"]*"'  # at every call, of panels
SHORT = ("+trainer.limit_train_batches=3",)


def stranger(home: Path) -> dict[str, str]:
    """The environment of somebody who never logged in."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != "NETRC"}, "HOME": str(home)}


@pytest.fixture
def nobody(tmp_path_factory, monkeypatch):
    env = stranger(tmp_path_factory.mktemp("home"))
    for key in os.environ.keys() - env.keys():
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", env["HOME"])
    _forget()
    yield monkeypatch
    _forget()


def _forget() -> None:
    """What W&B holds in this process: a session with the server and the user of whoever was here before."""
    import wandb

    with suppress(Exception):  # its service may be dead, or stopped
        dashboard._within(10, wandb.teardown)


def train(run: Path, *overrides: str) -> dict:
    from tnt_lightning.train import train

    return train(resolved("logger=wandb", *QUICK, *overrides), run)


class Recorded:
    """What a .wandb file holds: a LevelDB log of protobuf records."""

    def __init__(self, run: Path, pattern: str = "wandb/offline-run-*/*.wandb"):
        from wandb.proto.wandb_internal_pb2 import Record

        [self.file] = (file for file in run.glob(pattern) if not file.parent.is_symlink())
        data, place, whole = self.file.read_bytes(), 7, b""
        self.config, self.history, self.summary, self.exit = {}, [], {}, None
        while place + 7 <= len(data):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = Record()
                record.ParseFromString(whole)
                self._take(record)
                whole = b""

    def _take(self, record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            self.config |= _plain(record.run.config.update)
        elif kind == "history":
            self.history.append(_plain(record.history.item))
        elif kind == "summary":
            self.summary |= _plain(record.summary.update)
        elif kind == "exit":
            self.exit = record.exit.exit_code

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]


def _plain(items) -> dict:
    found: dict = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = found
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(item.value_json)
    return found


def images(root: Path) -> None:
    """A set of two classes, cats and dogs, laid out as ImageNet is."""
    rng = np.random.default_rng(0)
    for part, name in ((part, name) for part in ("train", "val") for name in ("cat", "dog")):
        (root / part / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(root / part / name / f"{i}.png")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if "W&B" in line or "wandb: " in line]


def same(a: Path, b: Path) -> bool:
    for name in ("last", "best"):
        one, two = (torch.load(runs.checkpoint_path(run, name), weights_only=True) for run in (a, b))
        for key in ("state_dict", "current_model_state"):
            if not all(torch.equal(tensor, two[key][n]) for n, tensor in one[key].items()):
                return False
    return True


# ---- a run of somebody who has no account


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A short run by the command, of two processes, and on a terminal, where wandb would ask for a key."""
    folder = tmp_path_factory.mktemp("logged")
    master, terminal = pty.openpty()
    line = [sys.executable, "-m", "tnt_lightning.train", *QUICK, f"hydra.run.dir={folder / 'run'}", "logger.tags=[digits]"]
    line += ["trainer.accelerator=cpu", "trainer.devices=2"]
    env = {**stranger(folder), "COLUMNS": "200"}
    child = subprocess.Popen(line, cwd=folder, env=env, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the terminal is gone: the end
        pass
    assert child.wait(timeout=60) == 0, shown.decode()
    (folder / "shown.txt").write_bytes(shown)
    return folder / "run"


@pytest.mark.slow
def test_one_line_says_how_to_upload_it(logged):
    assert runs.result_of(logged)["devices"] == 2
    [line] = lines((logged.parent / "shown.txt").read_text())
    assert line == f"W&B    offline, not logged in (wandb login); to upload it: wandb sync {logged / 'wandb'}"
    asked = [sys.executable, "-m", "wandb", *shlex.split(line.split(": ")[1])[1:], "--dry-run"]
    done = subprocess.run(asked, cwd=logged.parent, env=stranger(logged.parent), capture_output=True, text=True, timeout=60)
    assert "Would sync 1 run(s)" in done.stderr and Recorded(logged).file.name in done.stderr


def test_the_configuration_is_nested_with_the_knobs_on_top(logged):
    config = Recorded(logged).config
    stored = runs.config_of(logged)
    assert {key: config[key] for key in stored} == stored
    assert config["inner_heads"] == 2 and config["model"]["outer_dim"] == 96 and config["logger"]["tags"] == ["digits"]


def test_curves_are_those_of_the_csv_file(logged):
    rows, recorded = list(csv.DictReader((logged / "metrics.csv").open())), Recorded(logged)
    for name, count in (("train/loss", 38), ("lr", 38), ("val/top1", 2), ("val/loss", 2)):
        want = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert len(want) == count and dict(recorded.curve(name)) == pytest.approx(want, rel=1e-6)


def test_the_summary_holds_what_the_result_holds(logged):
    recorded, result = Recorded(logged), runs.result_of(logged)
    assert {name: recorded.summary[name] for name in result} == result
    assert result["versions"]["wandb"]
    best = max(value for _, value in recorded.curve("val/top1"))
    assert recorded.summary["best/val/top1"] == pytest.approx(best) == pytest.approx(result["val/top1"], abs=1e-4)


def test_the_run_directory_knows_its_wandb_run(logged):
    recorded, known = Recorded(logged), json.loads((logged / "wandb.json").read_text())
    assert known == dict(
        id=recorded.run.run_id, project="tnt_lightning", entity=None, mode="offline", url=None, folders=[str(logged / "wandb")]
    )
    assert recorded.run.project == "tnt_lightning" and list(recorded.run.tags) == ["digits"] and recorded.exit == 0
    assert recorded.run.display_name == "/".join(logged.parts[-2:])
    assert not (logged.parent / "wandb").exists()


def test_examples_are_predicted_by_the_average(logged):
    curve = Recorded(logged).curve
    shown = [examples for _, examples in curve("examples")]
    assert [step for step, _ in curve("examples")] == [step for step, _ in curve("val/top1")] == [18, 37]  # first epoch, and last
    folder = Recorded(logged).file.parent / "files"
    for examples in shown:
        assert len(examples["filenames"]) == len(examples["captions"]) == 16
    data = Digits(num_classes=10, in_chans=1, image_size=8, mean=0.0, std=1.0, crop_pct=1.0, num_workers=0)
    data.setup()
    places = np.linspace(0, 215, 16).round().astype(int)
    pixels = np.stack([np.asarray(data.parts.val[i][0]) for i in places])
    for name, image in zip(shown[-1]["filenames"], pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / name)), image.repeat(12, 0).repeat(12, 1))

    last = torch.load(runs.checkpoint_path(logged, "last"), weights_only=True)
    captions = {}
    for key in ("state_dict", "current_model_state"):  # the average, and the raw weights
        backbone = build_model(**runs.config_of(logged)["model"]).eval()
        backbone.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in last[key].items()})
        with torch.no_grad():
            sure, guess = backbone(torch.from_numpy(pixels).float()[:, None] / 255).softmax(1).max(1)
        labels = [data.parts.val.labels[i] for i in places]
        captions[key] = [f"predicted {g} ({p:.0%}), is {y}" for g, p, y in zip(guess.tolist(), sure.tolist(), labels, strict=True)]
    assert shown[-1]["captions"] == captions["state_dict"] != captions["current_model_state"]


def test_colour_and_names_of_classes(tmp_path, nobody):
    images(tmp_path)
    train(
        tmp_path / "run", "data=imagenet", f"data.root={tmp_path}", "data.num_classes=2", "data.subset=true", "data.batch_size=4",
        "data.num_workers=0",
        "model=tnt_ti", "image_size=32", "model.depth=1", "data.val_fraction=0.25", "logger.num_images=9", "recipe.epochs=1",
        "recipe.warmup_epochs=0",
    )  # fmt: skip
    recorded = Recorded(tmp_path / "run")
    [examples] = [row["examples"] for row in recorded.history if "examples" in row]
    assert [re.sub(r"predicted (cat|dog) \(\d+%\), ", "", caption) for caption in examples["captions"]] == ["is cat", "is dog"]
    with Image.open(recorded.file.parent / "files" / examples["filenames"][0]) as image:
        assert image.mode == "RGB" and image.size == (96, 96)


# ---- many runs


@pytest.mark.slow
def test_the_jobs_of_a_sweep_are_a_group_and_a_run_each(tmp_path):
    sweep = tmp_path / "heads"
    overrides = ("inner_heads=1,2", "trainer=debug", "logger.tags=[mine]", "logger.images_every=0")
    done = command("train", "-m", *overrides, f"hydra.sweep.dir={sweep}", cwd=tmp_path, env=stranger(tmp_path))
    assert done.returncode == 0, done.stderr
    jobs = [Recorded(sweep / f"inner_heads={heads}") for heads in (1, 2)]
    assert len({job.run.run_id for job in jobs}) == 2
    assert {job.run.run_group for job in jobs} == {"/".join(sweep.parts[-2:])}
    assert [job.run.display_name for job in jobs] == ["heads/inner_heads=1", "heads/inner_heads=2"]
    assert all(job.run.job_type == "sweep" and list(job.run.tags) == ["mine", "inner_heads"] for job in jobs)
    firsts = [next((key, value) for key, value in job.config.items() if key != "_wandb") for job in jobs]
    assert firsts == [("inner_heads", 1), ("inner_heads", 2)]
    [together] = [line for line in done.stdout.splitlines() if line.startswith("W&B ")]
    assert together == f"W&B    offline; to upload the whole sweep: wandb sync {sweep}/*/wandb"
    assert not any("examples" in row for job in jobs for row in job.history)
    assert all(len(lines((sweep / f"inner_heads={heads}" / "job.log").read_text())) == 1 for heads in (1, 2))


def test_an_agent_of_wandbs_own_starts_a_run_of_its_sweep(tmp_path, nobody):
    """By what the agent leaves in the environment of the run, and in a file; also keys of a section, and files of one."""
    given = {"inner_heads": 3, "optimizer.lr": 0.002, "recipe": "digits", "seed": 1}
    wanted = yaml.safe_dump({"wandb_version": 1, **{key: {"value": value} for key, value in given.items()}})
    (tmp_path / "config-r1.yaml").write_text(wanted)
    for key, value in {"SWEEP_ID": "s1", "RUN_ID": "r1", "SWEEP_PARAM_PATH": str(tmp_path / "config-r1.yaml"), "MODE": "offline"}.items():
        nobody.setenv(f"WANDB_{key}", value)
    train(tmp_path / "run", *(f"{key}={value}" for key, value in given.items()), *SHORT)
    recorded = Recorded(tmp_path / "run")
    assert (recorded.run.run_id, recorded.run.sweep_id, recorded.run.run_group, recorded.run.job_type) == ("r1", "s1", "s1", "sweep")
    assert list(recorded.run.tags) == ["inner_heads", "optimizer.lr", "recipe"]
    firsts = [(key, value) for key, value in recorded.config.items() if key != "_wandb"][:4]
    assert firsts == [("inner_heads", 3), ("optimizer_lr", 0.002), ("recipe_choice", "digits"), ("seed", 1)]
    assert recorded.config["optimizer"]["lr"] == 0.002 and recorded.config["model"]["inner_heads"] == 3


# ---- modes


@contextmanager
def server(*, listens: bool):
    """An address that refuses connections, or one that takes them and never answers."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        if listens:
            here.listen(100)
        yield f"http://127.0.0.1:{here.getsockname()[1]}"


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "never answers"])
def test_an_unreachable_server_is_given_up_in_bounded_time(tmp_path, nobody, capsys, listens):
    with server(listens=listens) as address:
        nobody.setenv("WANDB_BASE_URL", address)
        nobody.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        train(tmp_path / "run", *SHORT, "logger.init_timeout=2")
        assert time.monotonic() - began < 20
    shown = capsys.readouterr()
    [line] = lines(shown.out + shown.err)
    assert (
        line.startswith(f"W&B    offline, {address} did not take the run: ")
        and f"; to upload it: wandb sync {tmp_path / 'run' / 'wandb'}" in line
    )
    assert Recorded(tmp_path / "run").summary["test/top1"] == runs.result_of(tmp_path / "run")["test/top1"]


@pytest.mark.parametrize("mode, logger_mode, said", [
    ("disabled", "auto", None),
    ("offline", "auto", "offline, as asked"),
    ("online", "auto", "offline, not logged in"),
    ("online", "disabled", None),
    ("disabled", "offline", "offline, as asked"),
    ("nonsense", "auto", "not used: "),
])  # fmt: skip
def test_the_environment_wins_over_auto(tmp_path, nobody, capsys, mode, logger_mode, said):
    nobody.setenv("WANDB_MODE", mode)
    if mode == "offline":  # not even asked
        nobody.setenv("WANDB_API_KEY", KEY)
        nobody.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    train(tmp_path / "run", *SHORT, f"logger.mode={logger_mode}", "recipe.epochs=1", "recipe.warmup_epochs=0")
    shown = capsys.readouterr()
    found = lines(shown.out + shown.err)
    assert [line.startswith(f"W&B    {said}") for line in found] == ([True] if said else [])
    assert (tmp_path / "run" / "wandb.json").exists() == bool(said and said.startswith("offline"))
    assert (tmp_path / "run" / "metrics.csv").exists() and runs.result_of(tmp_path / "run")


def test_the_project_of_the_environment_wins_over_the_default(nobody):
    assert resolved()["logger"]["project"] == "tnt_lightning"
    nobody.setenv("WANDB_PROJECT", "mine")
    assert resolved()["logger"]["project"] == "mine" and resolved("logger.project=this")["logger"]["project"] == "this"


@pytest.mark.parametrize("override, answer", [
    ("logger.mode=ofline", "logger.mode=ofline is not one of auto, online, offline, disabled"),
    ("logger.images_every=-1", "logger.images_every=-1 is not a whole number from 0 to 1,000,000,000"),
    ("logger.num_images=0", "logger.num_images=0 is not a whole number from 1 to 1,000,000,000"),
    ("logger.init_timeout=soon", "logger.init_timeout=soon is not a number from 1 to 86,400"),
    ("logger.project=a/b", "logger.project=a/b is not a name of at most 128 characters"),
    ("logger.project=null", "logger.project=null is not a name"),
    ("logger.group=3", "logger.group=3 is not text or null; quote it: logger.group=\"'3'\""),
    ("logger.tags=a", "logger.tags=a is not a list of texts"),
    ("+logger.log_model=true", "logger.log_model=true: no such key; did you mean logger.mode?"),
    ("logger.name=tensorboard", "logger.name=tensorboard is not one of wandb, csv, none"),
])  # fmt: skip
def test_a_bad_value_gets_a_line(override, answer):
    with pytest.raises(UserError) as caught:
        check(compose(override), "tnt_digits")
    assert str(caught.value).startswith(answer) and "\n" not in str(caught.value)


# ---- online


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run, an agent and a view need; it keeps the lines of each run's history, the last exit code and the
    files' names."""

    def __init__(self):
        self.history, self.exit, self.files, self.config, self.group = {}, {}, set(), {}, {}
        self.sweep, self.orders = "", []  # the file of a sweep of its own, and what its agents are to do
        self.views, self.forbids = [], False
        self.ill, self.well = "", threading.Event()  # "gone", "broken" or "silent" from now on, until it is well again
        super().__init__(("127.0.0.1", 0), Answering)
        self.address = f"http://127.0.0.1:{self.server_port}"

    def query(self, text: str, given: dict) -> dict:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "team"}}
        if "RunResumeStatus" in text:
            lines, name = self.history.get(given["name"]), given["name"]
            bucket = None
            if lines is not None:
                bucket = dict(id="b", name=name, displayName="", summaryMetrics=lines[-1], config="{}", tags=[], notes=None)
                bucket |= dict(logLineCount=0, eventsLineCount=0, historyLineCount=len(lines), eventsTail="[]")
                bucket |= dict(historyTail=json.dumps(lines[-1:]), wandbConfig='{"t": 1}')  # a run that has begun
            return {"model": {**project, "bucket": bucket}}
        if "upsertBucket" in text:
            self.history.setdefault(given["name"], [])
            self.config[given["name"]] = json.loads(given["config"])
            self.group.setdefault(given["name"], given["groupName"])  # which later ones do not say again
            bucket = dict(id="b", name=given["name"], displayName=given["displayName"], description=None, config="{}", sweepName=None)
            bucket |= dict(project=project, historyLineCount=len(self.history[given["name"]]))
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "viewer" in text:
            return {"viewer": dict(id="u", username="me", email="me@here", entity="team", flags="{}", teams={"edges": []})}
        if "SweepWithRuns" in text:
            return {"project": {"sweep": dict(id="s", name=given["sweep"], config=self.sweep, runs={"edges": []})}}
        if "CreateAgent" in text:
            return {"createAgent": {"agent": {"id": "a"}}}
        if "Heartbeat" in text:
            busy = json.loads(given["runState"])
            commands = [] if busy or not self.orders else [self.orders.pop(0)]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        if "allViews" in text:
            found = [view for view in self.views if (view["name"], view["project"]) == (given["viewName"], given["projectName"])]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        if "upsertView" in text:
            view = next((view for view in self.views if view["id"] == given.get("id")), None)
            if view is None:
                view = {"id": f"v{len(self.views)}"}
                self.views.append(view)
            view.update(name=given["name"], project=given["projectName"], displayName=given["displayName"], spec=given["spec"])
            return {"upsertView": {"view": view, "inserted": True}}
        if "CreateRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"entity": {"organization": None}}


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_ill():
            return
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        answer = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            if self.server.forbids and "upsertView" in asked["query"]:
                self.send_error(403)
                return
            answer = {"data": self.server.query(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            name, streamed = self.path.split("/")[-2], json.loads(body)
            if new := streamed.get("files", {}).get("wandb-history.jsonl"):
                self.server.history[name][new["offset"] :] = new["content"]
            if streamed.get("complete"):
                self.server.exit[name] = streamed["exitcode"]
        self._answer(answer)

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_ill():
            return
        self.server.files.add(self.path.removeprefix("/upload/"))
        self._answer({})

    def _is_ill(self) -> bool:
        if self.server.ill == "broken":
            self.send_error(500)
        elif self.server.ill == "silent":
            self.server.well.wait()
        self.close_connection = bool(self.server.ill)
        return bool(self.server.ill)

    def handle_one_request(self):
        with suppress(ConnectionError):  # the service went, with its connections open
            super().handle_one_request()

    def _answer(self, what: dict) -> None:
        text = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def there(nobody):
    """A server that is reached, and an account on it."""
    with Server() as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        nobody.setenv("WANDB_BASE_URL", here.address)
        nobody.setenv("WANDB_API_KEY", KEY)
        yield here
        here.well.set()
        here.shutdown()


def test_online_and_continued_it_is_one_run(tmp_path, there, capsys):
    train(tmp_path / "run", *SHORT)
    shown = capsys.readouterr()
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())
    name = known["id"]
    assert lines(shown.out + shown.err) == [f"W&B    {known['url']}"]
    assert known["url"] == f"{there.address}/team/tnt_lightning/runs/{name}" and known["entity"] == "team"
    assert there.exit[name] == 0 and there.config[name]["model"]["value"]["outer_dim"] == 96
    assert sum(file.startswith("media/images/examples") for file in there.files) == 32
    before = list(there.history[name])

    train(tmp_path / "more", *SHORT, f"resume={tmp_path / 'run'}", "recipe.epochs=3")
    assert [*there.history] == [name] and there.history[name][: len(before)] == before
    after = [json.loads(line) for line in there.history[name]]
    assert [row["_step"] for row in after] == list(range(len(after)))
    assert [row["trainer/global_step"] for row in after if "train/loss" in row] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_goes_on_in_its_own_directory_stays_one_run(tmp_path, there):
    train(tmp_path / "run", *SHORT)
    (tmp_path / "run" / "result.json").unlink()
    train(tmp_path / "run", *SHORT, "recipe.epochs=3")
    [history] = there.history.values()
    assert [json.loads(row)["_step"] for row in history] == list(range(len(history)))
    assert [row["trainer/global_step"] for row in map(json.loads, history) if "train/loss" in row] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((tmp_path / "run" / "wandb.json").read_text())["folders"] == [str(tmp_path / "run" / "wandb")]


@pytest.mark.slow
def test_the_line_at_a_sweeps_end_uploads_its_runs_and_no_other(tmp_path, there):
    sweep = tmp_path / "of rates"
    overrides = ("optimizer.lr=0.002,0.003", "trainer=debug", "logger.images_every=0", "logger.mode=offline", f"hydra.sweep.dir='{sweep}'")
    where = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def last_line() -> str:
        done = command("train", "-m", *overrides, cwd=tmp_path)
        [line] = [line for line in done.stdout.splitlines() if line.startswith("W&B ")]
        return line.removeprefix("W&B    offline; to upload the whole sweep: ")

    line = last_line()
    assert line == f"wandb sync '{sweep}'/*/wandb"
    done = subprocess.run(f"{line} --dry-run", shell=True, cwd=tmp_path, env=where, capture_output=True, text=True, timeout=60)
    assert "Would sync 2 run(s)" in done.stderr
    aside = runs.put_aside(sweep / "optimizer.lr=0.002")
    line = last_line()
    assert shlex.split(line) == ["wandb", "sync", *(str(sweep / f"optimizer.lr={rate}" / "wandb") for rate in (0.002, 0.003))]
    assert aside.is_dir() and not there.history
    subprocess.run(line, shell=True, cwd=tmp_path, env=where, capture_output=True, timeout=60, check=True)
    rates = {Recorded(sweep / f"optimizer.lr={rate}").run.run_id: rate for rate in (0.002, 0.003)}
    assert there.history.keys() == rates.keys() and all(there.history.values())
    assert {name: config["optimizer_lr"]["value"] for name, config in there.config.items()} == rates
    assert set(there.group.values()) == {"/".join(sweep.parts[-2:])}


@pytest.mark.slow
def test_wandbs_agent_runs_a_sweep_file(tmp_path, there, nobody):
    images(tmp_path / "images")
    sweep = yaml.safe_load((Path(__file__).parents[1] / "experiments" / "table_05_tnt_blocks" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_hyphens}"
    few = ["data.num_classes=2", "data.subset=true", "data.batch_size=4", "data.num_workers=0", "image_size=32", "model.depth=1"]
    few += ["recipe.epochs=1", "recipe.warmup_epochs=0"]
    command = [part.replace("/path/to/imagenet", str(tmp_path / "images")) for part in sweep["command"]]
    there.sweep = yaml.safe_dump({**sweep, "command": [*command[:-1], *few, command[-1]]})
    given = {"tnt_blocks": {"value": [1]}, "seed": {"value": 1}}
    there.orders = [{"type": "run", "run_id": "r1", "program": sweep["program"], "args": given}]
    nobody.setenv("WANDB_MODE", "offline")  # of the run
    nobody.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    line = [sys.executable, "-m", "wandb", "agent", "--count", "1", "team/tnt_lightning/s1"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and not there.orders, done.stderr
    run = tmp_path / "multirun" / "s1" / "r1"
    recorded, stored = Recorded(run), runs.config_of(run)
    assert {key: recorded.config[key] for key in stored} == stored and stored["tnt_blocks"] == stored["model"]["tnt_blocks"] == [1]
    assert (recorded.run.run_id, recorded.run.sweep_id, recorded.run.run_group, recorded.run.job_type) == ("r1", "s1", "s1", "sweep")
    assert list(recorded.run.tags) == ["tnt_blocks"] and recorded.summary["val/top1"] == runs.result_of(run)["val/top1"]


def test_the_views_of_a_project_are_saved_and_then_kept_up_to_date(there, nobody, capsys):
    nobody.setattr(sys, "argv", ["dashboard", "--project", "mine"])
    workspace.main()
    saved = capsys.readouterr().out.splitlines()
    assert len(saved) == len(there.views) == 1 + len(KNOBS) == len({view["name"] for view in there.views})
    for line, view in zip(saved, there.views, strict=True):
        assert line == f"{view['displayName']}: {there.address}/team/mine?nw={view['name'][3:-2]}"
    specs = [view["spec"] for view in there.views]
    for view in there.views:
        view.update(spec="{}", displayName="of an earlier release")
    workspace.main()
    assert capsys.readouterr().out.splitlines() == saved and len(there.views) == len(saved)
    assert [re.sub(MADE_UP, "", view["spec"]) for view in there.views] == [re.sub(MADE_UP, "", spec) for spec in specs]
    nobody.setattr(sys, "argv", ["dashboard", "--project", "other"])
    workspace.main()
    assert len({view["name"] for view in there.views}) == len(there.views) == 2 * len(saved)
    there.forbids = True
    with pytest.raises(SystemExit, match="2"):
        workspace.main()
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: TNT: W&B did not take the view (") and line.endswith("; --out=DIR writes JSON")


@pytest.mark.slow
def test_training_ends_in_the_same_bits_and_its_parts_upload_into_one_run(tmp_path, there, nobody, capsys):
    nobody.setenv("WANDB_MODE", "offline")  # no server is asked yet
    random = (*SHORT, "recipe.drop_path_rate=0.1", "+recipe.augmentation.mixup=0.8", "logger.images_every=1", "logger.figures_every=9")
    train(tmp_path / "with", *random)
    train(tmp_path / "other", *random, "seed=1")
    train(tmp_path / "without", *[override for override in random if "logger" not in override], "logger=csv")
    assert same(tmp_path / "with", tmp_path / "without") and not same(tmp_path / "with", tmp_path / "other")
    assert not (tmp_path / "without" / "wandb").exists()
    capsys.readouterr()
    train(tmp_path / "more", *random, f"resume={tmp_path / 'with'}", "recipe.epochs=3", "logger.project=elsewhere")
    first, other, more = (Recorded(tmp_path / name) for name in ("with", "other", "more"))
    assert first.run.run_id == more.run.run_id != other.run.run_id and more.run.project == "tnt_lightning"
    assert [step for step, _ in more.curve("train/loss")] == [6, 7, 8]
    assert [len(run.curve("figures/figure_7_class_attention")) for run in (first, more)] == [2, 1]  # the first epoch, and each last one
    assert more.summary["best/val/top1"] >= first.summary["best/val/top1"]
    [line] = lines(capsys.readouterr().out)
    asked = shlex.split(line.split("to upload it: ")[1])
    assert asked == ["wandb", "sync", str(tmp_path / "with" / "wandb"), str(tmp_path / "more" / "wandb")]
    assert not there.history
    subprocess.run([sys.executable, "-m", "wandb", *asked[1:]], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    rows = [json.loads(row) for row in there.history[first.run.run_id]]
    assert [row["trainer/global_step"] for row in rows if "train/loss" in row] == list(range(9))


# ---- what goes wrong


def service() -> int:
    """The id of the service process that this process has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            pid, name, state, parent = stat.read_text().split()[:4]
            if name == "(wandb-core)" and state != "Z" and int(parent) == os.getpid():
                return int(pid)
    raise LookupError("wandb-core")


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_training_survives_the_service(tmp_path, nobody, capsys, blow):
    struck, began = [], []

    class Striking(Throughput):
        def on_train_epoch_start(self, trainer, module):
            super().on_train_epoch_start(trainer, module)
            if trainer.current_epoch == 1:
                struck.append(service())
                time.sleep(1.5)  # what was logged is in the file after a second
                os.kill(struck[0], blow)
                nobody.setattr(dashboard, "CALL_S", 1)  # from now on: a busy machine takes longer to start the service
                began.append(time.monotonic())

    nobody.setattr("tnt_lightning.callbacks.Throughput", Striking)
    try:
        train(tmp_path / "run", *SHORT, "recipe.epochs=3", "logger.finish_timeout=1")
    finally:
        for process in struck:
            os.kill(process, signal.SIGKILL)
    assert time.monotonic() - began[0] < 25 and struck
    its_own_record_is_whole(tmp_path / "run", epochs=3)
    shown = capsys.readouterr()
    assert {"best/val/top1", "images_per_s", "parameters", "flops"} <= Recorded(tmp_path / "run").summary.keys()
    _, ending = lines(shown.out + shown.err)
    assert ending.startswith("W&B    stopped: " if blow == signal.SIGKILL else "W&B    not finished: no answer in 2 s")


@pytest.mark.parametrize("ill", ["gone", "broken", "silent"])
def test_training_survives_a_server_that_is_lost_on_the_way(tmp_path, there, nobody, capsys, ill):
    class Losing(Throughput):
        def on_train_epoch_start(self, trainer, module):
            super().on_train_epoch_start(trainer, module)
            if trainer.current_epoch == 1:
                there.ill = ill
                if ill == "gone":
                    there.shutdown()
                    there.socket.close()

    nobody.setattr("tnt_lightning.callbacks.Throughput", Losing)
    nobody.setattr(dashboard, "CALL_S", 2)
    began = time.monotonic()
    train(tmp_path / "run", *SHORT, "recipe.epochs=3", "logger.finish_timeout=2", "logger.init_timeout=10")
    assert time.monotonic() - began < 60
    shown = capsys.readouterr()
    known, [opening, ending] = json.loads((tmp_path / "run" / "wandb.json").read_text()), lines(shown.out + shown.err)
    assert there.ill and opening == f"W&B    {known['url']}" and known["mode"] == "online"
    assert re.fullmatch(
        rf"W&B    not finished: .*; to upload it: wandb sync --include-online {re.escape(str(tmp_path / 'run' / 'wandb'))}", ending
    )
    its_own_record_is_whole(tmp_path / "run", epochs=3)
    recorded = Recorded(tmp_path / "run", "wandb/run-*/*.wandb")
    assert [step for step, _ in recorded.curve("train/loss")] == list(range(9)), "what the server missed is there to be uploaded"


def its_own_record_is_whole(run: Path, *, epochs: int) -> None:
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(3 * epochs))
    assert len([row for row in rows if row["val/top1"]]) == epochs
    result = json.loads((run / "result.json").read_text())
    assert result["epochs"] == epochs and 0 < result["test/top1"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("examples", [0, 1], ids=["log", "images"])
def test_training_survives_a_full_disk_of_the_dashboards(tmp_path, examples):
    """Its folder's own, of a few pages; where none may be mounted, its files may be no larger than that."""
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True)
    line = [sys.executable, "-m", "tnt_lightning.train", *QUICK, *SHORT, "recipe.epochs=3", f"hydra.run.dir={run}"]
    line += [f"logger.images_every={examples}", "logger.finish_timeout=5"]
    mount = f"mount -t tmpfs -o size=24k none {shlex.quote(str(run / 'wandb'))}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode == 0:
        line = ["unshare", "-rm", "sh", "-c", f"{mount} && exec {shlex.join(line)}"]
    else:  # of root too: what is made in it fails
        (run / "wandb").rmdir()
        (run / "wandb").symlink_to("/proc/self/task")
    done = subprocess.run(line, cwd=tmp_path, env=stranger(tmp_path), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    its_own_record_is_whole(run, epochs=3)
    said = [line for line in lines(done.stdout + done.stderr) if not line.startswith("W&B    offline, ")]
    assert len(said) == 1 and re.match(
        r"W&B    (not finished|stopped|not used): .*(No space left|No such file|not permitted|denied)", said[0]
    )


def test_after_a_killed_service_the_next_run_of_the_process_has_one(tmp_path, nobody):
    train(tmp_path / "run", *SHORT, "recipe.epochs=1", "recipe.warmup_epochs=0")
    assert Recorded(tmp_path / "run").exit == 0


def test_training_survives_a_directory_that_cannot_be_written(tmp_path, nobody, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").touch()
    train(tmp_path / "run", *SHORT)
    shown = capsys.readouterr()
    [line] = lines(shown.out + shown.err)
    assert line.startswith("W&B    not used: ") and line.endswith(f"the curves are in {tmp_path / 'run' / 'metrics.csv'}")
    assert runs.result_of(tmp_path / "run")["epochs"] == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_training_is_recorded_as_failed(tmp_path, nobody, error):
    def fail(*_):
        raise error("in training")

    nobody.setattr(Classifier, "on_validation_epoch_end", fail)
    with pytest.raises((error, SystemExit)):
        train(tmp_path / "run", *SHORT)
    recorded = Recorded(tmp_path / "run")
    assert recorded.exit == 1 and len(recorded.curve("train/loss")) == 3
    assert recorded.summary["parameters"] == 397_642 and recorded.summary["parameters_as_in_the_paper"] and recorded.summary["flops"] > 2e6
