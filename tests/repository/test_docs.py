"""README and guide are held against the code: commands, flags, settings, messages and links.

PYTHONPATH=backend python tests/test_docs.py    every documented command, and what checks it
"""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from app.ml import artifacts
from app.ml.model import BACKBONES, build_model
from app.settings import ENV_PREFIX, Settings
from train_model import make_cli
from training.config import REPOSITORY, config_from_args
from training.run import checkpoints
from training.sample import generate as sample_food

README, GUIDE = REPOSITORY / "README.md", REPOSITORY / "MODEL_TRAINING_GUIDE.md"
DOCS = [README, GUIDE, REPOSITORY / "CHANGELOG.md", REPOSITORY / "ml-models" / "README.md"]
QUICK_START_MODES = {"food101", "setup", "--help"}

# Commands that are not training commands, and what holds them. The first match counts.
CHECKED_ELSEWHERE = {
    r"bash tests/run\.sh": "runs these tests",
    r"bash \.ci/run": "is what continuous integration runs",
    r"\.venv/bin/ruff (check|format --check) \.": "run by .ci/run",
    r"\.venv/bin/mypy": "run by .ci/run",
    r"PYTHONPATH=backend python tests/test_docs\.py": "test_the_list_of_commands_is_complete",
    r"(\.venv/bin/)?mlflow (ui|server) ": "test_notebook starts the same server",
    r"(\.\./\.venv/bin/)?uvicorn app\.main:app": "test_api runs the same application",
    r"curl ": "test_api sends the same requests",
    r"docker ": "not run: there is no Docker daemon here; test_container holds the files it reads",
    r"python -m tests\.torture\.": "not run: takes minutes; test_training kills such runs too",
    r"python benchmarks/": "not run: too slow for a test; the script is there",
    r"cd [\w-]+$": "not run: goes into a folder",
    r"source \.venv/bin/activate|\.venv\\Scripts\\activate": "not run: changes its own shell",
}
# Training commands that a test runs as they are; of all others the flags and values are parsed.
RUN_BY = {
    r"\./train_quick_start\.sh( (food101|setup).*)?$": "run by test_quick_start, with stand-ins; "
    "for real by .ci/run, with --dry_run",
    r"train_quick_start\.bat": "parsed by test_quick_start, step for step against the .sh",
}


def fences(path: Path, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in blocks if language in languages]


