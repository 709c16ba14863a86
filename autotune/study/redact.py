"""Redaction of passwords in text that is shown or stored."""

from __future__ import annotations

import re


def without_password(text: str) -> str:
    """The text, such as a URL or a command, with the passwords of its URLs as `***`."""
    return re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
