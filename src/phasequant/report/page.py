"""report.json and report.html."""

import json
from pathlib import Path
from typing import Any


def write_page(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json and report.html into a folder; the page's path."""
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text("<html></html>", encoding="utf-8")
    return page
