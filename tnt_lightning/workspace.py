"""`python -m tnt_lightning.dashboard`: the W&B page of a project, ready to look at: an overview, and a saved view for each ablation.

Logged out it writes the same as JSON.
"""

import hashlib
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tnt_lightning import CONF, runs
from tnt_lightning.cli import Parser, answered
from tnt_lightning.config import KNOBS
from tnt_lightning.errors import UserError

EXTRA = "pip install 'tnt-lightning[dashboard]'"
TABLES = {"position_encoding": 6, "inner_heads": 7, "words_per_patch": 8, "se": 12, "tnt_blocks": 5}  # of the paper


def main() -> None:
    project = str(OmegaConf.load(CONF / "logger" / "wandb.yaml").project)
    parser = Parser(prog="python -m tnt_lightning.dashboard", description=__doc__)
    parser.add_argument("--project", default=project, help=f"by default {project}, where training logs to")
    parser.add_argument("--entity", help="a user or team; by default yours")
    parser.add_argument("--out", type=Path, help="write JSON into this directory, and send nothing to W&B")
    given = parser.parse_args()
    with answered():
        for line in publish(project=given.project, entity=given.entity, out=given.out):
            print(line)


def publish(*, project: str, entity: str | None = None, out: Path | None = None) -> list[str]:
    """Save the views in W&B, in the place of those of an earlier call, or as JSON into `out`, or, logged out, into workspace/.

    Gives a line for each.
    """
    import wandb

    if out is None:
        try:
            online = bool(wandb.login(prompt=False, verify=False))
            entity = entity or (wandb.Api(timeout=20).default_entity if online else None)
        except Exception as error:  # whatever the network and the server come up with
            raise UserError(f"W&B: {str(error).splitlines()[0] if str(error) else type(error).__name__}; --out=DIR writes JSON") from None
        if online:
            saved = []
            for view in views(entity=entity or "", project=project):
                try:
                    saved.append(f"{view.name}: {_saved(view)}")
                except Exception as error:
                    why = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise UserError(f"{view.name}: W&B did not take the view ({why}); --out=DIR writes JSON") from None
            return saved
        out = Path("workspace")
        print("not logged in (wandb login): JSON instead")
    written = []
    for view in views(entity=entity or "", project=project):
        file = out / f"{view.name.split(':')[0].replace(' ', '_')}.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            runs.write(file, json.dumps(described(view), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{error.filename or out}: cannot be written ({error.strerror}); choose another --out") from None
        written.append(f"written {file}")
    return written


def views(*, entity: str, project: str) -> list[Any]:
    """The overview, and a view of the runs that sweep each knob."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "wandb_workspaces":
            raise
        raise UserError(f"the project's page is built by wandb-workspaces: {EXTRA}") from None

    step = "trainer/global_step"
    figures = {  # ImageNet and iNat have no test images
        "validation top-1": panels.SummaryMetric("val/top1"),
        "test top-1": panels.SummaryMetric("test/top1"),
    }

    def line(title: str, *metrics: str, **knobs: Any) -> Any:
        return panels.LinePlot(title=title, x=step, y=list(metrics), **knobs)

    def against(what: str, x: Any, **knobs: Any) -> list[Any]:
        return [panels.ScatterPlot(title=f"{name} against {what}", x=x, y=figure, **knobs) for name, figure in figures.items()]

    def column(x: Any) -> Any:
        return panels.ParallelCoordinatesPlotColumn(x)

    curves = [
        line("validation top-1", "val/top1"),
        line("training loss", "train/loss"),
        line("validation loss", "val/loss"),
        line("learning rate", "lr"),
    ]
    speed = [
        panels.BarPlot(title="training images/s", metrics=[panels.SummaryMetric("images_per_s")]),
        panels.LinePlot(title="GPU memory", x="Relative Time (Process)", metric_regex=r"system/gpu\.\d+\.memoryAllocatedBytes"),
        panels.LinePlot(title="GPU use", x="Relative Time (Process)", metric_regex=r"system/gpu\.\d+\.gpu"),
        panels.LinePlot(title="memory of the process", x="Relative Time (Process)", y=["system/proc.memory.rssMB"]),
    ]
    sizes = [
        *against("FLOPs", panels.SummaryMetric("flops"), log_x=True),
        *against("parameters", panels.SummaryMetric("parameters"), log_x=True),
    ]
    coordinates = [  # one for each figure: a run is a line only where it has them all
        panels.ParallelCoordinatesPlot(
            title=f"{name} by the knobs", columns=[*(column(panels.Config(knob)) for knob in KNOBS), column(figure)]
        )
        for name, figure in figures.items()
    ]

    def section(name: str, *content: Any, opened: bool = True) -> Any:
        whole = workspaces.SectionLayoutSettings(columns=3, rows=math.ceil(len(content) / 3))  # otherwise six, and arrows to the others
        return workspaces.Section(name=name, panels=list(content), is_open=opened, layout_settings=whole)

    examples = section("example predictions", panels.MediaBrowser(media_keys=["examples"]))
    overview = workspaces.Workspace(
        entity=entity,
        project=project,
        name="TNT",
        sections=[
            section("curves", *curves),
            section("accuracy", *sizes, *(panel for knob in KNOBS for panel in against(knob, panels.Config(knob))), *coordinates),
            section("speed and memory", *speed),
            examples,
        ],
    )
    return [
        overview,
        *(
            workspaces.Workspace(
                entity=entity,
                project=project,
                name=f"{knob}: Table {TABLES[knob]}",
                sections=[
                    section(
                        f"top-1 by {knob}",
                        *(
                            panels.BarPlot(
                                title=f"{name}, mean and deviation over seeds", metrics=[figure], groupby=panels.Config(knob),
                                groupby_aggfunc="mean", groupby_rangefunc="stddev",
                            )
                            for name, figure in figures.items()
                        ),
                        *against(knob, panels.Config(knob)),
                        *sizes,
                    ),
                    section("curves", *curves),
                    section("speed and memory", *speed, opened=False),
                ],
                runset_settings=workspaces.RunsetSettings(
                    filters=[workspaces.Tags().isin([knob])], groupby=[workspaces.Config(knob)]
                ),
            )
            for knob in KNOBS
        ),
    ]  # fmt: skip


def _saved(view: Any) -> str:
    """Its address, which is made of its name: by it the next call finds the view, and takes its place."""
    from wandb_workspaces.workspaces import internal

    address = hashlib.sha256(f"{view.entity}/{view.project}/{view.name}".encode()).hexdigest()[:11]
    view._internal_name = f"nw-{address}-v"  # as the library names those that it makes up
    with suppress(ValueError):  # there is none yet
        view._internal_id = internal.get_view_dict(view.entity, view.project, address)["id"]
    return str(view.save().url)


def described(view: Any) -> dict[str, Any]:
    """A view as W&B stores it."""
    return view._to_model().model_dump(by_alias=True, exclude_none=True, mode="json")
