"""Over all knobs and keys at once: what fits is built and works, what does not is refused in one line, and nothing else ever happens."""

import contextlib
import copy
import functools
import io
import math
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save_file

from tnt_lightning import CONF
from tnt_lightning.build import build_classifier, build_data, build_trainer
from tnt_lightning.cli import resolve
from tnt_lightning.config import check, keys_of
from tnt_lightning.errors import UserError
from tnt_lightning.models import build_model
from tnt_lightning.models.tnt import TNT
from tnt_lightning.models.weights import load_weights
from tnt_lightning.schema import KINDS

from .conftest import FACTS, command, compose

MANY = int(os.environ.get("TNT_LIGHTNING_EXAMPLES", "1"))  # times as many examples, at random: a search by hand


def examples(n: int) -> settings:
    """The same ones each time, however long one of them takes."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=n * MANY, derandomize=MANY == 1, database=None, deadline=None, suppress_health_check=checks)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- TNT's knobs

ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 7, 0.5, 1.0, -0.1, 1e9, math.inf, math.nan, 70_000, 10**30, "", "4", "token", "word"),
    *([], [1], [True], [1.0], [1, 1], [2, 1], (1,), {}, [4, [4]], [4, 4], (4, 4), [4, 4, 4]),
]
FITTING: dict[str, Any] = dict(
    image_size=8, patch_size=4, in_chans=1, num_classes=3, words_per_patch=4, outer_dim=24, inner_dim=6, outer_heads=2, inner_heads=2,
    depth=2, mlp_ratio=4.0, tnt_blocks=None, position_encoding="both", se=True, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1,
    qkv_bias=False, global_pool="token",
)  # fmt: skip


@st.composite
def fitting(draw: st.DrawFn) -> dict[str, Any]:
    """Knobs made to fit each other, small."""
    root, step = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    words, patch = root * root, root * step
    inner_heads, outer_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner_dim = inner_heads * draw(st.integers(1, 4))
    by_rule = draw(st.booleans())
    outer_dim = math.lcm(inner_dim * words, outer_heads) if by_rule else outer_heads * draw(st.integers(2, 8))
    if by_rule:  # c = d / m, whatever was meant
        inner_heads = draw(st.sampled_from([k for k in range(1, 7) if outer_dim // words % k == 0]))
    depth = draw(st.integers(1, 3))
    down, across = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    side = st.sampled_from([patch * down, [patch * down, patch * across], (patch * across, patch * down)])
    rate = st.sampled_from([0, 0.0, 0.1, 0.5])
    return {
        "image_size": draw(side),
        "patch_size": patch,
        "in_chans": draw(st.integers(1, 4)),
        "num_classes": draw(st.integers(0, 6)),
        "words_per_patch": words,
        "outer_dim": outer_dim,
        "inner_dim": None if by_rule else inner_dim,
        "outer_heads": outer_heads,
        "inner_heads": inner_heads,
        "depth": depth,
        "mlp_ratio": draw(st.sampled_from([1, 1.5, 2.0, 4])),
        "tnt_blocks": draw(st.none() | st.lists(st.integers(1, depth), unique=True)),
        "position_encoding": draw(st.sampled_from(["none", "sentence", "word", "both"])),
        "se": draw(st.booleans()) and outer_dim >= 4,
        "drop_rate": draw(rate),
        "attn_drop_rate": draw(rate),
        "drop_path_rate": draw(rate),
        "qkv_bias": draw(st.booleans()),
        "global_pool": draw(st.sampled_from(["token", "avg", ""])),
    }


@st.composite
def mostly_misfitting(draw: st.DrawFn) -> dict[str, Any]:
    """Fitting knobs of which one to three are then others."""
    knobs = draw(fitting())
    for knob in draw(st.lists(st.sampled_from(sorted(knobs)), min_size=1, max_size=3)):
        near = st.integers(0, 40) | st.lists(st.integers(-1, 9), max_size=3)
        knobs[knob] = draw(st.sampled_from(ODD) | near)
    return knobs


def is_whole(value: Any, lowest: int = 1, highest: int = 65_536) -> bool:
    return type(value) is int and lowest <= value <= highest


def misfits(knobs: dict[str, Any]) -> set[str]:
    """The knobs of which at least one is wrong, by the paper's rules alone; empty where all fit."""
    k = dict(knobs)
    sizes = ("patch_size", "in_chans", "words_per_patch", "outer_dim", "outer_heads", "inner_heads", "depth")
    wrong = {knob for knob in sizes if not is_whole(k[knob])}
    wrong |= {"num_classes"} - ({"num_classes"} if is_whole(k["num_classes"], 0, 2**24) else set())
    wrong |= {
        knob for knob in ("drop_rate", "attn_drop_rate", "drop_path_rate") if type(k[knob]) not in (int, float) or not 0 <= k[knob] < 1
    }
    wrong |= {knob for knob in ("se", "qkv_bias") if k[knob] is not True and k[knob] is not False}
    wrong |= {"position_encoding"} if k["position_encoding"] not in ("none", "sentence", "word", "both") else set()
    wrong |= {"global_pool"} if k["global_pool"] not in ("token", "avg", "") else set()
    wrong |= {"inner_dim"} if k["inner_dim"] is not None and not is_whole(k["inner_dim"]) else set()
    wrong |= {"mlp_ratio"} if type(k["mlp_ratio"]) not in (int, float) or not k["mlp_ratio"] <= 1_000 else set()
    wrong |= {"depth"} if "depth" not in wrong and k["depth"] > 1_000 else set()
    sides = k["image_size"] if isinstance(k["image_size"], (list, tuple)) else [k["image_size"]] * 2
    wrong |= {"image_size"} if len(sides) != 2 or not all(map(is_whole, sides)) else set()
    if not wrong & {"patch_size", "image_size"} and any(side % k["patch_size"] for side in sides):
        wrong |= {"image_size"}
    blocks = k["tnt_blocks"]
    if blocks is not None and "depth" not in wrong:
        distinct = isinstance(blocks, (list, tuple)) and all(map(is_whole, blocks)) and len(set(blocks)) == len(blocks)
        wrong |= set() if distinct and all(block <= k["depth"] for block in blocks) else {"tnt_blocks"}
    if not wrong & {"words_per_patch", "patch_size"}:
        root = math.isqrt(k["words_per_patch"])  # m words are a square of sub-patches
        wrong |= {"words_per_patch"} if root * root != k["words_per_patch"] or k["patch_size"] % root else set()
    if not wrong & {"words_per_patch", "outer_dim", "inner_dim"}:
        if k["inner_dim"] is None and k["outer_dim"] % k["words_per_patch"]:  # c = d / m
            wrong |= {"words_per_patch"}
        else:
            c = k["inner_dim"] or k["outer_dim"] // k["words_per_patch"]
            wrong |= {"inner_heads"} if "inner_heads" not in wrong and c % k["inner_heads"] else set()
            wrong |= {"mlp_ratio"} if "mlp_ratio" not in wrong and int(min(c, k["outer_dim"]) * k["mlp_ratio"]) < 1 else set()
    if not wrong & {"outer_dim", "outer_heads"}:
        wrong |= {"outer_heads"} if k["outer_dim"] % k["outer_heads"] else set()
    if k["se"] is True and "outer_dim" not in wrong and k["outer_dim"] < 4:  # a quarter of the channels
        wrong |= {"se"}
    return wrong


