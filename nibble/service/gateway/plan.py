"""What a valid request for text comes to: the generation requests, and how their tokens become an answer.

The same for all endpoints that generate; how each makes its prompts is in a file of its own (`chat.py`, `text.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nibble.engine.protocol import GenerationRequest
from nibble.service.gateway.answer_parser import AnswerFormat
from nibble.service.gateway.errors import InvalidRequest
from nibble.service.gateway.sampling import Wishes, choice_seed, sampling_params
from nibble.service.gateway.schema.sampling import SamplingBody
from nibble.service.gateway.served_model import ServedModel

# service_tier -> (priority, the tier that the response names). A lower number is served first.
_TIERS = {
    "auto": (0, "default"),
    "default": (0, "default"),
    "standard": (0, "default"),
    "flex": (10, "flex"),
    "scale": (-10, "scale"),
    "priority": (-10, "priority"),
}


@dataclass(frozen=True)
class ClientContext:
    """What the HTTP request says beside its body. All times are Unix times in seconds."""

    request_id: str
    arrival_s: float
    deadline_s: float | None = None
    first_token_by_s: float | None = None
    tenant: str = ""  # the name of the API key
    priority: int = 0  # that of the API key
    default_max_tokens: int | None = None
    cache_scope: str = ""  # requests of different scopes share nothing in the prefix cache
    traceparent: str = ""  # of the gateway's span


@dataclass(frozen=True)
class Plan:
    """One generation request per choice, and how their tokens become an answer. What is not of a choice is of all."""

    request_id: str
    arrival_s: float
    first_token_by_s: float | None
    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    num_prompts: int  # the choices of one follow each other
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    service_tier: str
    ignored: tuple[str, ...]
    response: bytes = b""  # of a /v1/responses request alone: see response_request.py
    echoes: bool = False  # the prompt, too, is part of the text
    format: AnswerFormat | None = None  # how a text is taken apart; None: all of it is content
    continues_prompt: bool = False  # the text goes on where the prompt ends, in the middle of a sentence
    tenant: str = ""  # the name of the API key
    only_prompt: bool = False  # what is generated is no part of the answer

    @property
    def shown_tokens(self) -> frozenset[str]:
        """Special tokens that are text although special ones are skipped: a parser needs them."""
        return self.format.markers if self.format is not None else frozenset()

    @property
    def num_logprobs(self) -> int | None:
        """Most probable tokens that are told with each token; None: not even its own log probability is."""
        return self.requests[0].sampling.logprobs


def choice_request_id(request_id: str, choice: int) -> str:
    """The engine's name of one choice; the first has the name that the client sees."""
    return f"{request_id}.{choice}" if choice else request_id


def make_plan(
    request: SamplingBody, model: ServedModel, client: ClientContext, prompts: Sequence[list[int]], wishes: Wishes
) -> Plan:
    """n choices for each prompt. Raises InvalidRequest, ContextLengthExceeded."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    priority, service_tier = _TIERS[request.service_tier or "auto"]
    user = next((user for user in wishes.users if user), "")
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        sampling = sampling_params(request, model, len(prompt), wishes)
        requests += [
            GenerationRequest(
                request_id=choice_request_id(client.request_id, len(requests) + choice),
                prompt_token_ids=prompt,
                sampling=msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, choice)),
                arrival_s=client.arrival_s,
                deadline_s=client.deadline_s,
                priority=priority + client.priority + (request.priority or 0),
                grammar=wishes.grammar,
                tenant=f"{client.tenant}:{user}" if client.tenant and user else client.tenant or user,
                cache_salt=_cache_salt(request, client),
                traceparent=client.traceparent,
            )
            for choice in range(request.n or 1)
        ]
    return Plan(
        request_id=client.request_id,
        arrival_s=client.arrival_s,
        first_token_by_s=client.first_token_by_s,
        requests=tuple(requests),
        prompt_tokens=sum(map(len, prompts)),
        num_prompts=len(prompts),
        stops=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        service_tier=service_tier,
        ignored=wishes.ignored,
        echoes=wishes.echoes,
        format=wishes.format,
        continues_prompt=wishes.continues_prompt,
        only_prompt=wishes.only_prompt,
        tenant=client.tenant,
    )


def _cache_salt(request: SamplingBody, client: ClientContext) -> str:
    """No scope has a slash, so different pairs are different salts."""
    return f"{client.cache_scope}/{request.cache_salt or ''}" if client.cache_scope or request.cache_salt else ""
