"""The package as pip installs it: whole, and at work in any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("package")
FOLDERS = ("kernels", "models", "engine", "train")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package is installed into, without what it depends on."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
    options += ["--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True)
    return target


def test_all_files_are_there_and_no_others(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for name in FOLDERS
            for path in (root / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(installed) == files(ROOT)
    assert all((installed / name / "py.typed").is_file() for name in FOLDERS)
    folders = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert folders == {*FOLDERS, "bin"}


def test_the_script_runs_in_any_folder(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    done = subprocess.run(
        [installed / "bin" / "quorum", "sample", "--k", "1", "--max-new-tokens", "200"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "Best: [" in done.stdout
    assert not list(tmp_path.iterdir())


def test_what_is_called_kernels_here_has_a_version_that_transformers_leaves_alone() -> None:
    """As transformers asks for it: of the first folder of the path that knows."""
    found = metadata.distributions(name="kernels", path=[str(ROOT)])
    assert [each.version for each in found] == ["0"]


def test_an_image_is_made_of_all_packages() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    files = {project["project"]["readme"], *project["project"]["license-files"]}
    assert kept == packages | files | {"pyproject.toml", "constraints.txt"}
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.soak
def test_transformers_beside_another_package_called_kernels(tmp_path: Path) -> None:
    """Hugging Face's, which transformers would import names from: kernels-0.dist-info tells it that
    in this folder it cannot."""
    (tmp_path / "kernels-0.18.5.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n"
    (tmp_path / "kernels-0.18.5.dist-info" / "METADATA").write_text(about)
    program = (
        "import sys, kernels\n"
        "from transformers import Qwen3ForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "sys.path.remove('')\n"
        "is_kernels_available.cache_clear()\n"
        "print(kernels.__file__, is_kernels_available())\n"  # that it would have taken the other
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{ROOT / 'kernels' / '__init__.py'} True\n", done.stderr
