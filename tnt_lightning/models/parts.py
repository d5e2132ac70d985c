"""The parts of a backbone, by name and by depth, and its head: what fine-tuning leaves as it is, or trains first."""

import difflib
from collections.abc import Sequence

from timm.models import group_parameters
from torch import nn

from tnt_lightning.errors import UserError

BACKBONE = "backbone"  # of `freeze`: all but the head


def head_modules(model: nn.Module) -> list[str]:
    """The modules that turn features into logits, by name: what timm's pretrained_cfg calls the classifier."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return [heads] if isinstance(heads, str) else list(heads)


def head_parameters(model: nn.Module) -> set[str]:
    """The names of the head's parameters."""
    return {name for name, _ in model.named_parameters() if _in(name, head_modules(model))}


def layers(model: nn.Module) -> dict[str, int]:
    """Of each parameter how deep it lies, as timm groups them: 0 is the stem, then block after block (the last with the final norm), and
    the highest is the head. Empty where the model has no group_matcher."""
    matcher = getattr(model, "group_matcher", None)
    return dict(group_parameters(model, matcher(coarse=False), reverse=True)) if matcher else {}


def freeze(model: nn.Module, what: str | int | Sequence[str] | None) -> None:
    """No gradient for some parameters from here on.

    what: "backbone": all but the head; a number k: the stem (embeddings, positions, class token) and the first k blocks; a list of names
    of modules or parameters, such as ["word_embed", "blocks.0"]; None: nothing

    UserError for names that nothing has, more blocks than there are, and where nothing would be left to train.
    """
    if what is None:
        return
    frozen = _named(model, what)
    own = dict(model.named_parameters())
    if frozen == own.keys():
        raise UserError(f"recipe.freeze={_text(what)}: nothing would be left to train; leave something out, such as the head")
    for name in frozen:
        own[name].requires_grad_(False)


def _named(model: nn.Module, what: str | int | Sequence[str]) -> set[str]:
    own = [name for name, _ in model.named_parameters()]
    if what == BACKBONE:
        if not (head := head_parameters(model)):
            raise UserError(
                f"recipe.freeze={BACKBONE}: the model does not say which of its parts is the head; name those to freeze: [NAME]"
            )
        return set(own) - head
    if isinstance(what, int):
        depth = layers(model)
        blocks = max(depth.values(), default=0) - 1
        if what > blocks:
            cure = f"the model has {blocks} blocks" if blocks > 0 else "timm tells no blocks of this model apart; name its parts: [NAME]"
            raise UserError(f"recipe.freeze={what}: {cure}")
        return {name for name in own if depth[name] <= what}
    if isinstance(what, str):
        raise UserError(f"recipe.freeze={what}: neither {BACKBONE}, a number of blocks, nor a list of parts: [{what}]")
    frozen = set()
    for part in map(str, what):
        found = {name for name in own if _in(name, [part])}
        if not found:
            known = {".".join(name.split(".")[:count]) for name in own for count in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(part, sorted(known), n=3, cutoff=0.6)
            top = dict.fromkeys(name.split(".")[0] for name in own)
            cure = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(top)}"
            raise UserError(f"recipe.freeze={_text(what)}: the model has no part {part!r} with parameters; {cure}")
        frozen |= found
    return frozen


def _in(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _text(what: str | int | Sequence[str]) -> str:
    return str(what) if isinstance(what, (str, int)) else f"[{','.join(map(str, what))}]"
