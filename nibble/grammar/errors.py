"""Errors of this room: GrammarError alone."""


class GrammarError(Exception):
    """A grammar cannot be enforced, or is none: says what is at fault and where."""