def built(knobs: dict[str, Any]) -> TNT:
    model = build_model(_target_="tnt_lightning.models.TNT", **knobs)
    assert isinstance(model, TNT)
    return model


CURES = ("try ", "is not a whole number of at least", "is not one of", "is not a rate from", "neither true nor false", "set inner_dim",
         "the paper's is 4", "needs outer_dim of at least", "neither a number nor", "at most", "lower")  # fmt: skip


def refused(knobs: dict[str, Any], wrong: set[str]) -> None:
    with pytest.raises(ValueError) as caught:
        built(knobs)
    line = str(caught.value)
    assert any(line.startswith(f"{knob}=") for knob in wrong) and "\n" not in line, f"{line!r} names none of {wrong}"
    assert any(cure in line for cure in CURES), line


def works(knobs: dict[str, Any], folder: Any) -> None:
    """Builds, goes forward and backward, and comes back from a file as it was."""
    torch.manual_seed(0)
    model = built(knobs)
    height, width = model.image_size
    images = torch.randn(2, knobs["in_chans"], height, width)
    tokens = 1 + (height // knobs["patch_size"]) * (width // knobs["patch_size"])
    shape = (2, knobs["num_classes"] or knobs["outer_dim"])
    shape = shape if knobs["global_pool"] else (2, tokens, shape[1])

    model.eval()
    logits = model(images)
    assert logits.shape == shape and logits.isfinite().all()
    model.train()
    model(images)  # with what is dropped
    model.zero_grad()
    model.eval()
    (model(images) * torch.randn(shape)).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    # Nothing reads the words after the last fold.
    assert not without, f"no gradient of {without}"

    torch.save(model.state_dict(), folder / "model.pth")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    for name in ("model.pth", "model.safetensors"):
        other = built(knobs).eval()
        assert not torch.equal(other.cls_token, model.cls_token)
        load_weights(other, folder / name, exact=True)
        with torch.no_grad():
            assert torch.equal(other(images), model(images)), name


def checked(knobs: dict[str, Any], folder: Any) -> None:
    if wrong := misfits(knobs):
        refused(knobs, wrong)
    else:
        works(knobs, folder)


@examples(25)
@given(knobs=fitting())
def test_knobs_that_fit_make_a_network_that_works(tmp_path, knobs):
    assert not misfits(knobs)
    works(knobs, tmp_path)


@examples(120)
@given(knobs=mostly_misfitting())
def test_knobs_that_do_not_fit_are_refused_with_a_cure_and_all_others_work(tmp_path, knobs):
    checked(knobs, tmp_path)


@pytest.mark.parametrize("knob", sorted(FITTING))
def test_a_knob_alone_takes_what_fits_and_refuses_the_rest(knob):
    for value in ODD:
        knobs = {**FITTING, knob: value}
        if wrong := misfits(knobs):
            refused(knobs, wrong)
        else:
            built(knobs)


# ---- every key of a configuration

BASES = {
    "digits": (),
    "another": ("data=imagenet", "data.root=/nowhere", "model=deit_s", "optimizer=lamb", "logger=csv", "trainer=debug"),
    "streamed": ("data=imagenet_stream", "data.root=/nowhere", "optimizer=sgd", "model=tnt_s", "logger=none"),
}
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e38, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "abc", "1", "nan", "null", "auto", "99999999999", "${seed}", "${nowhere}", "???", "a\nb", "é", "\x00", "x" * 3000, "1,2",
    [], [1], [[]], [None], [1, 2], [0, 0], [-1, 1], [math.nan, 1], ["a", "b"], [0.5] * 3, [2**70] * 2, [{"a": []}],
    {}, {"a": 1}, {1: 2}, {"_target_": "os.system"},
]  # fmt: skip
# Where an answer names another key than the one that was set: the one that took its value, or that it does not fit.
ALSO = {
    "recipe.epochs": "max_epochs",
    "recipe.clip_grad": "gradient_clip_val",
    "recipe.lr": "optimizer.lr",
    "trainer.max_epochs": "warmup_epochs",
    "optimizer.opt": "optimizer",
    "model._target_": "model",
}


