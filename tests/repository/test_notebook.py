"""The notebook, executed whole: on a few drawn plates, with stand-ins for Colab's own modules.

The project arrives as the zip that a person would upload, and `MyDrive` is a folder. After the last
cell the disk is lost, as after a disconnect, and the set-up and training cells run again.
"""

import ast
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from app.ml.model import BACKBONES
from training.config import TrainingConfig
from training.sample.generate import draw_sample

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "NutriLearn_Training_Colab.ipynb"
COLAB = {
    "__init__.py": "",
    "drive.py": "def mount(path): print('mounted at', path)",
    "files.py": (
        "import pathlib, shutil\n"
        "uploads = sorted(path for path in pathlib.Path('uploads').iterdir() if path.is_file())\n"
        "def upload():\n"
        "    if not uploads: return {}  # as after Cancel\n"
        "    chosen = uploads.pop(0)\n"
        "    return {chosen.name: pathlib.Path(shutil.copy(chosen, '.')).read_bytes()}\n"
        "def download(path): print('downloaded', path)\n"
    ),
    "output.py": (
        "def serve_kernel_port_as_iframe(port, height): print('a frame on port', port, height)"
    ),
}
# What Colab's frame needs of MLflow, asked before it is stopped.
STOP_MLFLOW = """\
from urllib.request import urlopen
print("framing:", urlopen("http://127.0.0.1:5000/").headers["X-Frame-Options"])
mlflow_server.terminate(), mlflow_server.wait(30)
"""
LOSE_DISK = """from shutil import rmtree
for name in ("checkpoints", "ml-models"):
    rmtree(PROJECT / name)
MORE_FLAGS += " --no_mlflow"
"""


def tiny_settings(folder: Path) -> dict[str, object]:
    return {
        "DRIVE_FOLDER": str(folder / "MyDrive" / "NutriLearn"),
        "DATA_DIR": str(folder / "plates"),
        "CLASSES": "pizza,paella",
        "IMAGES_PER_CLASS": 6,
        "MODEL": "efficientnet_lite0",
        "EPOCHS": 1,
        "MORE_FLAGS": "--num_workers 0",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def zip_project(target: Path) -> None:
    """What git knows of, as one folder in a zip: the shape in which Git hosts offer a project."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "backend"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    tree = target.parent / "tree" / "NutriLearn-main"
    for name in filter(None, listed.stdout.decode().split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    shutil.make_archive(str(target), "zip", tree.parent)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_test_cells(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook with tiny settings, a free port, MLflow stopped, and a lost disk at its end."""
    settings, *_, mlflow, photos = cells = code_cells(notebook)
    port = str(free_port())
    for cell in cells:
        cell.source = cell.source.replace("5000", port)
    values = "\n".join(f"{name} = {value!r}" for name, value in tiny_settings(folder).items())
    new_cell = nbformat.v4.new_code_cell
    notebook.cells.insert(notebook.cells.index(settings) + 1, new_cell(values))
    notebook.cells.insert(
        notebook.cells.index(mlflow) + 1, new_cell(STOP_MLFLOW.replace("5000", port))
    )
    training = next(cell for cell in cells if "Train, or continue" in cell.source)
    notebook.cells += [new_cell("# Cancelled\n" + photos.source + "\nprint('none chosen')")]
    notebook.cells += [new_cell(LOSE_DISK), new_cell(training.source)]
    return notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook runs, with Colab's modules, two uploads and an empty Drive."""
    folder = tmp_path_factory.mktemp("colab")
    for name in ("modules/google/colab", "uploads", "MyDrive"):
        (folder / name).mkdir(parents=True)
    for name, text in COLAB.items():
        (folder / "modules" / "google" / "colab" / name).write_text(text)
    zip_project(folder / "uploads" / "1-project")
    plates = draw_sample(folder / "plates", images_per_class=7, test_per_class=2)
    shutil.copy(plates / "images" / "pizza" / "1006.jpg", folder / "uploads" / "2 lunch.jpg")
    return folder


@pytest.fixture(scope="module")
def executed(folder: Path) -> dict[str, str]:
    """The outputs as text by the title of the cell, or its code; no cell may fail."""
    notebook = with_test_cells(nbformat.read(NOTEBOOK, as_version=4), folder)
    resources = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(folder / "modules"))
        client = nbclient.NotebookClient(
            notebook, timeout=None, resources=resources, coalesce_streams=True
        )
        client.execute()
    nbformat.write(notebook, folder / "executed.ipynb")
    last = len(code_cells(notebook)) - 1
    return {
        "trained again" if i == last else cell.source.splitlines()[0]: str(cell.outputs)
        for i, cell in enumerate(code_cells(notebook))
    }


def output_of(executed: dict[str, str], title: str) -> str:
    return next(text for name, text in executed.items() if title in name)


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_it_promises(executed: dict[str, str], folder: Path) -> None:
    assert "epoch 1/1" in output_of(executed, "Train, or continue")
    shown = output_of(executed, "Curves, report")
    assert "<iframe srcdoc=" in shown and "image/png" in shown
    prediction = output_of(executed, "# @title 8. What is on your photos?")
    assert "2 lunch.jpg" in prediction and "%" in prediction
    assert "none chosen" in output_of(executed, "Cancelled")
    assert "a frame on port" in output_of(executed, "Open MLflow")
    assert "framing: None" in executed["from urllib.request import urlopen"]
    assert "downloaded" in output_of(executed, "Save everything")
    with zipfile.ZipFile(folder / "MyDrive" / "NutriLearn" / "nutrilearn-results.zip") as results:
        assert {"food_model_v1.pth", "food_model_v1/report.html"} <= set(results.namelist())


@pytest.mark.slow
def test_a_run_comes_back_from_drive_after_the_disk_is_lost(executed: dict[str, str]) -> None:
    assert "restored" in executed["trained again"]
    assert "resumed after epoch 1" in executed["trained again"]
    assert "food_model_v1.pth (now current)" in executed["trained again"]


def test_the_results_are_saved_before_anything_waits_for_a_person() -> None:
    """Only the zip of the project is asked for earlier, as nothing is there without it."""
    *_, save, _, photos = (c.source for c in code_cells(nbformat.read(NOTEBOOK, as_version=4)))
    assert "make_archive" in save and "files.upload()" in photos


def test_the_notebook_is_clean_and_defines_nothing() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None
        code = TransformerManager().transform_cell(cell.source)
        defining = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, defining) for node in ast.walk(ast.parse(code)))


def test_every_form_field_is_used_and_every_flag_is_real() -> None:
    settings, *others = (c.source for c in code_cells(nbformat.read(NOTEBOOK, as_version=4)))
    fields = re.findall(r"^([A-Z_]+) = .*# @param", settings, re.M)
    assert len(fields) > 15
    assert [name for name in fields if not re.search(rf"\b{name}\b", "\n".join(others))] == []
    assert set(tiny_settings(Path())) <= set(fields)
    flags = re.findall(r'^    "(\w+)": [A-Z_]+,$', "\n".join(others), re.M)
    assert len(flags) > 10
    assert set(flags) <= {field.name for field in dataclasses.fields(TrainingConfig)}
    models = re.search(r"^MODEL = .*# @param (.*)$", settings, re.M)
    assert models and json.loads(models[1]) == list(BACKBONES)
