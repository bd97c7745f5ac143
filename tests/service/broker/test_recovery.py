"""Workers that die, hang and come back; requests that kill workers."""

import asyncio

import pytest
from synthetic import expire_lease, make_request, read_log, tokens_of

from nibble.engine.protocol import FinishReason


async def collect(stream):
    return [event async for event in stream]


def tokens(events):
    return [token_id for event in events for token_id in event.token_ids]


async def test_request_of_a_dead_worker_continues_on_another(make_gateway, make_worker, redis_client, keys):
    gateway, dead, heir = await make_gateway(), make_worker("dead"), make_worker("heir")
    stream = await gateway.submit(make_request("request", max_tokens=6))
    dead.exchange()
    dead.step(num_tokens=2)
    expire_lease(redis_client, keys, dead.name)
    exchange = heir.exchange()
    assert exchange.num_recovered == 1
    assert [(a.attempt, a.generated_token_ids) for a in exchange.assignments] == [(2, tokens_of("request", 0, 2))]
    heir.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 6)


async def test_lease_expires_by_itself(make_gateway, make_worker):
    gateway, dead, heir = await make_gateway(), make_worker("dead", lease_s=0.05), make_worker("heir")
    await gateway.submit(make_request("request"))
    dead.exchange()
    assert heir.exchange().assignments == []
    await asyncio.sleep(0.06)
    assert len(heir.exchange().assignments) == 1


async def test_recovered_request_goes_before_those_that_came_later(make_gateway, make_worker, redis_client, keys):
    gateway, dead, heir = await make_gateway(), make_worker("dead"), make_worker("heir")
    for name in "abc":
        await gateway.submit(make_request(name))
    dead.exchange(capacity=2)
    expire_lease(redis_client, keys, dead.name)
    assert [a.request.request_id for a in heir.exchange().assignments] == ["a", "b", "c"]


async def test_zombie_is_fenced_and_told_to_drop(make_gateway, make_worker, redis_client, keys):
    gateway, zombie, heir = await make_gateway(), make_worker("zombie"), make_worker("heir")
    stream = await gateway.submit(make_request("request", max_tokens=6))
    zombie.exchange()
    zombie.step()
    expire_lease(redis_client, keys, zombie.name)
    heir.exchange()
    heir.step()
    zombie.generate(num_tokens=5)  # would even end the request
    exchange = zombie.exchange(capacity=0)
    assert exchange.num_fenced == 1
    assert read_log(redis_client, keys, "request") == tokens_of("request", 0, 2)
    heir.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 6)


async def test_zombie_without_news_drops_what_it_lost(make_gateway, make_worker, redis_client, keys):
    gateway, zombie, heir = await make_gateway(), make_worker("zombie"), make_worker("heir")
    await gateway.submit(make_request("request"))
    zombie.exchange()
    expire_lease(redis_client, keys, zombie.name)
    heir.exchange()
    dropped = zombie.exchange(capacity=0).dropped + zombie.exchange(capacity=0).dropped
    assert dropped == ["request"]


async def test_zombie_can_get_its_request_back_as_a_new_attempt(make_gateway, make_worker, redis_client, keys):
    gateway, zombie, other = await make_gateway(), make_worker("zombie"), make_worker("other")
    stream = await gateway.submit(make_request("request"))
    zombie.exchange()
    zombie.step()
    expire_lease(redis_client, keys, zombie.name)
    other.exchange(capacity=0)  # notices, but takes nothing
    zombie.generate()
    exchange = zombie.exchange()
    assert exchange.dropped == ["request"]
    assert [(a.attempt, len(a.generated_token_ids)) for a in exchange.assignments] == [(2, 1)]
    zombie.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 4)


async def test_late_worker_that_nobody_missed_goes_on(make_gateway, make_worker, redis_client, keys):
    gateway, worker = await make_gateway(silence_s=60), make_worker()
    await gateway.submit(make_request("request", max_tokens=6))
    worker.exchange()
    expire_lease(redis_client, keys, worker.name)
    exchange = worker.step()
    assert (exchange.dropped, exchange.num_fenced, exchange.num_recovered) == ([], 0, 0)


async def test_gateway_notices_a_dead_worker_when_no_other_is_left(make_gateway, make_worker, redis_client, keys):
    gateway, dead = await make_gateway(), make_worker("dead")
    stream = await gateway.submit(make_request("request"))
    dead.exchange()
    expire_lease(redis_client, keys, dead.name)
    await asyncio.sleep(0.25)
    assert redis_client.zcard(keys.queue) == 1  # an autoscaler sees that a worker is wanted
    late = make_worker("late")
    assert late.exchange().num_recovered == 1
    late.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 4)