@functools.cache
def whole(base: str) -> Any:
    return compose(*BASES[base])


@functools.cache
def keys(base: str) -> list[str]:
    return sorted({*KINDS, *(key for key in keys_of(whole(base)) if not key.startswith(FACTS))})


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, str, Any]:
    base = draw(st.sampled_from(sorted(BASES)))
    numbers = st.integers() | st.floats()
    return (
        base,
        draw(st.sampled_from(keys(base))),
        draw(st.sampled_from(VALUES) | numbers | st.text(max_size=5) | st.lists(numbers, max_size=3)),
    )


def built_or_refused(base: str, key: str, value: Any) -> str | None:
    """What is said of the value of a key in an otherwise sound configuration; None where it is built."""
    config = copy.deepcopy(whole(base))
    OmegaConf.set_struct(config, False)
    try:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    except ValueError:  # OmegaConf does not even hold it
        return None
    try:
        resolve(config, "config")
        check(config, "the model")
        plain = OmegaConf.to_container(config)
        build_data(plain)
        with torch.device("meta"):
            build_classifier(plain)
        build_trainer(plain)
    except UserError as error:
        return str(error)
    return None


def named(key: str, line: str) -> bool:
    if "." not in key and "interpolation" in line:  # of a key that takes its value from where the section was
        return True
    return key.rpartition(".")[2] in line or any(key.startswith(given) and other in line for given, other in ALSO.items())


