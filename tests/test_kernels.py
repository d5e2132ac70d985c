"""kernel=: what is chosen, what is refused, what a run remembers of it; and the fused kernels where there is no GPU."""

import importlib.util
import logging
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from tnt_lightning import create_model, load_run, runs
from tnt_lightning.build import build_classifier
from tnt_lightning.config import check, refuse_to_continue
from tnt_lightning.errors import UserError
from tnt_lightning.evaluate import evaluate_run
from tnt_lightning.kernels import inner
from tnt_lightning.models import model_names
from tnt_lightning.models.cost import flops
from tnt_lightning.results import collect

from .conftest import compose, resolved, train

HERE, FEW = Path(__file__).parent, ("+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1")
SMALL = dict(image_size=32, depth=1, outer_dim=96, inner_dim=24, outer_heads=3)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")


# ---- what is chosen


@pytest.mark.parametrize("name", [name for name in model_names() if name.startswith("tnt")])
def test_every_tnt_takes_the_key(name):
    assert resolved(f"model={name}")["model"]["kernel"] == "auto"
    assert resolved(f"model={name}", "kernel=eager")["model"]["kernel"] == "eager"
    with torch.device("meta"):
        sizes = {
            kernel: flops(create_model(name, kernel=kernel), create_model(name).pretrained_cfg["input_size"]) for kernel in inner.KERNELS
        }
    assert len(set(sizes.values())) == 1, "counted as it is computed layer by layer"


@pytest.mark.parametrize(
    "knobs, line",
    [
        (dict(words_per_patch=9, patch_size=12, image_size=48), "9 words in a patch, and the fused kernels take powers of two up to 64"),
        (dict(inner_dim=100), "words of 100 channels, 16 in a patch, are too wide"),
        (dict(inner_heads=12), "12 inner heads, and the fused kernels take up to 8"),
        (dict(mlp_ratio=8.0), "192 hidden units in the MLP"),
        (dict(qkv_bias=True), "qkv_bias=true"),
        (dict(drop_rate=0.1), "dropout"),
        (dict(attn_drop_rate=0.1), "dropout"),
    ],
)
def test_triton_is_refused_where_it_cannot_be_when_the_model_is_built(knobs, line):
    with torch.device("meta"):
        with pytest.raises(UserError, match=f"^kernel=triton: {re.escape(line)}.*; kernel=auto computes such a model layer by layer$"):
            create_model("tnt_s", **{**SMALL, **knobs}, kernel="triton")
        create_model("tnt_s", **{**SMALL, **knobs}, kernel="auto")


