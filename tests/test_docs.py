"""What the documentation tells people to type is understood by the commands."""

import argparse
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tnt_lightning import CONF
from tnt_lightning.cli import composed
from tnt_lightning.config import check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]
HYDRA = {
    "train": "config",
    "evaluate": "evaluate",
    "verify": "verify",
    "prepare": "prepare",
    "figures": "figures",
}  # command -> what it composes
MODULES = {"dashboard": "workspace"}  # python -m tnt_lightning.dashboard calls what lies there
CALL = re.compile(r"(?:python -m tnt_lightning\.|-m tnt_lightning\.|tnt-)(\w+)(?=\s|$)")


def commands(page: Path) -> list[str]:
    """Each command line of ours in the page's blocks of shell, without comments, line by line."""
    found = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if (call := CALL.search(line)) and not re.search(r"\$[(@]", line):  # what a shell puts in is not known here
                found.append(f"{call[1]} {re.split(r' && | [|>] ', line[call.end() :])[0].strip()}".strip().rstrip('"'))
    return found


LINES = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)})


def test_there_are_commands_to_look_at():
    assert len([line for page, line in LINES if not page.startswith("experiments")]) > 50


@pytest.mark.parametrize("page, line", LINES)
def test_a_command_of_the_documentation_is_understood(page, line, monkeypatch, tmp_path):
    name, *arguments = shlex.split(line.replace(" ... ", " ").removesuffix(" ..."))
    if name == "benchmark" and arguments and not arguments[0].startswith("-"):
        what, *arguments = arguments
        composes(f"benchmark_{what}", arguments, its_own_files(ROOT / page, tmp_path))
    elif name in HYDRA:
        composes(HYDRA[name], arguments, its_own_files(ROOT / page, tmp_path))
    elif name != "benchmark":
        parses(name, arguments, monkeypatch)


def its_own_files(page: Path, folder: Path) -> list[str]:
    """The folders of configurations that the page shows, each in a block of YAML that opens with its name: `# mine/model/little.yaml`."""
    roots = {}
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S):
        if named := re.search(r"^# (\w+)/(\w+/\w+\.yaml)", block, re.M):
            file = folder / named[1] / named[2]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
            roots[named[1]] = f"file://{folder / named[1]}"
    return [name for name in roots.values() if not name.endswith("/conf")]


def composes(config_name: str, arguments: list[str], own: list[str]) -> None:
    """The first job of a sweep, and what is composed is what the commands let pass; of paths that are not here, without looking."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    assert set(flags) <= {"-m", "--help", "--config-dir", "-sc"}, flags
    if "--config-dir" in flags or "searchpath" in str(overrides):
        if not own:  # with files that the reader has
            return
        overrides = [f"hydra.searchpath=[{','.join(own)}]", *(one for one in overrides if "=" in one and "searchpath" not in one)]
    first = []
    for override in OverridesParser.create().parse_overrides(overrides):
        assert not override.is_sweep_override() or "-m" in flags, f"{override.input_line}: several values are for -m"
        value = next(iter(override.sweep_string_iterator())) if override.is_sweep_override() else None
        if override.key_or_group != "ablation":  # what it sweeps is composed by test_config.py
            first.append(override.input_line if value is None else f"{override.key_or_group}={value}")
    folder = ["data.num_classes=7"] if "data=folder" in first else []
    config = composed([*first, *folder], config_name)
    assert config is not None, "Hydra does not compose it"
    if config_name in ("config", "evaluate", "verify") and "run" not in {one.split("=")[0] for one in first}:
        OmegaConf.resolve(config)
        known = [key for key in config if key not in ("hydra", "run")]
        check(OmegaConf.masked_copy(config, known), "the page's")


class Parsed(Exception):
    pass


def parses(name: str, arguments: list[str], monkeypatch) -> None:
    def parse_args(parser, *_):
        _, unknown = parser.parse_known_args(arguments)
        assert not unknown, unknown
        raise Parsed

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse_args)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises((Parsed, SystemExit)) as ended:
        import_module(f"tnt_lightning.{MODULES.get(name, name)}").main()
    assert ended.type is Parsed or ended.value.code == 0, "it answers --help"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_command_is_in_the_readme_or_the_docs():
    known = "\n".join(page.read_text() for page in PAGES if "experiments" not in page.parts)
    scripts = re.findall(r'^tnt-(\w+) = "tnt_lightning', (ROOT / "pyproject.toml").read_text(), re.M)
    assert scripts and all(f"tnt_lightning.{name}" in known for name in scripts) and CONF.exists()