def commands() -> Iterator[tuple[str, str]]:
    """(document, command): the lines of the sh blocks, continued ones joined, without comments."""
    for path in DOCS:
        for block in fences(path, "sh", "bat"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(r" && ", line.split(" # ")[0].strip()):
                    if command and not command.startswith(("#", "rem ")):
                        yield path.name, command


def training_arguments(command: str) -> list[str] | None:
    """The arguments of train_model.py, however it is called; None if it is not."""
    words = shlex.split(command)
    names = [word.replace("\\", "/").rpartition("/")[2] for word in words]
    if "train_model.py" in names:
        return words[names.index("train_model.py") + 1 :]
    if names[0] in ("train_quick_start.sh", "train_quick_start.bat"):
        mode, *flags = words[1:] or [""]
        if mode in QUICK_START_MODES:
            return flags if mode == "food101" else []
        return words[1:]
    return None


def held_by(command: str) -> str | None:
    """What checks a command of the documents, in words; None if nothing does."""
    arguments = training_arguments(command.replace("\\", "/"))
    if arguments is None:
        return next((how for p, how in CHECKED_ELSEWHERE.items() if re.match(p, command)), None)
    config_from_args(make_cli().parse_args(arguments))
    parsed = "its flags and values are parsed as the script does"
    return next((how for p, how in RUN_BY.items() if re.match(p, command)), parsed)


@pytest.mark.parametrize(("document", "command"), sorted(set(commands())))
def test_every_command_is_checked(document: str, command: str) -> None:
    assert held_by(command), f"{document}: nothing checks {command!r}"
    for word in shlex.split(command):
        if word.startswith(("benchmarks/", "tests/")):
            assert (REPOSITORY / word).is_file()


def test_no_check_is_left_over() -> None:
    shown = [command for _, command in commands()]
    unused = [
        pattern
        for pattern in CHECKED_ELSEWHERE | RUN_BY
        if not any(re.match(pattern, command) for command in shown)
    ]
    assert unused == []


def test_the_list_of_commands_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    list_commands()
    listed = capsys.readouterr().out
    assert [command for _, command in commands() if command not in listed] == []


def list_commands() -> None:
    """Print every documented command once, under what checks it."""
    by_check: dict[str, dict[str, None]] = {}
    for document, command in commands():
        by_check.setdefault(f"{held_by(command)}", {})[f"  {command}  ({document})"] = None
    for how, shown in by_check.items():
        print(f"{how}:", *shown, sep="\n")  # noqa: T201


# Tables ---------------------------------------------------------------------------------------


def table_rows(path: Path, first_cell: str) -> list[list[str]]:
    """The rows, as cells, whose first cell matches."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("&#124;", "|") for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and re.fullmatch(first_cell, cells[0]):
            rows.append(cells)
    return rows


def test_every_flag_has_its_row_with_its_default() -> None:
    rows = table_rows(GUIDE, r"`--\w+( [A-Z_…]+)?`")
    documented = {row[0].strip("`").split()[0]: row[1].strip("`") for row in rows}
    assert len(documented) == len(rows)
    defaults = {}
    for action in make_cli()._actions[1:]:  # --help comes first
        shown = re.search(r"\(default: (.*?)[;)]|\((\d+)\)$", action.help or "")
        without = "off" if action.nargs == 0 else "none"
        defaults[action.option_strings[0]] = (shown[1] or shown[2]) if shown else without
    assert documented == defaults


def test_every_server_setting_has_its_row_with_its_default() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_rows(GUIDE, rf"`{ENV_PREFIX}\w+`")}
    assert set(rows) == {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        shown = rows[f"{ENV_PREFIX}{name.upper()}"]
        if isinstance(field.default, (int, float)) and field.default:
            assert shown.startswith(f"`{field.default}`")


def test_every_backbone_has_its_row() -> None:
    rows = table_rows(GUIDE, rf"`({'|'.join(BACKBONES)})`")
    shown = []
    for name, spec in BACKBONES.items():
        model = build_model(name, 101)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        shown.append([f"`{name}`", str(len(spec.layers(model))), f"{millions:.1f} M"])
    assert [row[:3] for row in rows] == shown


def test_every_requirement_has_its_row() -> None:
    required = set()
    for path in ("backend/requirements.txt", "tests/requirements.txt"):
        text = (REPOSITORY / path).read_text()
        required |= set(re.findall(r"^([A-Za-z][\w.-]*)", text, re.M))
    documented = [row[0].strip("`") for row in table_rows(README, r"`[a-z][\w-]+`")]
    assert sorted(documented) == sorted(required)


# Messages and names ---------------------------------------------------------------------------


@cache
def literals() -> list[str]:
    """Every string of the backend, with … where a value goes in, and the quick start's text."""
    found = [(REPOSITORY / "train_quick_start.sh").read_text(encoding="utf-8")]
    for path in (REPOSITORY / "backend").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-+.\d]*[sdgf]", "…", node.value).replace("%%", "%"))
    return found


def test_every_quoted_message_is_one_the_code_can_say() -> None:
    rows = table_rows(GUIDE, r"`[^`]*[ ][^`]*`")
    messages = [row[0].strip("`") for row in rows if len(row) == 3 and " " in row[0]]
    messages = [message for message in messages if not message.startswith("--")]
    assert len(messages) > 20
    assert [message for message in messages if not any(message in s for s in literals())] == []


def test_every_error_code_is_in_the_server() -> None:
    codes = re.findall(r"^\| \d{3}[\d, ]* \| (.*?) \|", GUIDE.read_text(encoding="utf-8"), re.M)
    named = {code for cell in codes for code in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 10
    assert [code for code in named if code not in literals()] == []


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


def test_files_that_are_named_exist() -> None:
    """`backend/train_model.py` and the like, in running text and tables."""
    roots = ("backend/", "tests/", "benchmarks/", ".ci/")
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


if __name__ == "__main__":
    list_commands()
