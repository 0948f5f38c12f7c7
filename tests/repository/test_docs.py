"""README, guide and docs/ are held against the code: commands, flags, settings, codes and links."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
from torch.distributed.run import get_args_parser
from uvicorn.importer import import_from_string
from uvicorn.main import main as uvicorn_command

from app.errors import ERRORS
from app.main import create_app
from app.ml import artifacts
from app.ml.model import BACKBONES, build_model
from app.settings import ENV_PREFIX, Settings
from training.commands.cli import check_options, make_cli
from training.config import REPOSITORY, config_from_args
from training.data import manifest
from training.run import checkpoints, history, mlflow_mirror, resume
from training.sample import generate as sample_food

README, GUIDE = REPOSITORY / "README.md", REPOSITORY / "MODEL_TRAINING_GUIDE.md"
FORMATS = REPOSITORY / "docs" / "formats.md"
SERVING = REPOSITORY / "docs" / "serving.md"
DOCS = [
    README,
    GUIDE,
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "ml-models" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
VERBATIM = {  # commands that only make sense in the shell that runs them
    "source .venv/bin/activate",
    r".venv\Scripts\activate",
}


# Commands --------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A line of a sh or bat block; folder: where it runs, after the block's cd."""

    document: str
    folder: Path
    line: str


def commands() -> Iterator[Command]:
    """The lines of the sh blocks, continued ones joined, without comments and cd."""
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:sh|bat)\n(.*?)^```", text, re.M | re.S):
            folder = REPOSITORY
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split(" # ")[0].strip().split(" && "):
                    if command.startswith("cd "):
                        folder /= command.removeprefix("cd ")
                        assert folder.is_dir(), f"{path.name}: {command}"
                    elif command:
                        yield Command(path.name, folder, command)


def check_training(arguments: list[str]) -> None:
    options = make_cli(None).parse_args(arguments)
    config_from_args(options)
    check_options(options)


def check_script(command: Command) -> None:
    """A python or torchrun command line; a script of ours reads its flags as it would."""
    words = shlex.split(command.line.replace("\\", "/"))[1:]
    if command.line.startswith("torchrun "):
        run = get_args_parser().parse_args(words)
        words = [run.training_script, *run.training_script_args]
    if words[0] == "-m":
        script = REPOSITORY / f"{words[1].replace('.', '/')}.py"
        words = words[1:]
    else:
        script = command.folder / words[0]
    assert script.is_file()
    if script.name == "train_model.py":
        check_training(words[1:])
        return
    shown = help_of(script)
    for word in words[1:]:
        assert not word.startswith("--") or re.search(rf"{word}\b", shown), f"{word}: {shown}"


@cache
def help_of(script: Path) -> str:
    """What --help prints; a script that cannot be imported fails here."""
    command = [sys.executable, str(script), "--help"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'backend'}"}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def check_quick_start(command: Command) -> None:
    mode, *rest = (*shlex.split(command.line)[1:], "")
    if mode == "setup":
        assert not rest[:-1] or (REPOSITORY / rest[0]).is_file()
    elif mode == "food101":
        check_training(rest[:-1])
    elif mode:
        check_training([mode, *rest[:-1]])


def check_bash(command: Command) -> None:
    script, *arguments = shlex.split(command.line)[1:]
    subprocess.run(["bash", "-n", command.folder / script], check=True)
    if "-m" in arguments:
        text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        assert f'"{arguments[-1].removeprefix("not ")}: ' in text  # a marker that there is


def check_uvicorn(command: Command) -> None:
    words = shlex.split(command.line)[1:]
    parsed = uvicorn_command.make_context("uvicorn", words).params
    import_from_string(parsed["app"])


def check_mlflow(command: Command) -> None:
    from mlflow.cli import cli  # takes seconds

    words = shlex.split(command.line)
    name, *words = [word for word in words if not word.startswith("MLFLOW_")]
    called: click.Command | None = cli
    while isinstance(called, click.Group):
        name, *words = words
        called = called.get_command(click.Context(called), name)
    assert called
    called.make_context(name, words)


def check_curl(command: Command) -> None:
    """The path is one of the API's, under this method, with these form fields."""
    words = shlex.split(command.line)
    _, _, path = words[-1].partition("http://127.0.0.1:8000")
    operations = create_app().openapi()["paths"][path.partition("?")[0]]
    assert ("post" if {"-F", "-X", "--data-binary"} & set(words) else "get") in operations


def check_docker(command: Command) -> None:
    words = shlex.split(command.line)
    file = {"build": "Dockerfile", "compose": "compose.yaml", "run": "Dockerfile"}[words[1]]
    assert (command.folder / file).is_file()


def check_export(command: Command) -> None:
    name, _, value = command.line.removeprefix("export ").partition("=")
    assert name.removeprefix(ENV_PREFIX).lower() in Settings.model_fields and value


CHECKS: dict[str, Callable[[Command], None]] = {
    r"(python|torchrun) ": check_script,
    r"(\./)?train_quick_start\.(sh|bat)": check_quick_start,
    r"bash ": check_bash,
    r"(MLFLOW_\w+=\S+ )?(\S+/)?mlflow ": check_mlflow,
    r"(\S+/)?uvicorn ": check_uvicorn,
    r"curl ": check_curl,
    r"docker ": check_docker,
    r"export ": check_export,
}
SLOW = r"python (benchmarks/|-m )|(MLFLOW_\S+ )?\S*mlflow "


def all_commands() -> list[object]:
    """Each command once, as a parameter; those whose check takes seconds are marked."""
    return [
        pytest.param(
            command,
            id=f"{command.document}: {command.line}",
            marks=[pytest.mark.slow] if re.match(SLOW, command.line) else [],
        )
        for command in sorted(set(commands()))
    ]


@pytest.mark.filterwarnings("default")  # of the libraries that the commands belong to
@pytest.mark.parametrize("command", all_commands())
def test_every_command_is_one_that_works(command: Command) -> None:
    if command.line in VERBATIM:
        return
    checks = [check for pattern, check in CHECKS.items() if re.match(pattern, command.line)]
    assert len(checks) == 1, f"{len(checks)} checks for {command.line!r}"
    checks[0](command)


def test_each_kind_of_command_is_shown_somewhere() -> None:
    shown = [command.line for command in commands()]
    assert [p for p in CHECKS if not any(re.match(p, line) for line in shown)] == []
    assert set(shown) >= VERBATIM


def test_tests_that_are_named_are_there() -> None:
    """`tests/test_faults.py -k "reader or published"` and the like."""
    for path in DOCS:
        for file, words in re.findall(
            r"`(tests/[\w/.]+\.py)(?: -k \"?([\w ]+)\"?)?`", path.read_text(encoding="utf-8")
        ):
            names = re.findall(r"def (test_\w+)", (REPOSITORY / file).read_text(encoding="utf-8"))
            for word in words.split(" or "):
                assert any(word in name for name in names), f"{path.name}: {file} -k {word}"


