"""Where it runs: from any folder, without writing into the checkout, and without its tests."""

import json
import os
import shutil
import subprocess
import sys

from run_helpers import ROOT, SMALL

NEEDED = ("plumbing", "analysis", "models")  # beside the files at the top


def test_it_runs_from_elsewhere_with_a_read_only_checkout_and_spaces_in_paths(tmp_path):
    checkout, elsewhere = tmp_path / "a check out", tmp_path / "some where"
    checkout.mkdir()
    elsewhere.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, checkout / path.name)
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in NEEDED:
        shutil.copytree(ROOT / name, checkout / name, ignore=no_caches)
    assert not (checkout / "tests").exists()
    before = sorted(checkout.rglob("*"))
    for path in [*before, checkout]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        done = subprocess.run(
            [sys.executable, checkout / "train.py", *SMALL, "--steps", "1"],
            cwd=elsewhere,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for path in [*before, checkout]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    # also as root, whom permissions do not stop
    assert sorted(checkout.rglob("*")) == before
    (out,) = (elsewhere / "runs").iterdir()
    assert out.name.startswith("sums-tiny-")
    assert "trained: CaT" in done.stdout
    assert json.loads((out / "config.json").read_text())["commit"] is None


def test_the_recipe_runs_from_elsewhere(tmp_path):
    command = [sys.executable, ROOT / "recipes" / "cat_sft.py", *SMALL, "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert json.loads((out / "config.json").read_text())["settings"]["method"] == "sft"
    assert "trained: CaT-SFT" in done.stdout
