"""Who may import whom, and that an import does nothing."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "backend"
FORBIDDEN_NAMES = {"utils", "common", "helpers", "trainer", "misc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(BACKEND).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for pattern in ("*.py", "app/**/*.py", "training/**/*.py")
    for path in BACKEND.glob(pattern)
}

PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@cache
def named(name: str) -> frozenset[str]:
    """Everything that a module imports, inside functions too: modules, and names in them."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(found)


def imports(name: str) -> frozenset[str]:
    """The modules of ours that a module imports."""
    return (named(name) & MODULES.keys()) - PACKAGES


def within(package: str) -> list[str]:
    return [name for name in MODULES if name == package or name.startswith(f"{package}.")]


def test_there_is_something_to_check() -> None:
    assert {
        "train_model",
        "app.ml.model",
        "training.compute.features",
        "training.data.loader",
    } <= set(MODULES)
    assert {"app.ml.artifacts", "app.ml.model"} <= imports("app.ml.predictor")
    assert "training.run.mlflow_sync" in imports("training.commands.cli")


# Who may import whom: a row may import the rows that it names, itself and, in training, app.ml.
BELOW = {"training.errors", "training.shell", "training.uris", "training.config"}
FLOORS = {
    "training.errors": set(),
    "training.shell": set(),
    "training.uris": set(),
    "training.config": {"training.errors", "training.uris"},
    "training.sample": set(),
    "training.data": BELOW,
    "training.compute": BELOW | {"training.data"},
    "training.run": BELOW | {"training.data", "training.compute"},
    "training.release": BELOW | {"training.data", "training.compute"},
    "training.commands": BELOW
    | {"training.data", "training.compute", "training.run", "training.release"},
    "app.ml.class_names": set(),
    "app.ml.drift": set(),
    "app.ml.forms": set(),
    "app.ml.machine": set(),
    "app.ml.timm_networks": set(),
    "app.ml.model": {"app.ml.timm_networks"},
    "app.ml.containers": set(),
    "app.ml.jpeg": {"app.ml.containers"},
    "app.ml.heif": {"app.ml.containers"},
    "app.ml.images": {"app.ml.containers", "app.ml.heif", "app.ml.jpeg"},
    "app.ml.preprocessing": {"app.ml.containers", "app.ml.images"},
    "app.ml.durable": set(),
    "app.ml.artifacts": {"app.ml.durable", "app.ml.forms", "app.ml.model", "app.ml.preprocessing"},
    "app.ml.predictor": {
        "app.ml.artifacts",
        "app.ml.drift",
        "app.ml.forms",
        "app.ml.machine",
        "app.ml.model",
        "app.ml.preprocessing",
    },
    "app.ml.pyfunc": {"app.ml.machine", "app.ml.predictor", "app.ml.preprocessing"},
    "app.ml.activation": {
        "app.ml.artifacts",
        "app.ml.model",
        "app.ml.predictor",
        "app.ml.preprocessing",
    },
    "app.settings": {"app.ml.forms", "app.ml.machine"},
    "app.schemas": {"app.ml.forms", "app.nutrition"},
    "app.nutrition": set(),
}


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_one_way(room: str) -> None:
    rooms = FLOORS[room] | {room}
    if room.startswith("training.") and room not in ("training.errors", "training.sample"):
        rooms = rooms | {"app.ml"}
    allowed = {name for allowed_room in rooms for name in within(allowed_room)}
    for name in within(room):
        assert imports(name) <= allowed, f"{name} imports {sorted(imports(name) - allowed)}"


def test_every_module_of_training_stands_on_a_floor() -> None:
    on_floors = {name for room in FLOORS for name in within(room)}
    assert set(within("training")) - on_floors == {"training"}


def test_the_shared_core_imports_nothing_outside_itself() -> None:
    for name in within("app.ml"):
        assert imports(name) <= set(within("app.ml")), name


def test_the_server_never_imports_training() -> None:
    for name in within("app"):
        assert imports(name) <= set(within("app")), name


def test_the_server_imports_no_library_of_training() -> None:
    libraries = {"mlflow", "matplotlib", "seaborn", "sklearn", "tqdm"}
    for name in within("app"):
        assert not {imported.split(".")[0] for imported in named(name)} & libraries, name


