"""Which code a run is made with."""

import shutil
import subprocess
from pathlib import Path

import pytest

from training.run.git import git_facts


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_commit_is_named_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_facts(tmp_path) == {}, "no repository"
    git("init")
    assert git_facts(tmp_path) == {}, "no commit"
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not tracked")
    assert git_facts(tmp_path) == {"git_commit": commit, "git_dirty": "false"}
    (tmp_path / "code.py").write_text("2")
    assert git_facts(tmp_path) == {"git_commit": commit, "git_dirty": "true"}


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts(tmp_path) == {}