# Tables ---------------------------------------------------------------------------------------


def table_rows(path: Path, first_cell: str) -> list[list[str]]:
    """The rows, as cells, whose first cell matches."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("&#124;", "|") for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and re.fullmatch(first_cell, cells[0]):
            rows.append(cells)
    return rows


def flag_rows() -> list[list[str]]:
    """Flag and value, default, what it does and what is allowed, from the parser's own help."""
    rows = []
    for action in make_cli(None)._actions[1:]:  # --help comes first
        what = (action.help or "").replace("%%", "%")
        told = re.search(r" \((?:default: (.*?)(?:; (.*))?|(\d+))\)$", what)
        default = "off" if action.nargs == 0 else "none"
        if told:
            what, default = what[: told.start()], told[1] or told[3]
            if told[2] and not told[2].endswith("that is not empty"):
                what += f"; {told[2]}"
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        many = {"+": "…", 2: f"{value}"}.get(action.nargs or 0, "")
        shown = default if default == "off" or default == "none" else f"`{default}`"
        rows.append([f"`{action.option_strings[0]}{value}{many}`", shown, what])
    return rows


def test_every_flag_has_its_row() -> None:
    assert table_rows(GUIDE, r"`--\w+( [A-Z_…]+)*`") == flag_rows()


def test_every_server_setting_has_its_row_with_its_default() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_rows(SERVING, rf"`{ENV_PREFIX}\w+`")}
    assert set(rows) == {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        shown = rows[f"{ENV_PREFIX}{name.upper()}"]
        if isinstance(field.default, (int, float)) and field.default:
            assert shown.startswith(f"`{field.default}`")


def test_every_backbone_has_its_row() -> None:
    rows = table_rows(GUIDE, rf"`({'|'.join(BACKBONES)})`")
    shown = []
    for name, spec in BACKBONES.items():
        with torch.device("meta"):  # without weights
            model = build_model(name, 101)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        shown.append([f"`{name}`", str(len(spec.layers(model))), f"{millions:.1f} M"])
    assert [row[:3] for row in rows] == shown


def test_every_requirement_has_its_row() -> None:
    required = set()
    for path in ("backend/requirements.txt", "tests/requirements.txt"):
        text = (REPOSITORY / path).read_text()
        required |= set(re.findall(r"^([A-Za-z][\w.-]*)", text, re.M))
    rows = table_rows(README, r"`[a-z][\w-]+`(, `[a-z][\w-]+`)*")
    documented = [name for row in rows for name in re.findall(r"`([\w-]+)`", row[0])]
    assert sorted(documented) == sorted(required)


def test_every_door_leads_to_what_it_names() -> None:
    """`NAME` in a cell of "which door" is in the file that the cell names."""
    cells = [cell for row in table_rows(README, r"an? .*") for cell in row[1:]]
    doors = [cell for cell in cells if "`backend/" in cell]
    assert len(doors) > 8
    for door in doors:
        words = re.findall(r"`([^`]+)`", door)
        (file,) = [word for word in words if "/" in word]
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        assert [word for word in words if word != file and word not in text] == [], door


def test_every_error_has_its_row() -> None:
    rows = table_rows(SERVING, r"\d{3}")
    assert sorted((int(row[0]), row[1].strip("`")) for row in rows) == sorted(
        (status, code) for code, (status, _) in ERRORS.items()
    )


def test_every_file_of_a_run_has_its_row() -> None:
    shown = " ".join(row[0] for row in table_rows(FORMATS, r"`RUN/.*"))
    names = {manifest.MANIFEST_NAME, history.RECORD_NAME, resume.FINISHED_NAME}
    assert [name for name in names | {mlflow_mirror.LOG_NAME} if name not in shown] == []


# Versions --------------------------------------------------------------------------------------


def test_the_same_pythons_are_named_everywhere() -> None:
    """The lowest is `requires-python`, the newest the last that .ci/resolve looks up."""
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    lowest = re.findall(r'^requires-python = ">=(3\.\d+)"$', project, re.M)
    assert lowest == re.findall(r'^python_version = "(.*)"$', project, re.M)
    looked_up = re.search(r"^pythons=\((.*)\)$", (REPOSITORY / ".ci" / "resolve").read_text(), re.M)
    assert looked_up
    minors = [int(version.removeprefix("3.")) for version in looked_up[1].split()]
    assert minors == list(range(int(lowest[0].removeprefix("3.")), minors[-1] + 1))
    for name in (
        "README.md",
        "MODEL_TRAINING_GUIDE.md",
        "train_quick_start.sh",
        "train_quick_start.bat",
    ):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert f"3.{minors[0]} to 3.{minors[-1]}" in text, name
        for low, high in re.findall(r"sys\.version_info < \(3, (\d+)\)( or)?", text):
            assert int(low) == (minors[0] if high else minors[-1] + 1), name


def test_the_version_is_the_newest_of_the_changelog() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.M)
    newest = re.search(r"^## (\d+\.\d+\.\d+) ", changes, re.M)
    assert version and newest and version[1] == newest[1]


