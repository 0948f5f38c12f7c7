"""What training and serving must agree on; imports neither of them."""

import os
import tempfile
from pathlib import Path

try:
    tempfile.gettempdir()
except FileNotFoundError:  # a container that is read-only from top to bottom
    # torch looks for a folder for compiled code as it is imported. Nothing is compiled here.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent))
