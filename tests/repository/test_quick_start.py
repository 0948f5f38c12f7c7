"""train_quick_start.sh, run with stand-ins for Python that note what they are asked to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_NAMES = ["python", "python3", *(f"python3.{minor}" for minor in range(10, 15))]
SAMPLE_RUN = "train --sample --model_name efficientnet_lite0 --epochs 8"
FOOD101_RUN = "train --epochs 20 --model_name mobilenet_v2"

VENV_PYTHON = f"""#!/bin/bash
case "$1 $2" in
  "-c import shutil"*) exit "${{DISK_FULL:-0}}" ;;
  -c*) exec {sys.executable} "$@" ;;
  "-m pip") echo "pip ${{*:3}}" >>"$LOG"; echo "PIP_USER=$PIP_USER PYTHONPATH=$PYTHONPATH"
    exit "${{PIP_FAILS:-0}}" ;;
  */backend/train_model.py*) echo "train ${{*:2}}" >>"$LOG"; exit "${{TRAINING_EXITS:-0}}" ;;
  *) exit 99 ;;
esac
"""
BASE_PYTHON = """#!/bin/bash
case "$1 $2" in
  *darwin*) exit "${INTEL_MAC:-0}" ;;
  *ensurepip*) exit "${NO_ENSUREPIP:-0}" ;;
  *print*) echo "python3.12-venv" ;;
  *"(3, 15)"*) case " ${TOO_NEW:-} " in *" ${0##*/} "*) exit 0 ;; *) exit 1 ;; esac ;;
  -c*) exit "${TOO_OLD:-0}" ;;
  --version*) echo "Python 3.9.2" ;;
  "-m venv") echo "venv" >>"$LOG"; echo "used ${0##*/}"
    mkdir -p "$3/bin"; cp "{venv_python}" "$3/bin/python"
    exit "${VENV_FAILS:-0}" ;;
  *) exit 99 ;;
