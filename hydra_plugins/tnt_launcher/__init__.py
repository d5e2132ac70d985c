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
        from tnt_lightning.schema import FLAG, NULL, several_of, whole
        from tnt_lightning.sweep import Machine, Sweep, gpus_here
        from tnt_lightning.zygote import can_fork

        refuse_ablation_of_swept_models(self.config.hydra.runtime.choices.get("ablation"))
        kinds = {
            "jobs": NULL | whole(1, 10_000),
            "devices_per_job": NULL | whole(1, 1_024),
            "gpus": NULL | whole(0, 1_024) | several_of("GPUs"),
            "fork": NULL | FLAG,
            "fresh": FLAG,
        }
        for name, kind in kinds.items():
            if not kind.fits(self.knobs.get(name, kind)):
                raise UserError(f"hydra.launcher.{name}={text(self.knobs.get(name))} is not {kind.words}")
        gpus = gpus_here(self.knobs["gpus"])
        fork = can_fork() if self.knobs["fork"] is None else self.knobs["fork"]
        if fork and not can_fork():
            raise UserError("hydra.launcher.fork=true: not on this system, whose libraries have threads of their own; leave it out")
        command = ["python", "-m", "tnt_lightning.train", *sys.argv[1:]]
        return Sweep(
            Path(self.config.hydra.sweep.dir),
            Machine(gpus=gpus, at_once=self.knobs["jobs"] or len(gpus or ()) or 1),
            command=[arg for arg in command if not arg.lstrip("+").startswith("hydra.launcher.fresh=")],
            fork=fork,
            fresh=self.knobs["fresh"],
        )

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
        return Job(number=number, swept=tuple(swept), argv=argv, run=run, config=plain(config), devices=devices, gpu=gpu)

    def _devices(self, config: DictConfig, *, chosen: bool) -> int:
        """Of a job: what the command line says of it, else what the launcher does, else what the recipe does; auto is one."""
        from tnt_lightning.config import text
        from tnt_lightning.errors import UserError

        devices = config.trainer.devices
        if self.knobs["devices_per_job"] is not None and not chosen:
            return self.knobs["devices_per_job"]
        if devices == "auto":
            return 1
        if isinstance(devices, (int, str)) and str(devices).isdecimal() and int(devices) and config.trainer.num_nodes == 1:
            return int(devices)
        if config.trainer.num_nodes != 1:
            raise UserError(f"trainer.num_nodes={text(config.trainer.num_nodes)}: a job of this launcher runs on one machine")
        raise UserError(f"trainer.devices={text(devices)}: a job's devices are chosen by the sweep; give their number, or auto for one")
