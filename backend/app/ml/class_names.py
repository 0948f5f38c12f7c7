"""What a class may be called; training names its classes here, and the server people's dishes."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # invisible, and part of Persian and Indic words and of emoji
MIN_NEW_CLASS_IMAGES = 5  # leaves three to train on, beside one for validation and one for the test

# What systems, desktops and file servers leave beside one's own files and folders: never a class.
SERVICE_NAME = re.compile(
    r"\..*(?<!\.icloud)|thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|__macosx|__pycache__"
    r"|\$recycle\.bin|recycle[rd]|system volume information|found\.\d{3}"
    r"|lost\+found|lost\.dir|network trash folder|temporary items|thevolumesettingsfolder"
    r"|[#@]recycle|[#@~]snapshot|@recently-snapshot|@eadir|@tmp|@transcode|@__thumb",
    re.IGNORECASE,
)
NO_FOLDER = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)  # devices of Windows
UNFIT_IN_FOLDERS = '/\\:*?"<>|'
MAX_NAME_BYTES = 120  # of UTF-8; file systems take 255


def normalize_class_name(name: str) -> str:
    """Turn "Paneer Tikka" or "paneer-tikka" into "paneer_tikka"; "" if nothing is left.

    Invisible characters are dropped, except for joiners within a word. A name never begins like a
    formula of a spreadsheet.
    """
    visible = "".join(c for c in name if c in JOINERS or unicodedata.category(c) != "Cf")
    # Unicode 3.13 D145 folds between two normalizations; otherwise a second call changes more.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", visible).casefold())
    words = re.sub(r"[\s_\-\u2010-\u2015]+", "_", folded)
    return words.lstrip("._=+@" + JOINERS).rstrip("_" + JOINERS)


def unfit_in(name: str) -> list[str]:
    """Return the control characters and halves of surrogate pairs: few JSON readers take them."""
    return [c for c in name if unicodedata.category(c) in ("Cc", "Cs")]


def why_no_folder(name: str) -> str | None:
    """Say what keeps a normalized name from being one folder that training reads on any system."""
    if not any(c.isalnum() for c in name):
        return "it has no letter or digit"
    if wrong := [c for c in name if c in UNFIT_IN_FOLDERS or c in unfit_in(name)]:
        return f"it has characters that no folder may have ({wrong[0]!r})"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    stem = name.partition(".")[0]
    if SERVICE_NAME.fullmatch(name) or NO_FOLDER.fullmatch(stem) or name.endswith((".", " ")):
        return "it is a name that operating systems keep for themselves"
    return None
