"""`nibble chat`: a terminal chat with a running service, over its OpenAI API. Knows nothing of the service's inside.

One answer is one streamed HTTP request. Ctrl-C while it streams closes the connection, which makes the service abort
the request; what has arrived stays in the conversation.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

HELP = """\
/reset   forget the conversation
/system TEXT   begin a new conversation with this system message
/help    this list
/exit    leave (so do Ctrl-D and Ctrl-C at the prompt)
Ctrl-C   while an answer streams: stop the answer"""

_TIMEOUT = httpx.Timeout(10.0, read=None)  # a long prompt on a slow machine may take its time to the first token


class ChatError(Exception):
    """One line for the terminal."""


@dataclass(frozen=True)
class ChatOptions:
    """What each request asks for; None leaves it to the service."""

    temperature: float | None = None
    max_tokens: int | None = None

    def as_fields(self) -> dict[str, Any]:
        fields = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in fields.items() if value is not None}


class ChatClient:
    """One service and one model of it."""

    def __init__(self, url: str, model: str | None, options: ChatOptions, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT)
        self._options = options
        self._url = url
        self.model = model or self._first_model()

    def close(self) -> None:
        self._http.close()

    def stream(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """The pieces of the answer. Closing the iterator closes the connection. Raises ChatError."""
        body = {"model": self.model, "messages": messages, "stream": True, **self._options.as_fields()}
        with self._translated(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise ChatError(_error_message(response))
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ChatError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""

    def _first_model(self) -> str:
        with self._translated():
            response = self._http.get("/v1/models")
            if response.status_code != httpx.codes.OK:
                raise ChatError(_error_message(response))
            return str(response.json()["data"][0]["id"])

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ChatError(f"no service answers at {self._url}; start one with `nibble serve`") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(f"{self._url}: {error or type(error).__name__}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ChatError(f"{self._url} does not answer like an OpenAI-compatible service") from error


@dataclass
class Conversation:
    """The messages so far."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def run_chat(client: ChatClient, system: str | None) -> None:
    """Talk until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    conversation = Conversation(system)
    _write(f"Chat with {client.model}. /help lists the commands.\n")
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            _write("\n")
            return
        if text == "/exit":
            return
        if text.startswith("/"):
            _command(text, conversation)
        elif text:
            _answer(client, conversation, text)


def _command(text: str, conversation: Conversation) -> None:
    name, _, argument = text.partition(" ")
    if name == "/reset":
        conversation.reset()
        _write("(forgotten)\n")
    elif name == "/system":
        conversation.system = argument.strip() or None
        conversation.reset()
        _write("(a new conversation)\n")
    else:
        _write(("" if name == "/help" else f"{name} is no command\n") + HELP + "\n")


def _answer(client: ChatClient, conversation: Conversation, text: str) -> None:
    """Ask, print the answer while it arrives, and keep what arrived."""
    conversation.add("user", text)
    pieces: list[str] = []
    try:
        with contextlib.closing(client.stream(conversation.messages)) as stream:
            for piece in stream:
                pieces.append(piece)
                _write(piece)
        _write("\n")
    except KeyboardInterrupt:
        _write("\n(stopped)\n")
    except ChatError as error:
        _write(f"{chr(10) if pieces else ''}error: {error}\n")
    if pieces:
        conversation.add("assistant", "".join(pieces))
    else:
        conversation.messages.pop()  # an unanswered question would stand before the next one


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} answered {response.status_code}"
