"""Write the OpenAPI document to a file: `python -m service.wire.openapi_file PATH`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from service.app import create_app
from service.settings import Settings

__all__ = ["document_text"]


def document_text() -> str:
    """The document as the file has it; it does not depend on any setting."""
    document = create_app(Settings()).openapi()
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document_text())