def refused_by_name(base: str, key: str, value: Any) -> None:
    line = built_or_refused(base, key, value)
    assert line is None or (len(line.splitlines()) == 1 and named(key, line)), f"{key}={value!r}: {line}"


@examples(60)
@given(change=changed())
def test_a_value_is_built_or_refused_by_the_name_of_its_key(change):
    refused_by_name(*change)


# ---- the command line

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
TEXTS = [
    *("", "null", "true", "abc", "-1", "0", "1", "2", "0.5", "1e38", "1e400", "inf", "nan", "9" * 20, "0x10", "1_000", "tnt_s", "digits"),
    *("???", "${seed}", "${nowhere}", "${oc.env:NOWHERE}", "[]", "[1]", "[1,2]", "{}", "{a:1}", "[[", "}", "'", '"', "'a b'", "a b", "é"),
    *("1,2", "choice(1,2)", "range(1,3)", "glob(*)", "\\", "a=b", "~/x", "a:b", "$", "\n", "\t", "!!python/object:os.system", ".", "日本"),
]
UNREADABLE = {"[[", "}", "'", '"', "\\", "a=b", "~/x", "$", "\n", "\t", "1,2", "range(1,3)", "choice(1,2)", "glob(*)"}
OPTIONS = [
    *("-m", "--multirun", "--cfg", "--cfg=job", "--cfg=all", "--info", "--info=plugins", "--resolve", "--package=data", "-p", "--help"),
    *("--config-name=nothing", "--config-dir=/nowhere", "--config-path=/nowhere", "--experimental-rerun=/nowhere", "-x", "--", "-"),
]
HYDRAS = [
    *("hydra.verbose", "hydra.job.name", "hydra.job.chdir", "hydra.job.num", "hydra.mode", "hydra.nothing", "hydra.output_subdir", "hydra"),
    *("hydra.searchpath", "hydra.callbacks", "hydra.sweep.subdir", "hydra.sweeper.params", "hydra/launcher", "hydra/sweeper"),
]
# Last, so that they win: nothing is run for long, elsewhere, by several processes or over the network.
TAMED = ["trainer.max_epochs=1", "trainer.devices=1", "trainer.num_nodes=1", "data.num_workers=0", "data.download=false"]