# Links and manners ----------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that Git hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.parent.name + "/" + path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.parent.name + "/" + path.name)
def test_no_path_of_one_machine_and_no_package_index_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert (
        re.findall(r"(?<![\w.])/(?:tmp|home|root|work|Users)/\S*|\bpypi\.\w+|/simple/?\b", text)
        == []
    )


BRITISH = re.compile(
    r"\b(colour|grey|behaviour|neighbour|favour|centre|learnt|spelt|misspelt|mould)|"
    r"\b(normal|recogn|optim|organ|initial|summar)is(e|ing|ation)|\d %"
)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.parent.name + "/" + path.name)
def test_spelling_is_american(path: Path) -> None:
    found = [match[0] for match in BRITISH.finditer(path.read_text(encoding="utf-8").lower())]
    assert found == []


def test_files_that_are_named_exist() -> None:
    """`backend/train_model.py` and the like, in running text and tables."""
    roots = ("backend/", "tests/", "benchmarks/", "docs/", ".ci/")
    for path in DOCS:
        for name in re.findall(
            r"`([\w.-]+/[\w./-]*[\w-]+\.\w+)`", path.read_text(encoding="utf-8")
        ):
            if name.startswith(roots):
                assert (REPOSITORY / name).exists(), f"{path.name} names {name}"


def test_the_newest_change_is_dated_and_states_the_formats() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)$", text, re.M)
    formats = f"model record {artifacts.FORMAT_VERSION}, checkpoint {checkpoints.FORMAT_VERSION}"
    assert f"File formats: {formats}, drawn sample {sample_food.FORMAT}." in text
