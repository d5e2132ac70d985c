"""Imports go downwards only, and the light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tnt_lightning"
FLOORS = [  # a module may import from its own floor and the ones before
    {"tnt_lightning", "errors", "signals"},
    {"faults", "memory", "runs", "schema", "trees"},
    {"checkpoints", "curves", "sharding", "kernels"},
    {"models"},
    {"data"},
    {"classifier", "callbacks", "ranks", "pictures"},
    {"build", "show", "config", "dashboard"},
    {"cli", "zygote"},
    {"sweep", "results", "trained"},
    {"charts", "clusters", "workspace"},
    {"train", "evaluate", "verify", "prepare", "benchmark", "report", "speed", "tables", "predict", "export", "figures", "demo"},
]
ALLOWED = {  # heavy or framework packages, and the only rooms that may know them
    "hydra": {"cli", "train", "evaluate", "verify", "prepare", "benchmark", "figures"},
    "lightning": {
        *(
            "classifier",
            "checkpoints",
            "curves",
            "sharding",
            "callbacks",
            "ranks",
            "data",
            "build",
            "show",
            "dashboard",
            "train",
            "evaluate",
            "speed",
        ),
    },
    "wandb": {"dashboard", "workspace"},
    "wandb_workspaces": {"workspace"},
    "plotly": {"charts"},
    "gradio": {"demo"},
    "fastapi": {"demo"},
    "uvicorn": {"demo"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "matplotlib": {"speed", "pictures"},
    "sklearn": {"pictures"},
    "litdata": {"data", "prepare"},
    "submitit": {"clusters"},
    "ray": {"clusters"},
    "triton": {"kernels"},
}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "tnt_lightning" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    floor = {name: level for level, rooms in enumerate(FLOORS) for name in rooms}
    here = room(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "tnt_lightning":
            there = rest[0] if rest and rest[0] in floor else "tnt_lightning"
            late_export = here == "tnt_lightning" and there == "models"  # create_model and the like, on first use
            command = here == "dashboard" and name == "tnt_lightning.workspace.main"  # python -m tnt_lightning.dashboard
            assert floor[there] <= floor[here] or late_export or command, f"{here} imports {name}"
            assert not (here == "data" and there == "models"), "data knows nothing of models"
        assert here in ALLOWED.get(top, {here}), f"{here} imports {name}"


def test_composing_imports_nothing_heavy():
    code = (
        "import sys, tnt_lightning.train; print([m for m in ('torch', 'lightning', 'timm', 'wandb', 'torchmetrics') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "room, package", [("dashboard", "wandb"), ("clusters", "submitit"), ("clusters", "ray"), ("kernels/inner", "triton")]
)
def test_some_are_imported_late(room, package):
    early = [ast.unparse(node) for node in ast.parse((PACKAGE / f"{room}.py").read_text()).body]
    assert not any(line.startswith((f"import {package}", f"from {package}")) for line in early)
