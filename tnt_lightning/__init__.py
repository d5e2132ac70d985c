"""TNT, Transformer in Transformer: train, ablate, evaluate and use it.

>>> import tnt_lightning
>>> model = tnt_lightning.create_model("tnt_s", num_classes=10)
>>> tnt_lightning.load_weights(model, "released").changes
['head starts anew: 1000 classes there, 10 here']
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tnt_lightning.models import create_model
    from tnt_lightning.models.weights import load_run, load_weights

__all__ = ["CONF", "create_model", "load_run", "load_weights"]
__version__ = "0.1.0"

# The Hydra configuration: inside the package when installed from a wheel, beside it in a checkout.
CONF = next(
    folder for folder in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if (folder / "config.yaml").is_file()
)


def __getattr__(name: str) -> Any:
    # Late: torch takes seconds to import, and `--cfg job` needs none of it.
    if name == "create_model":
        from tnt_lightning.models import create_model

        return create_model
    if name in ("load_run", "load_weights"):
        from tnt_lightning.models import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
