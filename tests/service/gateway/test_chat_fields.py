"""What each field of a chat request does to the generation requests made of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from chat_plans import plan, refusal, sampling
from small_models import CONTEXT_LENGTH, VOCAB_ROOM

from nibble.service.broker.gateway_calls import MAX_PRIORITY
from nibble.service.gateway.plan import ClientContext
from nibble.service.gateway.served_model import ServedModel


def test_defaults(served_model: ServedModel) -> None:
    made = plan(served_model)
    request = made.requests[0]
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert set(params.stop_token_ids) == served_model.eos_token_ids
    assert len(request.prompt_token_ids) + params.max_tokens == CONTEXT_LENGTH, "fills the context, and no more"
    assert (request.priority, request.tenant, request.arrival_s, request.deadline_s) == (0, "", 5.0, None)
    assert (made.stream, made.include_usage, made.stops, made.ignored) == (False, False, (), ())


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 2, "temperature", 2.0),
        ("top_p", 0.25, "top_p", 0.25),
        ("top_k", 40, "top_k", 40),
        ("top_k", -1, "top_k", 0),
        ("top_k", 2**31 - 1, "top_k", 2**31 - 1),
        ("min_p", 0.125, "min_p", 0.125),
        ("seed", 7, "seed", 7),
        ("seed", -1, "seed", 2**64 - 1),
        ("seed", 2**64 - 1, "seed", 2**64 - 1),
        ("frequency_penalty", 0.5, "frequency_penalty", 0.5),
        ("presence_penalty", -2, "presence_penalty", -2.0),
        ("repetition_penalty", 1.25, "repetition_penalty", 1.25),
        ("logit_bias", {"5": 1.5, "7": -99}, "logit_bias", ((5, 1.5), (7, -99.0))),
        ("logit_bias", {"5": -100}, "logit_bias", ((5, -math.inf),)),
        ("allowed_token_ids", [5, 7], "allowed_token_ids", (5, 7)),
        ("logprobs", True, "logprobs", 0),
        ("logprobs", False, "logprobs", None),
        ("max_tokens", 9, "max_tokens", 9),
        ("max_completion_tokens", 9, "max_tokens", 9),
        ("min_tokens", 4, "min_tokens", 4),
        ("ignore_eos", True, "stop_token_ids", ()),
    ],
)
def test_field_reaches_the_engine(
    served_model: ServedModel, field: str, value: object, attribute: str, expected: object
) -> None:
    assert getattr(sampling(served_model, **{field: value}), attribute) == expected


def test_stop_token_ids_join_the_end_of_sequence(served_model: ServedModel) -> None:
    assert set(sampling(served_model, stop_token_ids=[9, 5]).stop_token_ids) == {5, 9} | served_model.eos_token_ids
    assert sampling(served_model, stop_token_ids=[5], ignore_eos=True).stop_token_ids == (5,)


def test_missing_seed_is_drawn(served_model: ServedModel) -> None:
    seeds = {sampling(served_model).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_choices_have_their_own_names_and_seeds(served_model: ServedModel) -> None:
    first, again = (plan(served_model, n=3, seed=5).requests for _ in range(2))
    assert [request.request_id for request in first] == ["chatcmpl-1", "chatcmpl-1.1", "chatcmpl-1.2"]
    seeds = [request.sampling.seed for request in first]
    assert seeds[0] == 5, "the first choice is the one that n=1 gives"
    assert len(set(seeds)) == 3
    assert seeds == [request.sampling.seed for request in again]


def test_default_max_tokens_of_the_deployment(served_model: ServedModel) -> None:
    client = ClientContext(request_id="x", arrival_s=0.0, default_max_tokens=11)
    assert plan(served_model, client).requests[0].sampling.max_tokens == 11
    client = dataclasses.replace(client, default_max_tokens=10**6)
    params = plan(served_model, client).requests[0]
    assert params.sampling.max_tokens == CONTEXT_LENGTH - len(params.prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "tenant"),
    [
        ({"user": "ann"}, "ann"),
        ({"user": "ann", "safety_identifier": "bob"}, "bob"),
        ({"prompt_cache_key": "key"}, "key"),
        ({}, ""),
    ],
)
def test_tenant_is_who_asks(served_model: ServedModel, fields: dict[str, str], tenant: str) -> None:
    assert plan(served_model, **fields).requests[0].tenant == tenant
    keyed = plan(served_model, ClientContext(request_id="x", arrival_s=0.0, tenant="0a1b"), **fields)
    assert keyed.requests[0].tenant == (f"0a1b:{tenant}" if tenant else "0a1b")


def test_service_tier_orders_the_queue(served_model: ServedModel) -> None:
    tiers = ["priority", "auto", "flex"]
    plans = [plan(served_model, service_tier=tier) for tier in tiers]
    priorities = [made.requests[0].priority for made in plans]
    assert priorities == sorted(priorities)
    assert len(set(priorities)) == 3
    assert [made.service_tier for made in plans] == ["priority", "default", "flex"]


def test_a_priority_orders_within_a_tier_and_beyond(served_model: ServedModel) -> None:
    assert plan(served_model, priority=-3).requests[0].priority == -3
    flex = plan(served_model, service_tier="flex").requests[0].priority
    assert plan(served_model, service_tier="flex", priority=2).requests[0].priority == flex + 2
    extremes = [plan(served_model, service_tier=t, priority=p) for t, p in (("flex", 4000), ("priority", -4000))]
    assert all(abs(made.requests[0].priority) <= MAX_PRIORITY for made in extremes), "the queue takes it"


def test_a_salt_separates_caches_within_an_api_keys_own(served_model: ServedModel) -> None:
    def salt(scope: str = "", **fields: str) -> str:
        client = ClientContext(request_id="x", arrival_s=0.0, tenant="0a1b", cache_scope=scope)
        return plan(served_model, client, **fields).requests[0].cache_salt

    assert salt() == salt(user="ann") == ""
    assert len({salt(), salt(cache_salt="a"), salt("0a1b"), salt("0a1b", cache_salt="a"), salt(cache_salt="0a1b")}) == 5


@pytest.mark.parametrize(("stop", "expected"), [("x", ("x",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_stop_strings(served_model: ServedModel, stop: object, expected: tuple[str, ...]) -> None:
    assert plan(served_model, stop=stop).stops == expected


def test_top_logprobs_are_counted(served_model: ServedModel) -> None:
    assert sampling(served_model, logprobs=True, top_logprobs=20).logprobs == 20
    assert plan(served_model, logprobs=True, top_logprobs=3).num_logprobs == 3


def test_bad_words_are_forbidden_with_and_without_a_space_before(served_model: ServedModel) -> None:
    words = sampling(served_model, bad_words=["fox"]).bad_words_token_ids
    assert words[0] == tuple(served_model.encode("fox"))
    assert {served_model.tokenizer.decode(word).strip() for word in words} == {"fox"}


def test_ids_of_a_padded_vocabulary_can_stop(served_model: ServedModel) -> None:
    last = served_model.tokenizer.get_vocab_size() + VOCAB_ROOM - 1
    assert last in sampling(served_model, stop_token_ids=[last]).stop_token_ids
    assert refusal(served_model, stop_token_ids=[last + 1]).param == "stop_token_ids"
