"""One set of versions: what uv resolves by pyproject.toml is what constraints.txt pins with hashes."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_direct_pins_are_those_of_the_constraints_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    entry = r"^([a-z0-9_.-]+==[^ ]+(?: ; .*?)?) \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n?)+)"
    pinned = re.findall(entry, (ROOT / "constraints.txt").read_text(), re.M)
    names = {pin.split("==")[0] for pin, _ in pinned}
    optional = [need for extra in project["project"]["optional-dependencies"].values() for need in extra]
    needs = project["project"]["dependencies"] + optional + project["dependency-groups"]["dev"]
    direct = {re.split(r"[><= ]", need)[0].lower() for need in needs}
    assert direct <= names
    assert set(project["tool"]["uv"]["constraint-dependencies"]) == {pin for pin, _ in pinned if pin.split("==")[0] in direct}


def test_no_address_of_a_package_is_committed():
    for name in ("pyproject.toml", "constraints.txt"):
        assert not re.search(r"https?://|--(extra-)?index-url", (ROOT / name).read_text())
