"""`python -m tnt_lightning.evaluate run=DIR`, or `model=... weights=... data=...`: top-1, top-5 and loss of what is trained already."""

from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tnt_lightning.cli import command, given_in, of_run_changed
from tnt_lightning.config import check, refuse_keys_of_training
from tnt_lightning.errors import UserError

if TYPE_CHECKING:
    import lightning as L

    from tnt_lightning.classifier import Classifier
    from tnt_lightning.data import ImageDataModule

Figures = dict[str, float]


@command("evaluate")
def main(config: DictConfig) -> None:
    hydra = HydraConfig.get()
    given = list(hydra.overrides.task)
    plain: Any = OmegaConf.to_container(config)
    run = plain.pop("run")
    if run is not None:
        evaluate_run(str(run), [override for override in given if not override.startswith("run=")])
        return
    if config.weights is None:
        raise UserError("nothing to measure; name a run, run=outputs/..., or weights for a model: model=tnt_s weights=released data=...")
    refuse_keys_of_training(config, hydra.runtime.choices.get("ablation"), "evaluate")
    check(OmegaConf.masked_copy(config, list(plain)), hydra.runtime.choices["model"])
    evaluate_weights(plain, given_in(("data", "recipe"), given))


def evaluate_run(run: str, overrides: list[str]) -> Figures:
    """Measure a run (a directory, or a checkpoint in one) by its own config, in which overrides of data.*, trainer.* and kernel change
    values; without one, kernel=triton of another machine is auto here.

    Prints the figures beside the recorded ones and gives them.
    """
    from tnt_lightning import runs
    from tnt_lightning.build import build_classifier, build_data
    from tnt_lightning.models.weights import load_weights

    directory, file = runs.locate(run)
    plain = of_run_changed(directory, overrides, ("data", "trainer"))

    data, classifier = build_data(plain), build_classifier(plain)
    load_weights(classifier.backbone, file, exact=True)
    recorded = runs.result_of(directory)
    prefix = "" if file.stem == recorded.get("checkpoint") else f"{file.stem}/"  # best/ beside the result of the last
    figures, trainer = _measure(plain, classifier, data)
    if trainer.is_global_zero:
        print(f"weights {file}")
        _table(
            figures, "recorded", {name: recorded[prefix + name] for name in figures if isinstance(recorded.get(prefix + name), int | float)}
        )
        here = {"device": runs.origin()["device"], "devices": trainer.world_size, "precision": trainer.precision}
        for name, now in here.items():
            if recorded.get(name, now) != now:
                print(f"note: {name} now {now}, recorded with {recorded[name]}; the last digits may differ")
    return figures


def evaluate_weights(config: dict[str, Any], kept: set[str]) -> Figures:
    """Measure config["weights"] in the model and on the data of a resolved config, with the normalisation, crop and interpolation that
    the weights go with; `kept` names those (mean, std, crop_pct, interpolation) that stay as configured.

    Prints the figures, beside the published top-1 where there is one, and gives them.
    """
    from tnt_lightning import show
    from tnt_lightning.build import build_classifier, build_data
    from tnt_lightning.data import ImageNet, ImageNetStream
    from tnt_lightning.trained import with_pixels, with_their_head

    classifier = build_classifier(config)
    cure = "fine-tune the weights first, or choose the data that they were trained for"
    loaded = with_their_head(classifier.backbone, config["weights"], cure)
    config = with_pixels(config, loaded, kept)
    data = build_data(config)
    figures, trainer = _measure(config, classifier, data)
    if trainer.is_global_zero:
        show.start_from(loaded)
        print("pixels " + ", ".join(f"{name} {config['data'][name]}" for name in loaded.preprocessing))
        if loaded.published and isinstance(data, ImageNet | ImageNetStream) and data.parts is not None:
            top1, model = loaded.published
            benchmark = "val/top1" if data.parts.test is None else "test/top1"  # where val is carved out of training
            _table(figures, f"published ({model})", {benchmark: top1})
        else:
            _table(figures)
    return figures


def _measure(config: dict[str, Any], classifier: "Classifier", data: "ImageDataModule") -> tuple[Figures, "L.Trainer"]:
    from tnt_lightning import ranks, show
    from tnt_lightning.build import build_trainer
    from tnt_lightning.signals import Signals

    show.quiet()
    trainer = build_trainer(config)
    ranks.join(trainer, config.get("faults", {}).get("timeout_s", ranks.TIMEOUT_S))  # an older run's has none
    data.trainer = trainer
    data.setup()
    data.val_dataloader(), data.test_dataloader()  # what does not fit is said here, before other processes start
    if trainer.is_global_zero:
        for note in data.notes:
            print(f"note {note}")
    with Signals(), ranks.together(trainer):
        return evaluate(trainer, classifier, data), trainer


def _table(figures: Figures, beside: str | None = None, others: Figures | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "now", *([beside] if beside else []))
    for name, figure in figures.items():
        other = (others or {}).get(name)
        table.add_row(name, f"{figure:g}", *([f"{other:g}" if other is not None else ""] if beside else []))
    Console().print(table)


def evaluate(trainer: "L.Trainer", classifier: "Classifier", data: "ImageDataModule") -> Figures:
    """val/ and test/ loss, top1 and top5 (percent) of the weights that the classifier holds, for the parts that the data has."""
    assert data.parts is not None
    figures: Figures = {}
    for part, measure in (("val", trainer.validate), ("test", trainer.test)):
        if getattr(data.parts, part) is not None:
            measure(classifier, datamodule=data, verbose=False, weights_only=True)
            measured = trainer.callback_metrics.items()
            figures |= {name: round(float(value), 6) for name, value in measured if name.startswith(f"{part}/")}
    return figures


if __name__ == "__main__":
    main()
