"""The exception for input that breaks a rule, and errors as one line of text."""

from __future__ import annotations


class BadInput(ValueError):
    """A rule was broken: one line with the rule, the values received and what to do.

    Library callers see it as a `ValueError`; the command line prints its text and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException | str) -> str:
    """An error as `Type: text`, or a text as it is, with every run of white space as one blank."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}".removesuffix(": ")
    return " ".join(text.split())
