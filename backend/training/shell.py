"""Commands as they are printed: they can be pasted into the shell that people have here."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence

ENDS_A_WORD = re.compile(r"[&|<>^(),;=]")  # in cmd.exe, outside of quotes


def quoted(command: Sequence[str]) -> str:
    """Join the words of a command, each quoted if it has to be."""
    if os.name != "nt":
        return shlex.join(command)
    return " ".join(_quoted_for_cmd(word) for word in command)


def _quoted_for_cmd(word: str) -> str:
    """Quote as programs on Windows read it, and also what only cmd.exe would take for its own."""
    as_read = subprocess.list2cmdline([word])
    if as_read != word or not ENDS_A_WORD.search(word):
        return as_read
    trailing = word[len(word.rstrip("\\")) :]  # one alone would make the quote a part of the word
    return f'"{word}{trailing}"'
