"""A user's mistake: said in one line that names the key or file, the bad value and the cure. Commands print it and exit with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    def __str__(self) -> str:
        # From a loader's worker torch raises it again with the worker's traceback as its message.
        return one_line(super().__str__().rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def one_line(text: str) -> str:
    """What a value brings along, line breaks and what a terminal would obey, as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def did_you_mean(key: str, known: Iterable[str], otherwise: str) -> str:
    """`; did you mean optimizer.lr?`: the same name in another section, else a near one in this section, else a near key of this depth.

    `; otherwise` where there is none.
    """
    section, _, name = key.rpartition(".")
    known = list(known)
    keys = [other for other in known if other.count(".") == key.count(".")]
    siblings = {other.rpartition(".")[2]: other for other in keys if other.rpartition(".")[0] == section}
    leaves = [other for other in known if not any(deeper.startswith(f"{other}.") for deeper in known)]
    if same := [other for other in leaves if other.rpartition(".")[2] == name]:
        near = same[:2]
    elif siblings:
        near = [siblings[other] for other in difflib.get_close_matches(name, siblings, n=2, cutoff=0.6)]
    else:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {otherwise}"
