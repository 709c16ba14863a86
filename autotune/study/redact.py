"""Redaction of passwords in what is shown and kept."""

from __future__ import annotations

import re


def without_password(text: str) -> str:
    """The text, such as a URL or a command, as it may be shown and kept."""
    return re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
