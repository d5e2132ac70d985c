"""What every command shares: composition from conf/, and a user's mistake answered in one line with exit code 2.

Anything else that goes wrong is a bug and keeps its traceback and exit code 1; HYDRA_FULL_ERROR=1 shows it for mistakes too.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from tnt_lightning import CONF, runs
from tnt_lightning.config import OF_SOME_MODELS, as_sweep, check_values, keys_of, models_with, of_run
from tnt_lightning.errors import UserError, did_you_mean, one_line
from tnt_lightning.faults import explained
from tnt_lightning.schema import KINDS

begun: list[bool] = []  # before the task, or the first job of a sweep, other errors than ours are the user's too; in it, they are bugs
_OURS = "TNT_LIGHTNING_SHORT_ERRORS"  # says, also to the other ranks, that HYDRA_FULL_ERROR was set here and not by the user


def command(
    config_name: str = "config", *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """A command of the package: the task gets what conf/CONFIG_NAME.yaml and the command line compose.

    before: called ahead of Hydra, where the command has a way of its own with directories that hold runs
    after: called when Hydra is done
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        stays: set[Path] = set()

        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            begun.append(True)
            runs.commit()  # of the code that runs, before it is another
            try:
                resolve(config, config_name)
                return task(config)
            except Exception as error:
                if (known := _known(error)) is None:
                    raise
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs go on; the sweep ends with an error
                    logging.getLogger(task.__module__).error("job %s: %s", HydraConfig.get().job.num, known)
                    if known is error:
                        raise
                    raise known from error
                if _with_tracebacks():
                    raise
                _clear(HydraConfig.get(), stays)
                fail(str(known))

        @functools.wraps(task)
        def main() -> None:
            begun.clear()
            stays.clear()
            if asked := arguments():
                for place in (asked.given.get("hydra.run.dir"), _sweeps_in(asked)):
                    here = Path(str(place)).absolute()
                    stays.update(folder for folder in (here, here.parent) if place and folder.exists())
            logging.raiseExceptions = False  # a train.log that its disk has no room for would show a traceback for each line
            if before is None:
                _refuse_to_write_over("hydra.sweep.dir", "multirun.yaml")
                _refuse_to_write_over("hydra.run.dir", "config.yaml")
            else:
                before()
            if not _with_tracebacks():  # makes Hydra raise its errors instead of printing them
                os.environ |= {"HYDRA_FULL_ERROR": "1", _OURS: "1"}
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
                if after is not None:
                    after()
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            except (UserError, HydraException, OmegaConfBaseException) as error:
                if not begun:
                    _clear_sweep(stays)
                if _with_tracebacks() or (begun and not isinstance(error, UserError)):
                    raise
                fail(answer(error, config_name=config_name))
            except Exception as error:
                if _with_tracebacks() or begun:
                    raise
                _clear_sweep(stays)
                fail(_not_composed(error))

        return main

    return decorate


def _known(error: Exception) -> UserError | None:
    """A user's mistake, or a fault of the machine, of which they are told in the same way."""
    if isinstance(error, UserError):
        return error
    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    writes = hydra.output_subdir is not None or (run / "config.yaml").exists()
    return explained(error, run=run if writes else None, resumable=hydra.mode == RunMode.RUN)


def _clear(hydra: Any, stays: set[Path]) -> None:
    """Take away what Hydra wrote for a run that was refused; whatever else lies there stays, and the folders that were there before."""
    run = Path(hydra.runtime.output_dir)
    if hydra.output_subdir is None or runs.holds(run) or runs.busy(run) or "LOCAL_RANK" in os.environ:
        return
    logging.shutdown()
    with contextlib.suppress(OSError):  # not empty, or still open
        for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
            (run / hydra.output_subdir / name).unlink(missing_ok=True)
        (run / hydra.output_subdir).rmdir()
        (run / f"{hydra.job.name}.log").unlink(missing_ok=True)
        for folder in (run, run.parent):  # outputs/DATE/TIME, outputs/DATE
            if folder.absolute() in stays:
                break
            folder.rmdir()


def _sweeps_in(asked: "Arguments") -> Path | None:
    """The directory of a sweep, as far as the command line tells."""
    return Path(str(asked.given.get("hydra.sweep.dir") or Path("multirun") / sweep_name())) if asked.multirun else None


def _clear_sweep(stays: set[Path]) -> None:
    """Take away what Hydra wrote for a sweep that was refused."""
    asked = arguments()
    folder = _sweeps_in(asked) if asked else None
    with contextlib.suppress(OSError):
        if folder is not None and {file.name for file in folder.iterdir()} == {"multirun.yaml"}:
            (folder / "multirun.yaml").unlink()
            for here in (folder, folder.parent):
                if here.absolute() in stays:
                    break
                here.rmdir()


