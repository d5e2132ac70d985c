"""`python -m tests.witnessed OVERRIDES hydra.run.dir=RUN`: `python -m tnt_lightning.train` that notes what it saw, on every rank."""

import sys
from pathlib import Path

from tests.soak import witness
from tnt_lightning.train import main

if __name__ == "__main__":
    witness(Path(next(arg for arg in sys.argv if arg.startswith("hydra.run.dir=")).partition("=")[2]))
    main()
