"""The one exception for input that breaks a rule."""

from __future__ import annotations


class BadInput(ValueError):
    """A rule was broken: one line with the rule, the values received and what to do.

    Library callers see it as a `ValueError`; the command line prints its text and exits with code 2.
    """
