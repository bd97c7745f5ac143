"""The children's log lines in the terminal, each after the name of its process."""

from __future__ import annotations

from typing import TextIO

_NAME_WIDTH = 8  # gateway, worker-1
_COLORS = {"gateway": "36", "nibble": "1"}  # ANSI: cyan, bold
_OTHER_COLOR = "35"  # workers: magenta


class LogLines:
    """Writes to one stream, in color where it is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_color = stream.isatty()

    def __call__(self, name: str, line: str) -> None:
        prefix = f"{name:<{_NAME_WIDTH}} |"
        if self._has_color:
            prefix = f"\x1b[{_COLORS.get(name, _OTHER_COLOR)}m{prefix}\x1b[0m"
        self._stream.write(f"{prefix} {line}\n")
        self._stream.flush()
