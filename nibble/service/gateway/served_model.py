"""What the gateway knows of the model it serves: tokenizer, chat template, context length, end-of-sequence ids.

Read from the three JSON files of a native checkpoint directory: `tokenizer.json`, `tokenizer_config.json` and
`config.json`. Weights are never opened here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nibble.grammar.compiler import GrammarCompiler
from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.detokenizer import DetokenizerFactory, detokenizer_factory, token_bytes_function
from nibble.service.gateway.structured_output import GrammarChecker
from nibble.service.gateway.tool_styles import (
    GENERIC,
    ReasoningParserName,
    ToolCallParserName,
    ToolStyle,
    has_reasoning,
    tool_style,
)

# A Unicode normal form can make a text at most this many times shorter in UTF-8 (three jamo to one Hangul syllable).
_MAX_NORMALIZER_SHRINK = 4
_SPECIAL_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ModelFilesError(Exception):
    """A file of the model directory is missing or not what it should be; the message names it."""


@dataclass(frozen=True)
class ServedModel:
    """One per process; safe to share between threads.

    max_bytes_per_token: no text of more than this times n bytes encodes to n tokens or fewer; None if there is no
    such bound. created_s: Unix time of the model's files.
    """

    name: str
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_bytes_per_token: int | None
    created_s: int
    special_tokens: Mapping[str, str]  # bos_token, eos_token ... as text
    chat_template: ChatTemplate | None
    tool_template: ChatTemplate | None  # of chats with tools, where the model has one for them
    tool_call_parser: ToolCallParserName
    reasoning_parser: ReasoningParserName
    tokenizer: Tokenizer
    grammars: GrammarChecker
    make_detokenizer: DetokenizerFactory
    token_bytes: Callable[[int], bytes]  # what a token stands for by itself

    def template(self, has_tools: bool) -> ChatTemplate | None:
        """That of a chat with tools in it, or without."""
        return self.tool_template or self.chat_template if has_tools else self.chat_template

    @property
    def tool_style(self) -> ToolStyle:
        """How it writes calls. Where the template tells nothing of tools, the prompt does, in the generic style."""
        template = self.template(has_tools=True)
        if template is None or not template.mentions("tools"):
            return GENERIC
        return tool_style(template.source, self.tool_call_parser)

    @property
    def has_reasoning(self) -> bool:
        """Whether it can begin an answer with reasoning."""
        template = self.chat_template
        return has_reasoning(template.source if template else "", self.reasoning_parser)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids; special tokens are those that the tokenizer begins a text with. Releases the GIL, which
        `Tokenizer.encode` does not."""
        ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids


def load_served_model(
    directory: Path,
    name: str | None = None,
    *,
    tool_call_parser: ToolCallParserName = ToolCallParserName.AUTO,
    reasoning_parser: ReasoningParserName = ReasoningParserName.AUTO,
) -> ServedModel:
    """Raises ModelFilesError, or UnsupportedDecoder for a tokenizer of an unknown family."""
    config = _read_json(directory / "config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    tokenizer_json = _read_json(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_tokens = _special_tokens(tokenizer_config)
    template, tool_template = (_template_source(tokenizer_config, name) for name in ("default", "tool_use"))
    context_length = _number(config, "max_position_embeddings", directory)
    vocab_size = _number(config, "vocab_size", directory)
    eos_token_ids = _eos_token_ids(config, special_tokens, tokenizer)
    return ServedModel(
        name=name or directory.resolve().name,
        context_length=context_length,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        max_bytes_per_token=_max_bytes_per_token(tokenizer_json),
        created_s=int((directory / "config.json").stat().st_mtime),
        special_tokens=special_tokens,
        chat_template=ChatTemplate(template, special_tokens) if template else None,
        tool_template=ChatTemplate(tool_template, special_tokens) if tool_template else None,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        tokenizer=tokenizer,
        grammars=GrammarChecker(GrammarCompiler(directory / "tokenizer.json", vocab_size, eos_token_ids)),
        make_detokenizer=detokenizer_factory(tokenizer),
        token_bytes=token_bytes_function(tokenizer),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFilesError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelFilesError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path}: should be a JSON object, got {type(value).__name__}")
    return value


def _number(config: Mapping[str, Any], field: str, directory: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value <= 0:
        raise ModelFilesError(f"{directory / 'config.json'}: {field} should be a positive integer, got {value!r}")
    return value


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Their texts; each field is a string or an object with `content`."""
    found = {}
    for field in _SPECIAL_TOKEN_FIELDS:
        value = tokenizer_config.get(field)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[field] = value
    return found


def _template_source(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """The only one is `default`, for plain chat; or there is a list of named ones."""
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get(name)
    elif name != "default":
        source = None
    return source


def _eos_token_ids(
    config: Mapping[str, Any], special_tokens: Mapping[str, str], tokenizer: Tokenizer
) -> frozenset[int]:
    """Those of config.json and the tokenizer's own: a chat model often ends a turn with only one of them."""
    configured = config.get("eos_token_id")
    ids = set(configured) if isinstance(configured, list) else set() if configured is None else {configured}
    own = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    return frozenset(ids if own is None else ids | {own})


def _max_bytes_per_token(tokenizer_json: Mapping[str, Any]) -> int | None:
    """No bound where a token can swallow any amount of text: fused unknowns, and special tokens that strip spaces."""
    model = tokenizer_json["model"]
    added = tokenizer_json.get("added_tokens") or []
    can_fuse_unknown = (model.get("unk_token") or model["type"] == "Unigram") and not model.get("byte_fallback")
    if can_fuse_unknown or any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    # A vocabulary is a mapping, or (Unigram) pairs of token and score. Stand-ins of bytes and spaces are longer in
    # UTF-8 than what they stand for, so this is an upper bound.
    tokens = [entry if isinstance(entry, str) else entry[0] for entry in model["vocab"]]
    longest = max(len(token.encode()) for token in [*tokens, *(token["content"] for token in added)])
    return longest * (_MAX_NORMALIZER_SHRINK if tokenizer_json.get("normalizer") else 1)
