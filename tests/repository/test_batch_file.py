"""train_quick_start.bat: run in Wine's cmd where there is one, and held against the .sh.

The stand-in for python.exe notes the command line that it was called with. It is pip's own launcher
for console scripts, which starts what its shebang names, here a batch file, with that command line.
"""

import io
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_RUN = "--sample --model_name efficientnet_lite0 --epochs 8"
FOOD101_RUN = "--epochs 20 --model_name mobilenet_v2"
TRAIN = r'PYTHON "backend\train_model.py"'

# %1 is the stand-in itself. The launcher py gets the version that is wanted in front of the rest.
STAND_IN = r"""@echo off
>>"{log}" echo(%*
if not "%~n1"=="py" goto python
if not "%~2"=="-3.12" exit /b 1
shift
:python
if "%~2 %~3"=="-c import sys; sys.exit(sys.version_info < (3, 15))" exit /b 1
if "%~2"=="-c" exit /b 0%TOO_OLD%
if "%~3"=="pip" exit /b 0%PIP_FAILS%
if not "%~3"=="venv" exit /b 0%TRAINING_EXITS%
md "{venv}\Scripts"
copy "{program}" "{venv}\Scripts\python.exe" >nul
exit /b 0%VENV_FAILS%
"""


def in_wine(path: Path) -> str:
    return "Z:" + str(path).replace("/", "\\")