def _not_composed(error: Exception) -> str:
    """Of what Hydra does not answer itself, before the task: group=null, a broken file of one's own, a run directory."""
    if isinstance(error, OSError):
        return f"{error.filename or 'hydra.run.dir'}: the run directory cannot be made ({error.strerror}); choose another hydra.run.dir"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name.removeprefix('file://')}, line {error.problem_mark.line + 1}: {error.problem}"
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    for arg in sys.argv[1:]:
        group, _, value = arg.partition("=")
        if group in groups and (value in ("", "null") or value.startswith(("[", "{"))):
            options = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
            return f"{arg}: {group}= takes the name of a file: {', '.join(options)}"
    ours = "; ".join(arg for arg in sys.argv[1:] if arg.lstrip("+~").startswith("hydra"))
    cure = f"; of Hydra's own keys, leave out or change {ours}" if ours else ""
    return f"not composed: {' '.join(str(error).split()) or type(error).__name__}{cure}"


def resolve(config: DictConfig, config_name: str) -> None:
    """Before the task, in which an error of OmegaConf would be a bug."""
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        line = answer(error, config_name=config_name)
        own = line != _first_line(error) or "UserError raised" in str(error)
        raise UserError(line if own else f"{_unresolved(config)}: {line}") from error


def _unresolved(config: DictConfig) -> str:
    """The key whose ${...} leads nowhere: OmegaConf's error does not name it."""
    for key in keys_of(config):
        try:
            OmegaConf.select(config, key)
        except OmegaConfBaseException:
            return key
    return "the configuration"


def _refuse_to_write_over(key: str, mark: str) -> None:
    """Here, because Hydra writes into the directory before it calls the task; the other ranks find their own run in it."""
    for arg in sys.argv[1:]:
        name, _, folder = arg.partition("=")
        if name == key and (Path(folder) / mark).exists() and "LOCAL_RANK" not in os.environ:
            fail(f"{folder} already holds a {key.split('.')[1]}; choose another {key}, or move it away")


def _with_tracebacks() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and _OURS not in os.environ


def fail(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def answer(error: Exception, overrides: list[str] | None = None, *, config_name: str = "config") -> str:
    """One line for a user's mistake: the key or file, the value, the cure. The overrides are those of the command line."""
    if overrides is None:
        overrides = [arg for arg in sys.argv[1:] if "=" in arg]
    text = str(error)
    if isinstance(error, UserError):
        return text
    if match := re.search(r"Could not override '([^']+)'\.", text):
        return _unknown_key(match[1], overrides, config_name)
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':\n((?:\t.*\n?)*)", text):
        group, name, options = match.groups()
        return f"{group}={name} not found; available: {', '.join(option for option in options.split() if not option.startswith('_'))}"
    if match := re.search(r"Interpolation key 'grid\.(\w+)' not found", text):
        return f"ablation={match[1]}: this model has no grid for {match[1]}; models that have one: {', '.join(models_with(match[1]))}"
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        quoted = f"Hydra does not read such a value bare; quote it: {key}=\"'{value}'\""
        return f"{error.override}: {quoted if equals and _reads(f'{key}=x') else 'not of the form KEY=VALUE'}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1]}: several values are a sweep; start it with -m first: {as_sweep()}"
    if "recipe.lr" in text and "interpolation" in text:
        return "recipe.lr is a rate for each optimizer; set optimizer.lr for the rate of this run"
    return _first_line(error)


def _reads(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:  # which OverrideParseException is too
        return False
    return True


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].removeprefix("UserError raised while resolving interpolation: ").split())


def _unknown_key(key: str, overrides: list[str], config_name: str) -> str:
    given = next((arg for arg in overrides if arg.lstrip("+~").split("=")[0] == key), key)
    if key in OF_SOME_MODELS:
        model = next((arg.split("=")[1] for arg in overrides if arg.startswith("model=")), None)
        return (
            f"{given}: {f'model={model}' if model else 'this model'} has no such knob; models that have it: {', '.join(models_with(key))}"
        )
    if key in KINDS and not given.startswith("+"):
        return f"{given}: not set in this configuration; +{given} adds it"
    known = _known_keys([arg for arg in overrides if arg != given], config_name)
    if key.startswith("trainer."):
        near = did_you_mean(key, known, "").rstrip("; ")
        return f"{given}: not among the arguments that conf/trainer/ names{near}; +{given} hands it to lightning.Trainer"
    return f"{given}: no such key{did_you_mean(key, known, '--cfg job shows them all')}"


def _known_keys(overrides: list[str], config_name: str) -> list[str]:
    """Every dotted key of the configuration that the other overrides compose, and every group; none where they do not compose either."""
    single = [arg for arg in overrides if not arg.startswith("hydra.run") and not _sweeps(arg)]
    config = composed(single, config_name)
    return [] if config is None else list(keys_of(config))


def _sweeps(override: str) -> bool:
    return _reads(override) and OverridesParser.create().parse_override(override).is_sweep_override()