def test_triton_without_a_gpu_is_refused_by_the_command_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="^kernel=triton: no GPU of NVIDIA's"):
        train(tmp_path / "run", "kernel=triton", "trainer.accelerator=cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="kernel='fast' is not one of 'auto', 'eager', 'triton'"):
        build_classifier(resolved("kernel=fast"))
    with pytest.raises(UserError, match="kernel=triton: the words are on the device cpu"):
        create_model("tnt_s", **SMALL, kernel="triton")(torch.zeros(1, 3, 32, 32))


def test_auto_has_the_bits_of_the_layers_without_a_gpu_and_says_nothing(caplog):
    auto, eager = (create_model("tnt_s", **SMALL, kernel=kernel).eval() for kernel in ("auto", "eager"))
    eager.load_state_dict(auto.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with caplog.at_level(logging.INFO, "tnt_lightning"):
        assert torch.equal(auto(images), eager(images))
    assert not caplog.messages


def test_auto_says_once_why_a_gpu_does_not_fuse(caplog):
    """On a GPU as torch imagines it: shapes and types of its tensors, and no numbers."""
    inner._say_once.cache_clear()
    model = create_model("tnt_s", **{**SMALL, "depth": 2}, inner_heads=12)
    with caplog.at_level(logging.INFO, "tnt_lightning"), FakeTensorMode(), torch.device("cuda"):
        there = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
        for _ in range(2):
            assert torch.func.functional_call(model, there, torch.empty(2, 3, 32, 32)).device.type == "cuda"
    assert caplog.messages == [
        "kernel=auto: the inner transformers are computed layer by layer: 12 inner heads, and the fused kernels take up to 8"
    ]


def test_without_triton_a_model_is_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an ImportError for whoever asks
    monkeypatch.delitem(sys.modules, "tnt_lightning.kernels.inner_triton", raising=False)
    model = create_model("tnt_s", **SMALL)
    model(torch.randn(1, 3, 32, 32)).sum().backward()


# ---- what a run remembers


def test_a_run_goes_on_with_another_kernel_and_is_the_same_row(tmp_path):
    folders = [tmp_path / "runs" / name for name in ("first", "second")]
    for folder, kernel, seed in zip(folders, ("auto", "eager"), (0, 1), strict=True):
        train(folder, "model.depth=1", f"kernel={kernel}", f"seed={seed}", *FEW)
        assert runs.config_of(folder)["kernel"] == runs.config_of(folder)["model"]["kernel"] == kernel
    found = collect([tmp_path / "runs"])
    assert len(found.rows) == 1 and found.rows[0].count == "2"
    assert [note for note in found.notes if "different kernel: auto, eager" in note]
    assert train(folders[1], "model.depth=1", "kernel=auto", "seed=1", *FEW)["seed"] == 1, "finished, by whatever kernel"

    plan = runs.config_of(folders[0])
    refuse_to_continue(plan, {**plan, "kernel": "eager", "model": {**plan["model"], "kernel": "eager"}})
    before = {**plan, "model": {name: value for name, value in plan["model"].items() if name != "kernel"}}
    del before["kernel"]
    refuse_to_continue(before, plan)
    for config in (before, {**plan, "kernel": "eager", "model": {**plan["model"], "kernel": "eager"}}):
        (folders[0] / "result.json").unlink(missing_ok=True)
        (folders[0] / "config.yaml").write_text(runs.recorded(config))
        assert runs.unfinished(plan, beside=tmp_path / "runs" / "third") == [folders[0]]


def test_a_run_by_triton_is_loaded_and_measured_where_there_is_no_gpu(tmp_path):
    run = tmp_path / "run"
    train(run, "model.depth=1", "trainer.accelerator=cpu", *FEW)
    as_it_was = evaluate_run(str(run), [])

    def recorded(kernel):
        config = runs.config_of(run)
        for section in (config, config["model"]):
            section.pop("kernel", None)
            section.update({"kernel": kernel} if kernel else {})
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    for kernel, here in (("triton", "auto"), ("eager", "eager"), (None, "eager")):  # None: a run from before there was a choice
        recorded(kernel)
        assert load_run(run).blocks[0].inner.kernel == here
        assert evaluate_run(str(run), []) == as_it_was
    assert evaluate_run(str(run), ["kernel=eager"]) == as_it_was
    with pytest.raises(UserError, match="^kernel=triton: no GPU"):
        evaluate_run(str(run), ["kernel=triton"])


def test_another_model_has_no_such_key(ended):
    code, lines, _ = ended("train", "model=deit_s", "kernel=triton")
    assert code == 2 and re.match(r"error: kernel=triton: model=deit_s has no such knob; models that have it: tnt_b, .*tnt_ti$", lines[0])
    config = compose("model=tnt_s", "model.kernel=triton")
    with pytest.raises(UserError, match=r"model.kernel=triton is at odds with kernel=auto; set kernel alone"):
        check(config, "tnt_s")


# ---- the kernels themselves


@pytest.mark.slow
@needs_triton
def test_they_are_right_in_tritons_interpreter():
    """In a process of its own: Triton asks for TRITON_INTERPRET when it is imported, which torch may have done here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(HERE / "kernels")]
    done = subprocess.run(line, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 80, done.stdout[-500:]


@pytest.fixture(scope="module")
def page():
    return runpy.run_path(str(HERE.parent / "experiments" / "speed" / "compile.py"))


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["inner_forward", "inner_mlp_backward", "inner_attention_backward"])
def test_they_are_compiled_without_a_gpu_and_fit_into_one(page, kernel, architecture):
    function = next(one for one in page["KERNELS"] if one.__name__ == kernel)
    (found,) = page["measured"](function, page["shape_of"]("TNT-S", torch.bfloat16), architecture)
    assert found["shared"] <= page["LEAST"] // 2, "two programs at a time on the smallest of these GPUs"
    assert found["HMMA"] + found["HGMMA"] > 20, "on the tensor cores"
    assert found["spilled"] <= (0 if kernel == "inner_forward" else 512), "bytes of registers that did not fit"


@needs_triton
def test_a_gpu_with_too_little_shared_memory_goes_layer_by_layer(page, monkeypatch):
    """Of a GPU that is not there: its properties are given, and what Triton compiles for it is real."""

    def answer(shared, words, channels, training):
        gpu = SimpleNamespace(name="A GPU", major=8, shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        inner._unable_once.cache_clear()
        with page["as_if_on"](80):
            return inner._unable_once(0, words, channels, 4 * channels, 4, torch.bfloat16, torch.float32, torch.float32, training)

    try:
        assert answer(page["LEAST"], 16, 24, True) == ""
        why = answer(page["LEAST"], 4, 96, True)
        assert re.fullmatch(r"the fused kernels need 1\d\d,\d{3} bytes of shared memory, and A GPU has 101,376", why)
        assert answer(page["LEAST"], 4, 96, False) == "", "the forward pass alone needs less"
    finally:
        inner._unable_once.cache_clear()