esac
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Clone:
    """A fresh clone, with stand-ins for every Python on the path."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.log = folder / "log"
        self.programs = folder / "programs"
        self.path = f"{self.programs}{os.pathsep}/usr/bin{os.pathsep}/bin"
        (self.root / "backend").mkdir(parents=True)
        (self.root / "tests").mkdir()
        shutil.copy(ROOT / "train_quick_start.sh", self.root)
        self.requirements = self.root / "backend" / "requirements.txt"
        self.requirements.write_text("torch\n")
        (self.root / "tests" / "requirements.txt").write_text("pytest\n")
        meta = self.root / "data" / "sample" / "food-101" / "meta"
        meta.mkdir(parents=True)
        (meta / "test.txt").write_text("samosa/7\nsamosa/8\n")
        venv_python = write_program(folder / "venv_python", VENV_PYTHON)
        for name in PYTHON_NAMES:
            text = BASE_PYTHON.replace("{venv_python}", str(venv_python))
            write_program(self.programs / name, text)

    def run(
        self, *arguments: str, **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """Run the script; returns how it ended and what it asked of Python this time."""
        self.log.write_text("")
        result = subprocess.run(
            [str(self.root / "train_quick_start.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=self.programs,  # any other folder
            env={
                "PATH": self.path,
                "LOG": str(self.log),
                **environment,
            },
        )
        return result, self.log.read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    if os.name == "nt":
        pytest.skip("needs bash")
    return Clone(tmp_path)


def install_of(clone: Clone, path: str) -> str:
    return f"pip install --disable-pip-version-check -r {clone.root}/{path}"


def test_the_first_run_does_everything_and_the_second_only_trains(clone: Clone) -> None:
    result, asked = clone.run()
    assert result.returncode == 0, result.stderr
    picture = f"{clone.root}/data/sample/food-101/images/samosa/7.jpg"
    training = [SAMPLE_RUN, f"train --predict {picture}"]
    assert asked == ["venv", install_of(clone, "backend/requirements.txt"), *training]
    for next_command in ("quick_start.sh food101", "mlflow ui", "uvicorn app.main:app"):
        assert next_command in result.stdout
    result, asked = clone.run()
    assert (result.returncode, asked) == (0, training)


def test_changed_requirements_are_installed_again(clone: Clone) -> None:
    clone.run("setup")
    clone.requirements.write_text("torch\ntimm\n")
    assert clone.run("setup")[1] == [install_of(clone, "backend/requirements.txt")]
    assert clone.run("setup")[1] == []


def test_setup_installs_a_second_list_and_does_not_train(clone: Clone) -> None:
    clone.run("setup")
    tests = "tests/requirements.txt"
    assert clone.run("setup", tests)[1] == [install_of(clone, tests)]
    assert clone.run("setup", tests)[1] == []
    result, _ = clone.run("setup", "no/such.txt")
    assert result.returncode == 1
    assert "there is no no/such.txt" in result.stderr


def test_flags_pass_through(clone: Clone) -> None:
    clone.run("setup")
    assert clone.run("--classes", "a b,c", "--epochs", "1")[1] == [
        f"{SAMPLE_RUN} --classes a b,c --epochs 1"
    ]
    assert clone.run("food101", "--resume", "auto")[1] == [f"{FOOD101_RUN} --resume auto"]


def test_help_installs_nothing_and_shows_the_flags_where_it_can(clone: Clone) -> None:
    result, asked = clone.run("--help")
    assert (result.returncode, asked) == (0, [])
    assert "food101" in result.stdout
    clone.run("setup")
    assert clone.run("--help")[1] == ["train --help"]


def test_an_unknown_word_is_refused(clone: Clone) -> None:
    result, asked = clone.run("food102")
    assert (result.returncode, asked) == (2, [])
    assert "food101" in result.stderr


def test_an_old_python_is_refused_by_name(clone: Clone) -> None:
    result, asked = clone.run(TOO_OLD="1")
    assert (result.returncode, asked) == (1, [])
    assert "a 64-bit Python 3.10 to 3.14 is needed, but python3 is Python 3.9.2" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_a_python_of_ones_own_is_used_and_checked(clone: Clone, tmp_path: Path) -> None:
    own = write_program(tmp_path / "my python", (clone.programs / "python3").read_text())
    for name in PYTHON_NAMES:
        (clone.programs / name).unlink()
    result, asked = clone.run("setup", PYTHON=str(own))
    assert (result.returncode, asked[0]) == (0, "venv"), result.stderr
    shutil.rmtree(clone.root / ".venv")
    assert clone.run("setup", PYTHON=str(own), TOO_OLD="1")[0].returncode == 1
    assert "/no/python is not there;" in clone.run("setup", PYTHON="/no/python")[0].stderr


def test_a_python_that_is_too_new_is_used_last_and_named(clone: Clone) -> None:
    result, _ = clone.run("setup", TOO_NEW="python3 python3.14")
    assert "used python3.13" in result.stdout and not result.stderr
    shutil.rmtree(clone.root / ".venv")
    result, _ = clone.run("setup", TOO_NEW=" ".join(PYTHON_NAMES))
    assert "used python3\n" in result.stdout
    assert "is newer than 3.14" in result.stderr


def test_a_mac_without_packages_is_told_so_before_anything_is_made(clone: Clone) -> None:
    result, asked = clone.run(INTEL_MAC="1")
    assert (result.returncode, asked) == (1, [])
    assert "no packages for Macs with an Intel processor" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_a_python_without_venv_names_the_package_that_has_it(clone: Clone) -> None:
    result, asked = clone.run(NO_ENSUREPIP="1")
    assert (result.returncode, asked) == (1, [])
    assert "sudo apt install python3.12-venv" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_a_failed_environment_leaves_nothing(clone: Clone) -> None:
    result, asked = clone.run(VENV_FAILS="1")
    assert (result.returncode, asked) == (1, ["venv"])
    assert "the environment could not be made" in result.stderr
    assert not (clone.root / ".venv").exists()
    assert clone.run("setup")[0].returncode == 0


def test_a_failed_install_is_explained_and_tried_again(clone: Clone) -> None:
    result, asked = clone.run(PIP_FAILS="1")
    assert result.returncode == 1
    assert asked == ["venv", install_of(clone, "backend/requirements.txt")]
    for word in ("No connection", "No space", "No matching version"):
        assert word in result.stderr.replace("\n", " ")
    assert clone.run("setup")[1] == asked[1:]


def test_a_broken_environment_is_named_and_not_touched(clone: Clone) -> None:
    (clone.root / ".venv").mkdir()
    result, asked = clone.run()
    assert (result.returncode, asked) == (1, [])
    assert f"{clone.root}/.venv has no working 64-bit Python" in result.stderr
    assert (clone.root / ".venv").is_dir()


def test_an_environment_that_was_cut_off_is_made_again(clone: Clone) -> None:
    """As after Ctrl-C, or a power cut, in the middle of `python -m venv`."""
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    (clone.root / ".venv" / "unfinished").touch()
    result, asked = clone.run("setup")
    assert (result.returncode, asked[0]) == (0, "venv"), result.stderr
    assert not (clone.root / ".venv" / "unfinished").exists()
    assert "venv" not in clone.run("setup")[1]


def test_variables_that_would_misdirect_pip_do_not_reach_it(clone: Clone) -> None:
    result, _ = clone.run("setup", PIP_USER="1", PYTHONPATH="/elsewhere")
    assert "PIP_USER=0 PYTHONPATH=\n" in result.stdout


def test_it_finds_its_own_folder_whatever_CDPATH_holds(clone: Clone) -> None:
    decoy = clone.root.parent / "decoy" / clone.root.name
    decoy.mkdir(parents=True)
    result = subprocess.run(
        ["bash", f"{clone.root.name}/train_quick_start.sh", "setup"],
        cwd=clone.root.parent,
        env={"PATH": clone.path, "LOG": str(clone.log), "CDPATH": str(decoy.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (clone.root / ".venv").is_dir() and not (decoy / ".venv").exists()


@pytest.mark.slow
def test_a_home_that_cannot_be_written_does_not_matter(clone: Clone) -> None:
    """With a real Python, its venv and its pip."""
    clone.requirements.write_text("")
    result, _ = clone.run("setup", PYTHON=sys.executable, HOME="/proc/nowhere")
    assert result.returncode == 0, result.stderr
    assert (clone.root / ".venv" / "installed-backend-requirements.txt").exists()


def test_little_space_is_said_before_installing(clone: Clone) -> None:
    result, _ = clone.run("setup", DISK_FULL="1")
    assert "less than 10 GB free" in result.stderr
    assert result.returncode == 0


def test_the_exit_code_of_a_stopped_training_comes_through(clone: Clone) -> None:
    result, asked = clone.run(TRAINING_EXITS="130")
    assert (result.returncode, asked[-1]) == (130, SAMPLE_RUN)
    assert "Next" not in result.stdout