def composed(overrides: list[str], config_name: str = "config") -> DictConfig | None:
    """What overrides compose, with `hydra`; None where they do not."""
    GlobalHydra.instance().clear()
    asked = arguments()
    path = [f"hydra.searchpath=[file://{Path(asked.config_dir).resolve()}]"] if asked and asked.config_dir else []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(config_name, [*path, *overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        GlobalHydra.instance().clear()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """What a command without Hydra does: a mistake ends it in one line, Ctrl-C quietly."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


class Parser(argparse.ArgumentParser):
    """Of a command without Hydra; a mistake is answered as elsewhere."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; {self.prog} --help")


class Arguments:
    """The command line as Hydra reads it.

    overrides: as they stand there; given: key -> value of those that set a single one; flags: that choose a configuration
    """

    def __init__(self) -> None:
        known = get_args_parser().parse_args(sys.argv[1:])
        self.overrides: list[str] = known.overrides
        self.config_dir, self.multirun = known.config_dir, known.multirun
        flags = {"--config-dir": known.config_dir, "--config-path": known.config_path, "--config-name": known.config_name}
        self.flags = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
        self.cfg, self.help = known.cfg or known.info, known.help or known.hydra_help or known.shell_completion
        read = OverridesParser.create().parse_overrides(self.overrides)
        self.given = {one.key_or_group: one.value() for one in read if not one.is_sweep_override() and not one.is_delete()}
        self._lines = {one.key_or_group: one.input_line for one in read}

    def drop(self, key: str) -> None:
        """Take an override off the command line."""
        line = self._lines.get(key)
        self.overrides = [override for override in self.overrides if override != line]
        sys.argv[1:] = [arg for arg in sys.argv[1:] if arg != line]


def arguments() -> Arguments | None:
    """None for a line that Hydra answers itself."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # argparse would say it here, and once more when Hydra reads the line
            return Arguments()
    except (SystemExit, HydraException, OmegaConfBaseException, ValueError):
        return None


def swept_of(overrides: Sequence[str]) -> list[str]:
    """Of a job's overrides those that the command line does not give as they are: what it sweeps, and what an ablation does."""
    fixed = {one.get_key_element() for one in _of_the_task() if not one.is_sweep_override()}
    return [override for override in overrides if override.partition("=")[0] not in fixed]


def _of_the_task() -> list[Override]:
    asked = arguments()
    read = OverridesParser.create().parse_overrides(asked.overrides) if asked else []
    return [one for one in read if not str(one.key_or_group).startswith(("hydra.", "hydra/"))]


def folder_name(overrides: Sequence[str]) -> str:
    """`seed=0,tnt_blocks=1-6` of ["seed=0", "tnt_blocks=[1,6]"]. Where a name cannot hold all that they are, a hash tells them apart."""
    plain = [re.sub(r"=\[([\w.]+(?:,[\w.]+)*)\]$", lambda found: "=" + found[1].replace(",", "-"), one.lstrip("+")) for one in overrides]
    name = re.sub(r"[^\w=,.@~%+-]", "_", ",".join(plain))
    if name == ",".join(plain) and len(name.encode()) <= 120:
        return name
    short = name.encode()[:110].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(','.join(overrides).encode()).hexdigest()[:8]}"


def quoted(key: str, value: object) -> str:
    """An override as Hydra's grammar takes it, whatever characters the value has."""
    # A backslash is itself, but before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"{key}='{escaped}'"


def given_in(sections: tuple[str, ...], overrides: Sequence[str]) -> set[str]:
    """The names of the keys of some sections that a command line sets: data.mean=... is mean."""
    keys = (override.key_or_group.split(".") for override in OverridesParser.create().parse_overrides(list(overrides)))
    return {key[-1] for key in keys if key[0] in sections}


def of_run_changed(directory: Path, overrides: Sequence[str], sections: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a run, in which overrides of some sections, and of the kernel, change values; checked as that of training is."""
    config = of_run(directory)
    OmegaConf.set_struct(config, True)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        free = key == "kernel" or ("." in key and key.split(".")[0] in sections)
        if not free or override.is_delete():
            only = ", ".join(f"{section}.*" for section in sections)
            raise UserError(f"{override.input_line}: of a finished run only {only} and kernel can be changed")
        try:
            for place in (key, "model.kernel") if key == "kernel" else (key,):
                OmegaConf.update(config, place, override.value(), force_add=override.is_add())
        except OmegaConfBaseException:
            raise UserError(f"{override.input_line}: not a key of {directory / 'config.yaml'}, or not a value for it") from None
    check_values(config, "the run's")  # an older run may lack what came later
    values: Any = OmegaConf.to_container(config)
    return dict(values)


def sweep_name() -> str:
    return folder_name([one.input_line or "" for one in _of_the_task()]) or "default"


# The directory of a sweep is named by its command line, and that of a job by what is swept, so that the same command finds them again.
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("job_name", lambda overrides, number: folder_name(swept_of(list(overrides))) or str(number), replace=True)
