"""Claims, quotas and contexts: what a gateway asks for beside a request."""

import asyncio

import pytest
import redis
from synthetic import make_request

from nibble.engine.protocol import FinishReason
from nibble.service.broker.errors import AlreadyClaimed, OverQuota, QueueFull
from nibble.service.broker.keys import Keys
from nibble.service.broker.terms import Claim, Limit, Quota, Terms

CLAIM = Terms(claim=Claim("tenant:key", "ab12"))
REQUESTS = Limit("requests", 3, 60)
TOKENS = Limit("tokens", 100, 60)


def quota_terms(*limits: Limit, num_tokens: int = 10, name: str = "ann") -> Terms:
    return Terms(quota=Quota(name, limits), num_requests=1, num_tokens=num_tokens)


async def test_context_comes_back_to_whoever_attaches(make_gateway, make_worker):
    gateway, other, worker = await make_gateway("one"), await make_gateway("two"), make_worker()
    await gateway.submit(make_request("request", max_tokens=2), Terms(context=b"\x00of mine\xff"))
    assert (await other.attach("request")).terms.context == b"\x00of mine\xff"
    worker.run_until_idle()
    assert (await other.attach("request")).terms.context == b"\x00of mine\xff"


async def test_second_request_with_a_claim_is_told_who_has_it(make_gateway, make_worker):
    gateway, other, worker = await make_gateway("one"), await make_gateway("two"), make_worker()
    await gateway.submit(make_request("first", max_tokens=2), CLAIM)
    for _ in ("queued", "finished"):
        with pytest.raises(AlreadyClaimed) as raised:
            await other.submit(make_request("second"), CLAIM)
        assert (raised.value.request_id, raised.value.fingerprint) == ("first", "ab12")
        worker.run_until_idle()
    assert (await gateway.status()).num_queued == 0


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_claim_of_a_failed_request_is_free(make_gateway, make_worker, reason: FinishReason):
    gateway = await make_gateway()
    make_worker()
    await gateway.submit(make_request("first"), CLAIM)
    await gateway.abort("first", reason)
    await gateway.submit(make_request("second"), CLAIM)
    with pytest.raises(AlreadyClaimed, match="second"):
        await gateway.submit(make_request("third"), CLAIM)


async def test_claim_of_a_request_that_was_stopped_is_held(make_gateway, make_worker):
    gateway = await make_gateway()
    make_worker()
    await gateway.submit(make_request("first"), CLAIM)
    await gateway.abort("first", FinishReason.STOP)
    with pytest.raises(AlreadyClaimed):
        await gateway.submit(make_request("second"), CLAIM)


async def test_claim_goes_with_the_log(make_gateway, make_worker, redis_client: redis.Redis, keys: Keys):
    gateway, worker = await make_gateway(log_ttl_s=0.05), make_worker()
    await gateway.submit(make_request("first", max_tokens=1), CLAIM)
    assert redis_client.pttl(f"{keys.root}:claim:tenant:key") == -1, "not while it runs"
    worker.run_until_idle()
    assert 0 <= redis_client.pttl(f"{keys.root}:claim:tenant:key") <= 50
    await asyncio.sleep(0.06)
    await gateway.submit(make_request("second"), CLAIM)


async def test_request_limit_holds_across_gateways(make_gateway, make_worker):
    gateways = [await make_gateway(str(number)) for number in range(3)]
    make_worker()
    terms = quota_terms(REQUESTS)
    remaining = []
    for number, gateway in enumerate(gateways):
        stream = await gateway.submit(make_request(f"request-{number}"), terms)
        remaining += [level.remaining for level in stream.quota_levels]
    assert remaining == [2, 1, 0]
    for gateway in gateways:
        with pytest.raises(OverQuota) as raised:
            await gateway.submit(make_request("refused"), terms)
        assert raised.value.limit == REQUESTS
        assert 15 < raised.value.retry_after_s <= 20, "one of three a minute"
        assert [level.remaining for level in raised.value.levels] == [0]
        assert 55 < raised.value.levels[0].reset_s <= 60
    await gateways[0].submit(make_request("other"), quota_terms(REQUESTS, name="bob"))
    await gateways[0].submit(make_request("none"), Terms())


async def test_retry_time_is_when_it_is_admitted(make_gateway, make_worker):
    gateway = await make_gateway()
    make_worker()
    terms = quota_terms(Limit("requests", 1, 1))
    await gateway.submit(make_request("first"), terms)
    with pytest.raises(OverQuota) as raised:
        await gateway.submit(make_request("early"), terms)
    assert 0 < raised.value.retry_after_s <= 1
    await asyncio.sleep(raised.value.retry_after_s + 0.002)
    await gateway.submit(make_request("late"), terms)


async def test_generated_tokens_are_charged_when_a_request_ends_however_it_does(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    terms = quota_terms(TOKENS, num_tokens=10)
    first = await gateway.submit(make_request("first", max_tokens=50), terms)
    assert first.quota_levels[0].remaining == 90
    worker.run_until_idle()
    second = await gateway.submit(make_request("second", max_tokens=1000), terms)
    assert 30 <= second.quota_levels[0].remaining <= 31, (
        "50 generated and twice 10 of the prompt, less what is free again"
    )
    worker.step(capacity=8)
    for _ in range(40):
        worker.step()
    await gateway.abort("second")
    with pytest.raises(OverQuota) as raised:
        await gateway.submit(make_request("third"), terms)
    assert raised.value.levels[0].remaining == 0
    assert raised.value.levels[0].reset_s > 60, "beyond the limit is a debt"


async def test_more_than_the_limit_is_taken_when_nothing_is_used(make_gateway, make_worker):
    gateway = await make_gateway()
    make_worker()
    await gateway.submit(make_request("large"), quota_terms(TOKENS, num_tokens=250))
    with pytest.raises(OverQuota) as raised:
        await gateway.submit(make_request("small"), quota_terms(TOKENS, num_tokens=1))
    assert 85 < raised.value.retry_after_s < 95


async def test_other_choices_of_a_request_are_not_refused_but_charged_at_their_end(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("first", max_tokens=60), quota_terms(TOKENS, num_tokens=100))
    await gateway.submit(make_request("first.1", max_tokens=60), Terms(quota=Quota("ann", (TOKENS,))))
    worker.run_until_idle()
    with pytest.raises(OverQuota) as raised:
        await gateway.submit(make_request("next"), quota_terms(TOKENS))
    assert raised.value.levels[0].reset_s > 125


async def test_refused_request_is_not_charged(make_gateway, make_worker):
    gateway = await make_gateway(max_queued=1)
    make_worker()
    terms = quota_terms(REQUESTS)
    await gateway.submit(make_request("first"), terms)
    for _ in range(3):
        with pytest.raises(QueueFull):
            await gateway.submit(make_request("second"), terms)
    await gateway.abort("first")
    stream = await gateway.submit(make_request("third"), terms)
    assert stream.quota_levels[0].remaining == 1


async def test_unused_quota_leaves_nothing_behind(make_gateway, make_worker, redis_client: redis.Redis, keys: Keys):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("first", max_tokens=1), quota_terms(Limit("requests", 1000, 60)))
    worker.run_until_idle()
    assert 0 <= redis_client.pttl(f"{keys.root}:quota:ann") <= 61
