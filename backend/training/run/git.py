"""Which code a run is made with, as git knows it."""

import subprocess
from pathlib import Path

SECONDS = 5.0
DIRTY = "-dirty"
# The hash alone, not the name of a tag; --dirty looks at files that git tracks.
DESCRIBE = ["git", "describe", "--always", f"--dirty={DIRTY}", "--exclude=*", "--abbrev=40"]


def git_facts(folder: Path) -> dict[str, str]:
    """Return `git_commit` and `git_dirty` ("true" or "false"); nothing without git or a commit."""
    try:
        done = subprocess.run(
            DESCRIBE, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = done.stdout.strip()
    is_dirty = str(commit.endswith(DIRTY)).lower()
    return {"git_commit": commit.removesuffix(DIRTY), "git_dirty": is_dirty}
