"""How a network is computed changes its speed, and of its figures the last digits."""

import shutil

import pytest
import torch

from tnt_lightning import load_run, runs
from tnt_lightning.build import build_classifier, speed_up
from tnt_lightning.evaluate import evaluate_run

from .conftest import resolved, train

SMALL = ("model.depth=1", "recipe.epochs=1", "recipe.warmup_epochs=0", "trainer.accelerator=cpu",
         "+trainer.limit_train_batches=4", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1")  # fmt: skip
PLAIN = {"compile": False, "channels_last": False, "tf32": False}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_a_compiled_run_is_a_run_like_any_other(tmp_path):
    plain = train(tmp_path / "plain", *SMALL)
    compiled = train(tmp_path / "compiled", *SMALL, "compute.compile=true")
    for name in ("val/loss", "test/loss"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-4)
    theirs, ours = load_run(tmp_path / "plain").state_dict(), load_run(tmp_path / "compiled").state_dict()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours), "other kernels, another rounding"
    evaluate_run(str(tmp_path / "compiled"), [])


def test_a_finished_run_stays_so_under_another_way_to_compute(tmp_path, capsys):
    first = train(tmp_path / "run", *SMALL)
    assert train(tmp_path / "run", *SMALL, "compute.channels_last=true", "compute.tf32=true") == first
    assert "is finished; nothing is left to train" in capsys.readouterr().out
    assert runs.config_of(tmp_path / "run")["compute"] == PLAIN


def test_channels_last_reaches_every_convolution_and_changes_no_figure():
    classifier = build_classifier(resolved("model=timm", "model.name=resnet18"))
    images = torch.randn(2, 1, 8, 8)
    before = classifier.eval()(images)
    speed_up(classifier, {**PLAIN, "channels_last": True})
    convolutions = [module for module in classifier.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 20
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)
    torch.testing.assert_close(classifier(images), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_allowed_where_it_is_asked_for(tf32):
    try:
        speed_up(build_classifier(resolved()), {**PLAIN, "tf32": tf32})
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    finally:
        torch.set_float32_matmul_precision("highest")
