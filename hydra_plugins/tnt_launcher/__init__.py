"""Hydra's way to `tnt_lightning.sweep`: what a sweeper asks for, job by job. Hydra loads launchers from `hydra_plugins` only."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

# Of Hydra's own keys, those that are the sweep's and not a job's.
_OF_THE_SWEEP = (
    "hydra.mode",
    "hydra.run.",
    "hydra.sweep.",
    "hydra.launcher",
    "hydra/launcher",
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra.job.num",
)


class TNTLauncher(Launcher):
    """Each job is a plain run, in a process and on GPUs of its own. conf/hydra/launcher/tnt.yaml says what the knobs are."""

    several_nodes = False  # for one job

    def __init__(self, **knobs: Any) -> None:
        self.knobs = knobs
        self.sweep: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called once, or, by a sweeper that looks at figures, batch by batch."""
        from tnt_lightning import cli, sweep

        setup_globals()
        if self.sweep is None:
            self.sweep = sweep.current = self._open()
        composed = [self._compose(list(overrides), number) for number, overrides in enumerate(job_overrides, start=initial_job_idx)]
        self.sweep.machine.serve(gpu=any(OmegaConf.select(config, "trainer.accelerator") in sweep.ON_GPU for config in composed))
        asked = [self._job(list(overrides), config) for overrides, config in zip(job_overrides, composed, strict=True)]
        self.sweep.check(asked)
        cli.begun.append(True)
        returns = []
        for job, overrides, config in zip(self.sweep.run(asked), job_overrides, composed, strict=True):
            run, task = str(job.run), config.hydra.job.name
            told = JobReturn(overrides=overrides, cfg=config, hydra_cfg=config.hydra, working_dir=run, task_name=task)
            told.status, told.return_value = JobStatus.COMPLETED, job.figure  # not an exception: sweepers would leave out other jobs
            returns.append(told)
        return returns

    def _open(self) -> Any:
        from tnt_lightning.config import refuse_ablation_of_swept_models, text
        from tnt_lightning.errors import UserError
        from tnt_lightning.schema import FLAG, NULL, whole
        from tnt_lightning.sweep import Sweep

        refuse_ablation_of_swept_models(self.config.hydra.runtime.choices.get("ablation"))
        kinds = {"jobs": NULL | whole(1, 10_000), "devices_per_job": NULL | whole(1, 1_024), "fresh": FLAG, **self._kinds()}
        for name, kind in kinds.items():
            if not kind.fits(self.knobs.get(name)):
                raise UserError(f"hydra.launcher.{name}={text(self.knobs.get(name))} is not {kind.words}")
        machine, engine = self._engine()
        command = ["python", "-m", "tnt_lightning.train", *sys.argv[1:]]
        return Sweep(
            Path(self.config.hydra.sweep.dir),
            machine,
            engine,
            command=[arg for arg in command if not arg.lstrip("+").startswith("hydra.launcher.fresh=")],
            fresh=self.knobs["fresh"],
        )

    def _kinds(self) -> dict[str, Any]:
        """What the knobs of this launcher alone may be."""
        from tnt_lightning.schema import FLAG, NULL, several_of, whole

        return {"gpus": NULL | whole(0, 1_024) | several_of("GPUs"), "fork": NULL | FLAG}

    def _engine(self) -> tuple[Any, Any]:
        """What jobs share, and what runs them."""
        from tnt_lightning.errors import UserError
        from tnt_lightning.sweep import Here, Machine, gpus_here
        from tnt_lightning.zygote import can_fork

        gpus = gpus_here(self.knobs["gpus"])
        fork = can_fork() if self.knobs["fork"] is None else self.knobs["fork"]
        if fork and not can_fork():
            raise UserError("hydra.launcher.fork=true: not on this system, whose libraries have threads of their own; leave it out")
        return Machine(gpus=gpus, at_once=self.knobs["jobs"]), Here(fork=fork)

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        composed: DictConfig = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(composed)
        return composed

    def _job(self, overrides: list[str], composed: DictConfig) -> Any:
        from tnt_lightning.cli import arguments, quoted, resolve, swept_of
        from tnt_lightning.config import check, plain, text
        from tnt_lightning.errors import UserError
        from tnt_lightning.sweep import Job

        HydraConfig.instance().set_config(composed)
        number, run = composed.hydra.job.num, Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir
        swept = swept_of(overrides)
        given = {override.get_key_element().lstrip("+") for override in OverridesParser.create().parse_overrides(overrides)}
        try:
            config = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            resolve(config, "config")
            check(config, composed.hydra.runtime.choices["model"])
            if config.resume == "latest":
                raise UserError("resume=latest: a sweep goes on by the same command; leave it out")
            devices = self._devices(config, chosen="trainer.devices" in given)
        except UserError as error:
            raise UserError(f"{' '.join(swept)}: {error}" if swept else str(error)) from error
        extra: dict[str, Any] = {"trainer.devices": devices}
        share = self.sweep.machine.share(devices)
        if share is not None and config.data.num_workers > share and "data.num_workers" not in given:
            extra["data.num_workers"] = share
        if "trainer.enable_progress_bar" not in given:  # it would fill a file
            extra["trainer.enable_progress_bar"] = False
        for key, value in extra.items():
            OmegaConf.update(config, key, value)
        asked = arguments()
        argv = [
            *(asked.flags if asked else []),
            *(override for override in composed.hydra.overrides.hydra if not override.lstrip("+~").startswith(_OF_THE_SWEEP)),
            *overrides,
            *(f"{key}={text(value)}" for key, value in extra.items()),
            "hydra.mode=RUN",
            f"hydra.job.num={number}",
            quoted("hydra.sweep.dir", composed.hydra.sweep.dir),
            quoted("hydra.run.dir", run),
        ]
        gpu = config.trainer.accelerator in ("auto", "gpu", "cuda")
        nodes = config.trainer.num_nodes
        return Job(number=number, swept=tuple(swept), argv=argv, run=run, config=plain(config), devices=devices, nodes=nodes, gpu=gpu)

    def _devices(self, config: DictConfig, *, chosen: bool) -> int:
        """Of a job: what the command line says of it, else what the launcher does, else what the recipe does; auto is one."""
        from tnt_lightning.config import text
        from tnt_lightning.errors import UserError

        devices = config.trainer.devices
        if config.trainer.num_nodes != 1 and not self.several_nodes:
            raise UserError(
                f"trainer.num_nodes={text(config.trainer.num_nodes)}: a job of this launcher runs on one machine; "
                "hydra/launcher=slurm takes several"
            )
        if self.knobs["devices_per_job"] is not None and not chosen:
            return self.knobs["devices_per_job"]
        if devices == "auto":
            return 1
        if isinstance(devices, (int, str)) and str(devices).isdecimal() and int(devices):
            return int(devices)
        raise UserError(f"trainer.devices={text(devices)}: a job's devices are chosen by the sweep; give their number, or auto for one")


