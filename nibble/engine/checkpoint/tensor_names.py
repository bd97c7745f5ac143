"""What a tensor may be called: names of other people's files go into messages, logs and terminals."""

from __future__ import annotations

MAX_NAME_LENGTH = 256  # GGUF allows 64 bytes; `transformers` makes some of 100


def name_problem(name: str) -> str | None:
    """Why a tensor cannot have this name, or None."""
    if len(name) > MAX_NAME_LENGTH:
        return f"its name has {len(name)} characters, the limit is {MAX_NAME_LENGTH}"
    if not name.isprintable():
        return "its name has characters that cannot be printed"
    return None
