"""`python -m tnt_lightning.verify data=...`: reads every image; counts by part and class, and what is broken."""

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tnt_lightning.cli import command
from tnt_lightning.config import check
from tnt_lightning.errors import UserError

if TYPE_CHECKING:
    from tnt_lightning.data.splits import Labelled


@command("verify")
def main(config: DictConfig) -> None:
    check(config, HydraConfig.get().runtime.choices["model"])
    plain: Any = OmegaConf.to_container(config)
    if wrong := verify(plain):
        print(f"{len(wrong):,} fault(s):")
        for line in wrong:
            print(f"  {line.encode(errors='backslashreplace').decode()}")  # a file's name need not be text
        raise SystemExit(1)
    print("all of them can be read")


def verify(config: dict[str, Any]) -> list[str]:
    """Prints the counts; gives a line for each image that cannot be read, and for each count that is not the official one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tnt_lightning import show
    from tnt_lightning.build import build_data

    show.quiet()
    data = build_data(config)
    data.prepare_data()
    splits = data.splits()
    parts = {name: part for name, part in splits._asdict().items() if part is not None}
    broken = {name: _broken(name, part) for name, part in parts.items()}

    counts = {name: Counter(part.labels) for name, part in parts.items()}
    names = getattr(splits.train, "classes", None) or list(map(str, range(data.num_classes)))
    table = Table("label", "class", *parts)
    for label in sorted(set().union(*counts.values())):
        table.add_row(str(label), escape(names[label]) if label < len(names) else "?", *(f"{count[label]:,}" for count in counts.values()))
    table.add_section()
    table.add_row("", f"{len(names):,} classes", *(f"{count.total():,}" for count in counts.values()))
    table.add_row("", "broken", *(f"{len(found):,}" for found in broken.values()))
    Console().print(table)
    for note in data.notes:
        print(f"note {note}")
    differ = data.discrepancies(splits)
    if data.subset and differ:
        print(f"note a subset: {'; '.join(differ)}")
    return [*(line for found in broken.values() for line in found), *([] if data.subset else differ)]


class _Reading:
    """Item i: why image i cannot be read; None where it can."""

    def __init__(self, part: "Labelled"):
        self.part = part

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, index: int) -> str | None:
        from tnt_lightning.data.images import BrokenImage, decoded

        try:
            decoded(self.part[index][0])
        except UserError as error:
            return f"{error.file}: {error.why}" if isinstance(error, BrokenImage) else str(error)
        return None


def _broken(name: str, part: "Labelled") -> list[str]:
    from rich.progress import track
    from torch.utils.data import DataLoader

    reading: Any = _Reading(part)
    batches = DataLoader(reading, batch_size=32, num_workers=min(os.cpu_count() or 1, len(reading)), collate_fn=list)
    return [line for batch in track(batches, f"read {name}", len(batches)) for line in batch if line is not None]


if __name__ == "__main__":
    main()