def test_training_imports_the_core_and_itself_only() -> None:
    allowed = set(within("app.ml")) | set(within("training"))
    for name in within("training"):
        assert imports(name) <= allowed, name


def test_nothing_imports_the_script() -> None:
    assert not [name for name in MODULES if "train_model" in imports(name)]


def test_no_imports_go_in_circles() -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in imports(name):
                visit(other, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in MODULES:
        visit(name, ())


def test_every_file_is_named_after_what_is_in_it() -> None:
    names = {path.stem for folder in (BACKEND, ROOT / "tests") for path in folder.rglob("*.py")}
    assert not names & FORBIDDEN_NAMES


# What an import does --------------------------------------------------------------------------


def in_fresh_process(code: str, cwd: Path) -> str:
    """What the code prints; also run where nothing can be found by the current folder."""
    program = f"import sys; sys.path.insert(0, {str(BACKEND)!r})\n{code}"
    command = [sys.executable, "-W", "error", "-B", "-c", program]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


# tqdm is not here as PyTorch itself imports it.
NOT_AT_IMPORT = {"mlflow", "matplotlib", "seaborn", "sklearn", "training", "timm", "onnxruntime"}
NOT_AT_IMPORT |= {"pandas"}
# Imported first and in this order, each with what is not there yet once it is.
ABSENT = {
    "app.ml.predictor": NOT_AT_IMPORT | {"fastapi", "pydantic", "app.settings"},
    "app.main": NOT_AT_IMPORT,
}
IMPORT_ALL = """
import importlib, json, logging, signal, threading, warnings
import numpy as np, torch
def state():
    root = logging.getLogger()
    return {
        "handlers": len(root.handlers), "level": root.level,
        "own handlers": [n for n, l in logging.root.manager.loggerDict.items()
                         if n.split(".")[0] in ("app", "training", "nutrilearn") and
                         (getattr(l, "handlers", []) or getattr(l, "level", 0))],
        "threads": torch.get_num_threads(), "alive": threading.active_count(),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "random": [int(np.random.get_state()[1][0]), torch.get_rng_state().sum().item()],
        "grad": torch.is_grad_enabled(), "cuda": torch.cuda.is_initialized(),
        "dtype": str(torch.get_default_dtype()),
    }
np.random.seed(1); torch.manual_seed(1)
before, present = state(), {}
for name in NAMES:
    importlib.import_module(name)
    present[name] = sorted(sys.modules)
print(json.dumps([before, state(), present]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, list[str]]]:
    """The state of a fresh process before and after all imports; what each one had brought in."""
    folder = tmp_path_factory.mktemp("empty")
    rest = sorted(MODULES.keys() - ABSENT.keys())
    before, after, present = json.loads(
        in_fresh_process(IMPORT_ALL.replace("NAMES", repr([*ABSENT, *rest])), folder)
    )
    assert not list(folder.iterdir())
    return before, after, present


@pytest.mark.slow
def test_importing_any_module_does_nothing(imported: tuple[Any, Any, object]) -> None:
    """No file, no log set-up, no thread, no signal, no randomness, no GPU."""
    before, after, _ = imported
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSENT)
def test_serving_pulls_in_what_it_needs(
    name: str, imported: tuple[object, object, dict[str, list[str]]]
) -> None:
    assert ABSENT[name].isdisjoint(imported[2][name])


@pytest.mark.slow
def test_importing_needs_no_temporary_folder(tmp_path: Path) -> None:
    """A container may be read-only from top to bottom."""
    nowhere = "import os, tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/none']"
    fresh = "os.environ.pop('TORCHINDUCTOR_CACHE_DIR', None)"  # set by the torch of this process
    code = f"{nowhere}\n{fresh}\nimport app.main, train_model; print('imported')"
    assert in_fresh_process(code, tmp_path).strip() == "imported"


def test_drawing_needs_no_pytorch(tmp_path: Path) -> None:
    """Several processes import it, each to draw its share in a few seconds."""
    code = "import training.sample.generate; print('torch' in sys.modules)"
    assert in_fresh_process(code, tmp_path).strip() == "False"
