"""The wheel: its contents, and that it runs in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.cli import ROOT, small_data, small_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # No build isolation: hatchling is installed already, and nothing is downloaded.
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, *build, folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_both_packages_and_what_they_read(wheel):
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    parents = {"kto_lightning": ROOT, "kto_kernels": ROOT / "kernels"}
    for package, parent in parents.items():
        assert f"{package}/py.typed" in names
        files = {
            path.relative_to(parent).as_posix()
            for path in (parent / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files <= names
    others = {name.split("/")[0] for name in names} - set(parents)
    assert {Path(name).suffix for name in others} == {".dist-info"}


def test_it_runs_in_an_environment_of_its_own(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([python, *install], check=True)
    # Dependencies come from this environment. A line of a .pth adds a folder, but the .pth files in
    # it, such as that of this editable checkout, are not read.
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KTO"))}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [python, *arguments],
            cwd=elsewhere,
            env=kept | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    where = run("-c", "import kto_lightning, kto_kernels; print(kto_kernels, kto_lightning)")
    assert where.count(str(site)) == 2
    assert run("-m", "kto_lightning", "--version").startswith("kto_lightning ")
    model, data = small_model(tmp_path / "model"), small_data(tmp_path / "data.jsonl")
    assert "24" in run("-m", "kto_lightning", "inspect", str(data))
    files = ["--model.policy", str(model), "--data.train", str(data), "--output_dir", "out"]
    run("-m", "kto_lightning", "fit", *files, "--trainer.max_steps", "2")
    assert (elsewhere / "out/model/model.safetensors").is_file()
    assert len((elsewhere / "out/metrics.csv").read_text().splitlines()) == 3