class SlurmLauncher(TNTLauncher):
    """Each job is one of SLURM's. conf/hydra/launcher/slurm.yaml says what the knobs are."""

    several_nodes = True

    def _kinds(self) -> dict[str, Any]:
        from tnt_lightning.schema import NULL, SECTION, TEXT, number, several_of, whole

        return {
            "partition": NULL | TEXT,
            "minutes": NULL | whole(1, 1_000_000),
            "warning_s": whole(10, 10_000),
            "cpus_per_task": NULL | whole(1, 1_024),
            "mem_gb": NULL | number(0.1, 100_000),
            "setup": several_of("lines of shell"),
            "sbatch": SECTION,
        }

    def _engine(self) -> tuple[Any, Any]:
        from tnt_lightning.clusters import Slurm
        from tnt_lightning.sweep import Machine

        knobs = {name: self.knobs[name] for name in ("partition", "minutes", "warning_s", "cpus_per_task", "mem_gb")}
        slurm = Slurm(**knobs, setup=list(self.knobs["setup"]), sbatch=dict(self.knobs["sbatch"]))
        return Machine(gpus=None, at_once=self.knobs["jobs"] or sys.maxsize, cores=None), slurm


class RayLauncher(TNTLauncher):
    """Each job is a task of Ray's. conf/hydra/launcher/ray.yaml says what the knobs are."""

    def _kinds(self) -> dict[str, Any]:
        from tnt_lightning.schema import NULL, TEXT, number, whole

        return {
            "address": NULL | TEXT,
            "gpus": NULL | whole(0, 1_024),
            "cpus": NULL | whole(1, 10_000),
            "cpus_per_device": number(0, 1_024),
        }

    def _engine(self) -> tuple[Any, Any]:
        from tnt_lightning.clusters import Ray
        from tnt_lightning.sweep import Machine

        ray = Ray(**{name: self.knobs[name] for name in ("address", "gpus", "cpus", "cpus_per_device")})
        return Machine(gpus=None, at_once=self.knobs["jobs"] or sys.maxsize, cores=None), ray
