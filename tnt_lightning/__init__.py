"""TNT, Transformer in Transformer: train, ablate, evaluate and use it.

>>> import tnt_lightning
>>> model = tnt_lightning.create_model("tnt_s", inner_heads=2)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tnt_lightning.models import create_model

__all__ = ["CONF", "create_model"]
__version__ = "0.1.0"

# The Hydra configuration: inside the package when installed from a wheel, beside it in a checkout.
CONF = next(
    folder for folder in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if (folder / "config.yaml").is_file()
)


def __getattr__(name: str) -> Any:
    if name == "create_model":  # late: torch takes seconds to import, and `--cfg job` needs none of it
        from tnt_lightning.models import create_model

        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
