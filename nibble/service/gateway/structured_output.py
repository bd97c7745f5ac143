"""What the text must be: fields of a request as a grammar, compiled before anything is queued.

A grammar that cannot be enforced is an error that says why. It never becomes a request without one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from nibble.engine.protocol import GenerationRequest, GrammarKind, GrammarSpec
from nibble.grammar.bans import exhausting_fields, has_bans
from nibble.grammar.compiler import GrammarCompiler
from nibble.grammar.errors import GrammarError
from nibble.grammar.threads import deep_stack_pool
from nibble.service.gateway.errors import InvalidRequest, Unavailable, no_token_left
from nibble.service.gateway.schema.sampling import Body, SamplingBody

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
NUM_THREADS = 2  # llguidance releases the GIL
_NUM_KNOWN = 64
_KINDS = {
    "json": GrammarKind.JSON_SCHEMA,
    "json_object": GrammarKind.JSON_OBJECT,
    "regex": GrammarKind.REGEX,
    "choice": GrammarKind.CHOICE,
    "grammar": GrammarKind.LARK,
}


class GrammarChecker:
    """One per process. Remembers what it checked last."""

    def __init__(self, compiler: GrammarCompiler, timeout_s: float = TIMEOUT_S) -> None:
        self._compiler = compiler
        self._timeout_s = timeout_s
        self._known: OrderedDict[GrammarSpec, str | None] = OrderedDict()  # and what is wrong with it

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return deep_stack_pool(NUM_THREADS, "grammar-check")

    def warm_up(self) -> None:
        """Build the tokenizer, which takes about a second and holds the GIL. Where it cannot be built, requests that
        need it are refused."""
        try:
            self._pool.submit(lambda: self._compiler.tokenizer).result()
        except GrammarError as error:
            logger.warning("event=no_grammars reason=%r", str(error))

    async def grammar_of(self, request: SamplingBody) -> GrammarSpec | None:
        """The grammar that a request asks for. Raises InvalidRequest where it cannot be enforced."""
        asked = list(_asked(request))
        if not asked:
            return None
        (field, spec), *others = asked
        if others:
            raise InvalidRequest(f"{field} and {others[0][0]} cannot both be set", param=others[0][0])
        await self.check(spec, field)
        return spec

    async def check(self, spec: GrammarSpec, field: str, *, what: str = "") -> None:
        """Raises InvalidRequest, which names the field and `what`, where the grammar cannot be enforced."""
        if spec not in self._known:
            self._known[spec] = await self._error(spec, field)
            if len(self._known) > _NUM_KNOWN:
                self._known.popitem(last=False)
        if error := self._known[spec]:
            raise InvalidRequest(f"{field}{what}: {error}", param=field, code="invalid_grammar")

    async def check_beginning(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest where its parameters forbid all that its text can begin with. Its grammar is checked.

        What contradicts it further on is found by the engine alone.
        """
        grammar, sampling = request.grammar, request.sampling
        if grammar is None or not has_bans(sampling):
            return
        allowed = await asyncio.wrap_future(self._pool.submit(self._compiler.first_tokens, grammar))
        if allowed is not None and (fields := exhausting_fields(sampling, (), allowed)):
            raise no_token_left((*fields, "grammar"), 0)

    async def special_tokens(self, texts: Iterable[str]) -> dict[str, int]:
        """The ids of those texts that are tokens of their own, which no text in a grammar stands for."""
        names = sorted(texts)
        try:
            ids = await asyncio.wrap_future(
                self._pool.submit(lambda: [self._compiler.special_token(name) for name in names])
            )
        except GrammarError as error:
            raise InvalidRequest(str(error), code="invalid_grammar") from error
        return {name: token_id for name, token_id in zip(names, ids, strict=True) if token_id is not None}

    async def _error(self, spec: GrammarSpec, field: str) -> str | None:
        future = self._pool.submit(self._compiler.check, spec)
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_s)
        except GrammarError as error:
            return str(error)
        except TimeoutError:
            if future.cancelled():  # it waited for others all the time
                message = "too many grammars are being compiled; retry later"
                raise Unavailable(message, code="compiler_busy", retry_after_s=self._timeout_s) from None
            message = f"{field}: it takes longer than {self._timeout_s:g} s to compile"
            raise InvalidRequest(message, param=field, code="invalid_grammar") from None
        return None


def _asked(request: SamplingBody) -> Iterator[tuple[str, GrammarSpec]]:
    """Every grammar of a request, and the field it is in."""
    yield from _response_format(request)
    outputs = request.structured_outputs
    if outputs is not None:
        _refuse_extras("structured_outputs", outputs)
        yield from _members("structured_outputs.", outputs.model_dump(by_alias=True, exclude_none=True))
    fields = ("json", "regex", "choice", "grammar")
    yield from _members("guided_", {field: getattr(request, f"guided_{field}") for field in fields})


def _response_format(request: SamplingBody) -> Iterator[tuple[str, GrammarSpec]]:
    wanted = request.response_format
    if wanted is None:
        return
    _refuse_extras("response_format", wanted)
    if wanted.json_schema is not None and wanted.type != "json_schema":
        field = "response_format.json_schema"
        raise InvalidRequest(f"{field} is only allowed when type is json_schema", param=field)
    if wanted.type == "json_object":
        yield "response_format", GrammarSpec(GrammarKind.JSON_OBJECT)
    elif wanted.type == "json_schema":
        field = "response_format.json_schema"
        if wanted.json_schema is None:
            raise InvalidRequest(f"{field}: field required", param=field)
        _refuse_extras(field, wanted.json_schema)
        yield f"{field}.schema", _spec(GrammarKind.JSON_SCHEMA, wanted.json_schema.schema_)


def _members(prefix: str, members: dict[str, Any]) -> Iterator[tuple[str, GrammarSpec]]:
    """vLLM's names of what a text must be."""
    for name, kind in _KINDS.items():
        value = members.get(name)
        if value is not None and value is not False:
            yield f"{prefix}{name}", _spec(kind, value)


def _spec(kind: GrammarKind, value: Any) -> GrammarSpec:
    if kind is GrammarKind.JSON_OBJECT:
        return GrammarSpec(kind)
    return GrammarSpec(kind, value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))


def _refuse_extras(field: str, body: Body) -> None:
    """They might ask for more than is known here."""
    for name, value in (body.model_extra or {}).items():
        if value is not None and value is not False:
            raise InvalidRequest(f"{field}.{name} is not supported", param=f"{field}.{name}"[:200])
