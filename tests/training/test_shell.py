"""Commands as they are printed, on Windows too."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import shell
from training.shell import quoted


@given(words=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)))
def test_a_shell_reads_what_was_meant(words: list[str]) -> None:
    assert shlex.split(quoted(words)) == words


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"C:\Users\Eva M\food", r'"C:\Users\Eva M\food"'),
        (r"C:\R&D\photos", r'"C:\R&D\photos"'),
        ("C:\\R&D\\", r'"C:\R&D\\"'),
        (r"D:\photos (1)", r'"D:\photos (1)"'),
        (r"D:\photos(1)", r'"D:\photos(1)"'),
        ("dosa,idli", '"dosa,idli"'),
        (r"C:\food", r"C:\food"),
        ("it's", "it's"),
        ("Jürgen", "Jürgen"),
    ],
)
def test_on_windows_it_is_quoted_for_cmd_exe(
    word: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cmd.exe takes single quotes literally, and what follows an & for the next command."""
    monkeypatch.setattr(shell.os, "name", "nt")
    assert (
        quoted(["python", "train_model.py", "--data_dir", word]).split("data_dir ")[1] == expected
    )