async def test_restarted_worker_replaces_its_predecessor_at_once(make_gateway, make_worker):
    gateway, before = await make_gateway(), make_worker("same-name")
    await gateway.submit(make_request("request"))
    before.exchange()
    after = make_worker("same-name")
    exchange = after.exchange()
    assert exchange.num_recovered == 1
    assert [a.attempt for a in exchange.assignments] == [2]
    before.generate()
    assert before.exchange(capacity=0).num_fenced == 1
    assert len((await gateway.status()).workers) == 2  # it lives on as another member, without work


async def test_worker_whose_name_begins_like_another_is_not_replaced(make_gateway, make_worker):
    gateway, first = await make_gateway(), make_worker("worker-10")
    await gateway.submit(make_request("request"))
    first.exchange()
    assert make_worker("worker-1").exchange().num_recovered == 0


async def test_poison_request_is_quarantined(make_gateway, make_worker, redis_client, keys):
    gateway = await make_gateway(max_attempts=3)
    stream = await gateway.submit(make_request("poison", max_tokens=50))
    counts = []
    for number in range(3):
        victim = make_worker(f"victim-{number}")
        counts.append(victim.exchange().num_quarantined)
        assert list(victim.running) == ["poison"]
        victim.step()
        expire_lease(redis_client, keys, victim.name)
    exchange = make_worker("survivor").exchange()
    assert (exchange.assignments, exchange.num_quarantined, counts) == ([], 1, [0, 0, 0])
    events = await collect(stream)
    assert tokens(events) == tokens_of("poison", 0, 3)
    assert events[-1].finish_reason is FinishReason.ERROR
    assert "3 workers" in (events[-1].error or "")


async def test_innocent_requests_outlive_the_poison_they_were_served_beside(
    make_gateway, make_worker, redis_client, keys
):
    gateway = await make_gateway(max_attempts=3)
    names = ["a", "b", "poison", "c"]
    streams = {name: await gateway.submit(make_request(name, max_tokens=2)) for name in names}
    for number in range(20):
        worker = make_worker(f"worker-{number}")
        worker.exchange()
        while worker.running and "poison" not in worker.running:
            worker.step()
        if "poison" not in worker.running:
            break
        expire_lease(redis_client, keys, worker.name)  # holding the poison kills it
    for name, stream in streams.items():
        final = (await collect(stream))[-1]
        assert final.finish_reason is (FinishReason.ERROR if name == "poison" else FinishReason.LENGTH)


async def test_worker_holds_one_suspect_at_a_time_beside_others(make_gateway, make_worker, redis_client, keys):
    gateway = await make_gateway(max_attempts=2)
    for name in ("a", "b"):
        await gateway.submit(make_request(name))
    dead = make_worker("dead")
    dead.exchange()
    expire_lease(redis_client, keys, dead.name)
    for name in ("c", "d"):
        await gateway.submit(make_request(name))
    worker = make_worker("worker")
    assert [a.request.request_id for a in worker.exchange(capacity=3).assignments] == ["a", "c", "d"]
    assert worker.exchange().assignments == []
    worker.generate(["a"], num_tokens=4)
    assert [a.request.request_id for a in worker.exchange().assignments] == ["b"]


async def test_hand_backs_never_count_towards_quarantine(make_gateway, make_worker):
    gateway = await make_gateway(max_attempts=2)
    stream = await gateway.submit(make_request("request", max_tokens=9))
    for number in range(6):
        worker = make_worker(f"worker-{number}")
        assert [a.attempt for a in worker.exchange().assignments] == [number + 1]
        worker.step()
        worker.broker.close()
    last = make_worker("last")
    last.run_until_idle()
    events = await collect(stream)
    assert tokens(events) == tokens_of("request", 0, 9)
    assert events[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("is_noticed_by_gateway", [False, True])
async def test_counts_are_reported_exactly_once(make_gateway, make_worker, redis_client, keys, is_noticed_by_gateway):
    gateway, dead = await make_gateway(silence_s=60), make_worker("dead")
    for name in "abc":
        await gateway.submit(make_request(name))
    dead.exchange()
    expire_lease(redis_client, keys, dead.name)
    if is_noticed_by_gateway:
        await gateway.attach("a")
    workers = [make_worker(f"worker-{number}") for number in range(3)]
    assert sum(worker.exchange().num_recovered for worker in workers for _ in range(2)) == 3
