"""`python -m tnt_lightning.evaluate run=DIR`: the figures of a finished run, measured again.

run=DIR|FILE.ckpt     a run directory (the checkpoint that its result is of), or one of its checkpoints
KEY=VALUE ...         changes to the run's own configuration, such as data.root=... data.batch_size=... trainer.devices=1
"""

import sys
from typing import TYPE_CHECKING, Any

from tnt_lightning.cli import fail
from tnt_lightning.errors import UserError

if TYPE_CHECKING:
    import lightning as L

    from tnt_lightning.classifier import Classifier
    from tnt_lightning.data import ImageDataModule


def main() -> None:
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        raise SystemExit(0 if sys.argv[1:] else 2)
    try:
        evaluate_run(sys.argv[1:])
    except UserError as error:
        fail(str(error))


def evaluate_run(arguments: list[str]) -> dict[str, float]:
    """Measure the run that `run=...` among the arguments names; prints the figures beside the recorded ones and gives them."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console
    from rich.table import Table

    from tnt_lightning import runs, show
    from tnt_lightning.build import build_classifier, build_data, build_trainer

    given = dict(argument.partition("=")[::2] for argument in arguments)
    path = given.pop("run", None)
    if not path:
        raise UserError("run is not given; name a run directory: run=outputs/...")
    directory, file = runs.locate(path)
    config = OmegaConf.create(runs.config_of(directory))
    OmegaConf.set_struct(config, True)
    for key, value in given.items():
        if key.lstrip("+").split(".")[0] not in ("data", "trainer") or "." not in key:
            raise UserError(f"{key}={value}: of a finished run only data.* and trainer.* can be changed")
        try:
            OmegaConf.update(config, key.lstrip("+"), yaml.safe_load(value), force_add=key.startswith("+"))
        except (OmegaConfBaseException, yaml.YAMLError):
            raise UserError(f"{key}={value}: not a key of {directory / 'config.yaml'}, or not a value for it") from None
    plain: Any = OmegaConf.to_container(config)

    show.quiet()
    data, classifier = build_data(plain), build_classifier(plain)
    runs.load_weights(classifier.backbone, file)
    trainer = build_trainer(plain)
    data.trainer = trainer
    data.setup()
    figures = evaluate(trainer, classifier, data)
    if trainer.is_global_zero:
        recorded = runs.result_of(directory)
        prefix = "" if file.stem == recorded.get("checkpoint") else f"{file.stem}/"  # best/ beside the result of the last
        table = Table("figure", "now", "recorded", title=str(file))
        for name, figure in figures.items():
            table.add_row(name, f"{figure:g}", f"{recorded[prefix + name]:g}" if prefix + name in recorded else "")
        Console().print(table)
        here = {"device": runs.origin()["device"], "devices": trainer.world_size, "precision": trainer.precision}
        for name, now in here.items():
            if recorded.get(name, now) != now:
                print(f"note: {name} now {now}, recorded with {recorded[name]}; the last digits may differ")
    return figures


def evaluate(trainer: "L.Trainer", classifier: "Classifier", data: "ImageDataModule") -> dict[str, float]:
    """val/ and test/ loss, top1 and top5 (percent) of the weights that the classifier holds, for the parts that the data has."""
    assert data.parts is not None
    figures: dict[str, float] = {}
    for part, measure in (("val", trainer.validate), ("test", trainer.test)):
        if getattr(data.parts, part) is not None:
            measure(classifier, datamodule=data, verbose=False)
            measured = trainer.callback_metrics.items()
            figures |= {name: round(float(value), 6) for name, value in measured if name.startswith(f"{part}/")}
    return figures


if __name__ == "__main__":
    main()