@st.composite
def overrides(draw: st.DrawFn) -> str:
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(OPTIONS))
    if kind == 1:
        return draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12))
    key = draw(st.sampled_from([GROUPS, HYDRAS, keys("digits"), keys("digits"), keys("digits")][draw(st.integers(0, 4))]))
    if draw(st.integers(0, 4)) == 0:  # misspelt
        at = draw(st.integers(0, len(key) - 1))
        key = key[:at] + draw(st.sampled_from(["", "x", ".", "/", "@", " ", key[at] * 2])) + key[at + 1 :]
    odd = st.text("ab01.,=[]{}()'\"$:~-+ \\é*/%#!?", max_size=8)
    value = draw(st.sampled_from(TEXTS) | odd)
    return draw(st.sampled_from(["", "", "", "+", "++", "~"])) + key + draw(st.sampled_from(["=", "=", "=", "=", ""])) + value


@st.composite
def well_formed(draw: st.DrawFn) -> str:
    """An override that Hydra can read, so that it goes as far as its value lets it."""
    key = draw(st.sampled_from(keys("digits")))
    readable = [text for text in TEXTS if text not in UNREADABLE]
    quoted = st.text("ab01 .,=é\n\t{}[]$", max_size=6).map(lambda text: f'"{text}"' if "${" not in text else "x")
    numbers = (st.integers() | st.floats()).map(str) | st.integers(-2, 9).map(str)
    return f"++{key}={draw(st.sampled_from(readable) | quoted | numbers)}"


def ends(name: str, arguments: list[str], folder: Path) -> tuple[Any, str]:
    """(exit code, stderr) of a command in this process; a traceback where an error leaves it."""
    main = import_module(f"tnt_lightning.{name}").main
    before, argv, environment, errors = Path.cwd(), sys.argv, dict(os.environ), io.StringIO()
    sys.argv = [f"/somewhere/tnt_lightning/{name}.py", *arguments]
    os.chdir(folder)
    code: Any = 0
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as error:
        code = error.code or 0
    except Exception:
        return 1, errors.getvalue() + traceback.format_exc()
    finally:
        os.chdir(before)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    return code, errors.getvalue()


def answered(code: Any, errors: str, arguments: list[str]) -> None:
    said = [line for line in errors.splitlines() if "error: " in line]
    assert code in (0, 2) and "Traceback" not in errors and len(said) == (code == 2), f"{arguments}: {code}, {errors[-3000:]}"


def a_command_line(name: str, fuzz: list[str], folder: Path) -> list[str]:
    where = [f"hydra.run.dir={folder / 'run'}", f"hydra.sweep.dir={folder / 'sweep'}"] if name == "train" else []
    small = ["trainer=debug", "logger=csv"] if name == "train" else []
    silent = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    options = [argument for argument in fuzz if argument.startswith("-")]  # first: argparse takes no overrides after them otherwise
    return [
        *options,
        *small,
        *(argument for argument in fuzz if argument not in options),
        *(TAMED if name != "benchmark" else []),
        *where,
        *silent,
    ]


@pytest.mark.slow
@examples(60)
@given(fuzz=st.lists(overrides(), min_size=1, max_size=3) | st.lists(well_formed(), min_size=1, max_size=1))
def test_no_command_line_ends_in_a_traceback(tmp_path_factory, fuzz):
    folder = tmp_path_factory.mktemp("fuzz")
    arguments = a_command_line("train", fuzz, folder)
    answered(*ends("train", arguments, folder), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "verify", "prepare", "benchmark"])
def test_no_command_line_of_the_others_ends_in_a_traceback(tmp_path_factory, name):
    @examples(15)
    @given(fuzz=st.lists(overrides(), min_size=1, max_size=3))
    def fuzzed(fuzz):
        folder = tmp_path_factory.mktemp("fuzz")
        arguments = a_command_line(name, fuzz, folder)
        answered(*ends(name, arguments, folder), arguments)

    fuzzed()


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [["seed=a\nb"], ["hydra.verbose={}"], ["image_size=???"], ["--cfg"], ["+trainer.val_check_interval=100"]])
def test_a_mistake_of_a_process_of_its_own(tmp_path, fuzz):
    done = command("train", *a_command_line("train", fuzz, tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    answered(done.returncode, done.stderr, fuzz)