def stand_in(folder: Path, log: Path, venv: Path) -> Path:
    """A python.exe that notes in the log how it was called."""
    launchers = Path(next(iter(find_spec("pip._vendor.distlib").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    program, batch = folder / "stand_in.exe", folder / "stand_in.bat"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("__main__.py", "")
    shebang = f"#!cmd.exe /c {in_wine(batch)}\r\n".encode()
    program.write_bytes((launchers / "t64.exe").read_bytes() + shebang + archive.getvalue())
    names = {"log": log, "program": program, "venv": venv}
    quoted = {name: in_wine(path).replace("%", "%%") for name, path in names.items()}
    batch.write_text(STAND_IN.format(**quoted), newline="\r\n", encoding="cp850")
    return program


# In Wine -----------------------------------------------------------------------------------------


class WindowsClone:
    """A fresh clone on drive Z:, with stand-ins for Python on the path."""

    def __init__(self, folder: Path, name: str, prefix: Path) -> None:
        self.root, self.log, self.prefix = folder / name, folder / "log", prefix
        self.programs = folder / "programs"
        for path in (
            "backend/train_model.py",
            "backend/requirements.txt",
            "tests/requirements.txt",
        ):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text("torch\n")
        shutil.copy(ROOT / "train_quick_start.bat", self.root)
        meta = self.root / "data" / "sample" / "food-101" / "meta"
        meta.mkdir(parents=True)
        (meta / "test.txt").write_text("samosa/7\nsamosa/8\n")
        self.programs.mkdir()
        self.program = stand_in(folder, self.log, self.root / ".venv")
        self.put_on_path("python")

    def put_on_path(self, name: str) -> None:
        shutil.copy(self.program, self.programs / f"{name}.exe")

    def run(self, typed: str = "", **environment: str) -> tuple[int, str, list[str]]:
        """Run the command in the clone: its exit code, its output, and how Python was called."""
        self.log.write_text("")
        command = f"train_quick_start.bat {typed}".replace("%", "%%")  # as if typed at the prompt
        (self.root / "typed.bat").write_text(f"@{command}\r\n")
        result = subprocess.run(
            ["wine", "cmd", "/c", "typed.bat"],
            stdin=subprocess.DEVNULL,
            cwd=self.root,
            env={**os.environ, **wine_environment(self.prefix), **environment}
            | {"WINEPATH": in_wine(self.programs)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
        return result.returncode, result.stdout + result.stderr, self.calls()

    def calls(self) -> list[str]:
        """The command lines, without the checks, with the paths of the clone shortened."""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("(", "")
        ours = {
            f'"{in_wine(self.root)}\\.venv\\Scripts\\python.exe"': "PYTHON",
            f'"{in_wine(self.programs)}\\': '"',
            f"{in_wine(self.root)}\\": "",
        }
        for theirs, short in ours.items():
            text = text.replace(theirs, short)
        return [line.rstrip() for line in text.splitlines() if " -c " not in line]


def wine_environment(prefix: Path) -> dict[str, str]:
    return {
        "WINEPREFIX": str(prefix),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree=;mshtml=",
        "LC_ALL": "C.UTF-8",
    }


@pytest.fixture(scope="session")
def wine_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wine = shutil.which("wine")
    version = wine and subprocess.run([wine, "--version"], capture_output=True, text=True).stdout
    if not re.match(r"wine-\d\d", version or ""):
        pytest.skip("needs wine 10 or newer, whose cmd runs the batch file")
    prefix = tmp_path_factory.mktemp("wine")
    environment = {**os.environ, **wine_environment(prefix)}
    subprocess.run(["wine", "cmd", "/c", "exit"], env=environment, capture_output=True, timeout=180)
    return prefix


MakeClone = Callable[[str], WindowsClone]


@pytest.fixture
def make_clone(tmp_path: Path, wine_prefix: Path) -> MakeClone:
    return lambda name: WindowsClone(tmp_path, name, wine_prefix)


def install_of(path: str) -> str:
    return f'PYTHON -m pip install --disable-pip-version-check -r "{path}"'


@pytest.mark.slow
def test_a_first_run_in_wine_does_everything(make_clone: MakeClone) -> None:
    clone = make_clone("a clone")
    code, output, calls = clone.run()
    picture = r"data\sample\food-101\images\samosa/7.jpg"
    assert (code, calls) == (
        0,
        [
            '"python.exe" -m venv ".venv"',
            install_of(r"backend\requirements.txt"),
            f"{TRAIN} {SAMPLE_RUN}",
            f'{TRAIN} --predict "{picture}"',
        ],
    ), output
    assert "train_quick_start.bat food101" in output
    assert not (clone.root / ".venv" / "unfinished").exists()


@pytest.mark.slow
def test_arguments_arrive_in_wine_as_they_were_typed(make_clone: MakeClone) -> None:
    clone = make_clone("a clone")
    typed = r'--data_dir "C:\R&D\my photos" --classes a,b "x|y" "<z>" "50%" "p^q!"'
    code, output, calls = clone.run(typed)
    assert (code, calls[-1]) == (0, f"{TRAIN} {SAMPLE_RUN} {typed}"), output
    code, output, calls = clone.run(f"food101 {typed}")
    assert (code, calls[-1]) == (0, f"{TRAIN} {FOOD101_RUN}  {typed}"), output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["R&D 100% (x)", "q%PATH%q", "^! it's", "Jürgen Müller"])
def test_any_folder_will_do_in_wine(make_clone: MakeClone, name: str) -> None:
    """Wine itself replaces %PATH% in the log, so only the steps are compared."""
    clone = make_clone(name)
    code, output, calls = clone.run("--epochs 1")
    steps = ("-m venv", "-m pip install", f"{SAMPLE_RUN} --epochs 1")
    assert code == 0 and len(calls) == len(steps), output
    assert all(step in call for step, call in zip(steps, calls, strict=True))
    assert (clone.root / ".venv" / "Scripts" / "python.exe").is_file()


@pytest.mark.slow
def test_a_python_of_ones_own_may_be_set_with_quotes_in_wine(make_clone: MakeClone) -> None:
    clone = make_clone("a clone")
    (clone.programs / "python.exe").rename(clone.programs / "my own.exe")
    path = in_wine(clone.programs / "my own.exe")
    for value in (path, f'"{path}"'):
        code, output, calls = clone.run("setup", PYTHON=value)
        assert (code, calls[0]) == (0, '"my own.exe" -m venv ".venv"'), output
        shutil.rmtree(clone.root / ".venv")


@pytest.mark.slow
def test_the_launcher_is_asked_for_a_python_that_suits_in_wine(make_clone: MakeClone) -> None:
    clone = make_clone("a clone")
    clone.put_on_path("py")
    code, output, calls = clone.run("setup")
    assert (code, calls[0]) == (0, '"py.exe" -3.12 -m venv ".venv"'), output


@pytest.mark.slow
def test_an_environment_that_was_cut_off_is_made_again_in_wine(make_clone: MakeClone) -> None:
    clone = make_clone("a clone")
    (clone.root / ".venv").mkdir()
    code, output, calls = clone.run("setup")
    assert (code, calls) == (1, []) and "no working 64-bit Python" in output
    (clone.root / ".venv" / "unfinished").touch()
    code, output, calls = clone.run("setup")
    assert (code, len(calls)) == (0, 2), output


@pytest.mark.slow
def test_failures_end_it_in_wine(make_clone: MakeClone) -> None:
    clone = make_clone("a clone")
    code, output, calls = clone.run(TOO_OLD="1")
    assert (code, calls) == (1, []) and "a 64-bit Python 3.10 to 3.14 is needed" in output
    code, output, calls = clone.run(VENV_FAILS="1")
    assert code == 1 and not (clone.root / ".venv").exists(), output
    code, output, calls = clone.run(PIP_FAILS="1")
    assert (code, len(calls)) == (1, 2) and "installing failed" in output
    code, output, calls = clone.run(TRAINING_EXITS="130")
    assert (code, len(calls)) == (130, 2) and "Next" not in output
    code, output, calls = clone.run("food102")
    assert (code, calls) == (2, []) and "food101" in output


# Held against the shell script ----------------------------------------------------------------

SHELL_SPELLING = {
    '"$venv_python" "$root/backend/train_model.py"': "train",
    '"$venv_python"': "PYTHON",
    '"$root/.venv"': "VENV",
    '"$root/$1"': "LIST",
    '"$picture"': "PICTURE",
    ' "${@:2}"': " OTHERS",
    ' "$@"': " ALL",
}
BATCH_SPELLING = {
    "\r\n": "\n",
    "\\": "/",
    "^&": "&",
    '"%venv_python%" "%root%backend/train_model.py"': "train",
    '"%venv_python%"': "PYTHON",
    '"%root%.venv"': "VENV",
    '"%root%%list%"': "LIST",
    '"%sample%/images/%picture%.jpg"': "PICTURE",
    " %rest:*food101=%": " OTHERS",
    " %*": " ALL",
    ".venv/Scripts/": ".venv/bin/",
    "train_quick_start.bat": "./train_quick_start.sh",
    "echo.": "echo ",
}


def read_script(name: str, spelling: dict[str, str]) -> str:
    text = (ROOT / name).read_bytes().decode("ascii")
    for theirs, ours in spelling.items():
        text = text.replace(theirs, ours)
    return text


def steps(text: str) -> dict[str, list[str]]:
    """What a script asks of Python, in order and in one spelling."""
    return {
        "environment": re.findall(r"(-m venv VENV)", text),
        "installs": re.findall(r"PYTHON -m (pip install .*? LIST)", text),
        "lists": re.findall(r"(backend/requirements\S+?)\b", text),
        "trains": sorted(re.findall(r"^ *train (--(?!help).*?)(?: \|\|.*)?$", text, re.M)),
    }


def python_checks(text: str) -> set[str]:
    return set(re.findall(r"-c \"(.+?)\"(?: |$)", text, re.M)) | set(
        re.findall(r"-c '(.+?)'", text)
    )


def test_the_batch_file_takes_the_same_steps() -> None:
    shell = steps(read_script("train_quick_start.sh", SHELL_SPELLING))
    assert all(shell.values())
    assert steps(read_script("train_quick_start.bat", BATCH_SPELLING)) == shell


def test_the_batch_file_makes_the_same_checks() -> None:
    """But for those of Macs and Debian, and for the space that CUDA takes on Linux."""
    shell = python_checks(read_script("train_quick_start.sh", SHELL_SPELLING))
    batch = python_checks(read_script("train_quick_start.bat", BATCH_SPELLING))
    (space,) = batch - shell
    assert "disk_usage" in space
    only_shell = shell - batch
    for word in ("darwin", "ensurepip", "-venv", "disk_usage"):
        assert any(word in check for check in only_shell), only_shell
    assert len(only_shell) == 4 and len(batch) == 4


def test_the_batch_file_knows_the_same_modes() -> None:
    shell = read_script("train_quick_start.sh", SHELL_SPELLING)
    batch = read_script("train_quick_start.bat", BATCH_SPELLING)
    patterns = re.findall(r"^  ([-\w |]+)\)$", shell.partition('case "${1:-}" in')[2], re.M)
    modes = {mode for pattern in patterns for mode in pattern.split(" | ")}
    assert modes == {"-h", "--help", "help", "setup", "food101"}
    assert set(re.findall(r'"%mode%"=="([^"]+)" goto', batch)) == modes


def test_the_batch_file_says_the_same() -> None:
    shell = read_script("train_quick_start.sh", SHELL_SPELLING)
    said = "".join(re.findall(r"<<'TEXT'\n(.*?)TEXT\n", shell, re.S))
    batch = read_script("train_quick_start.bat", BATCH_SPELLING)
    for line in said.splitlines():
        assert f"\necho {line}\n" in batch


def test_the_batch_file_is_one_that_cmd_reads_well() -> None:
    data = (ROOT / "train_quick_start.bat").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n")  # cmd can miss labels behind a bare newline
    text = data.decode("ascii")
    called = set(re.findall(r"(?:goto|call :)(?:\s*)(\w+)", text))
    assert called == set(re.findall(r"^:(\w+)", text, re.M))
