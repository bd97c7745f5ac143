"""The exchange: appends, capacity, lost calls and replies, waiting, leaving. A real gateway submits."""

import asyncio
import threading
import time

import pytest
import redis
from synthetic import SyntheticWorker, make_request, read_log, tokens_of

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.broker.errors import BrokerUnavailable
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import MAX_WAIT_S, WorkerBroker

INFO = WorkerInfo(worker_id="worker", model="m", device="none", state="ready")


def event(request_id: str, start: int, stop: int, finish_reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(
        request_id=request_id,
        index=start,
        token_ids=tokens_of(request_id, start, stop),
        finish_reason=finish_reason,
    )


async def test_exchange_takes_no_more_than_its_capacity(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    for number in range(5):
        await gateway.submit(make_request(f"request-{number}"))
    assert [len(worker.exchange(capacity).assignments) for capacity in (0, 2, 2, 2)] == [0, 2, 2, 1]


async def test_a_full_worker_takes_one_that_is_served_before_what_it_holds(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("lesser", priority=1, max_tokens=50))
    worker.exchange(capacity=1)
    for name, priority in [("same", 1), ("more", 0), ("urgent", -1), ("least", 2)]:
        await gateway.submit(make_request(name, priority=priority))
    assert worker.exchange(0).assignments == []
    taken = [[each.request.request_id for each in worker.exchange(0, ["lesser"]).assignments] for _ in range(4)]
    assert taken == [["urgent"], ["more"], [], []]  # those of its own priority came later
    assert worker.exchange(0, ["unknown"]).assignments == []
    worker.generate(num_tokens=1)
    worker.exchange(1)
    assert set(worker.running) == {"lesser", "urgent", "more", "same"}
    assert (await gateway.status()).num_queued == 1


async def test_a_full_worker_takes_a_request_for_each_one_that_is_to_be_served_later(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    for name, priority in [("least", 3), ("lesser", 2), ("same", 0)]:
        await gateway.submit(make_request(name, priority=priority, max_tokens=50))
    worker.exchange(capacity=3)
    for name, priority in [("first", -2), ("second", -1), ("third", 2), ("last", 4)]:
        await gateway.submit(make_request(name, priority=priority))

    def taken_for(*preemptible: str) -> list[str]:
        return [each.request.request_id for each in worker.exchange(0, preemptible).assignments]

    assert taken_for("least", "same", "lesser") == ["first", "second"]  # "third" is to be served after "lesser"
    assert taken_for("same", "least") == []  # the first of the queue is the one that is compared with the first
    assert taken_for("least", "lesser") == ["third"]
    assert (await gateway.status()).num_queued == 1


async def test_several_tokens_and_steps_append_in_order(make_gateway, make_worker, redis_client, keys):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("request", max_tokens=50))
    worker.exchange()
    worker.step(num_tokens=7)
    worker.generate(num_tokens=1)
    worker.generate(num_tokens=3)  # two events of one request in one exchange
    worker.exchange()
    assert read_log(redis_client, keys, "request") == tokens_of("request", 0, 11)


async def test_repeated_event_is_accepted_silently(make_gateway, make_worker, redis_client, keys):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("request", max_tokens=50))
    worker.exchange()
    worker.events = [event("request", 0, 4)]
    worker.exchange()
    for repeated in (event("request", 0, 4), event("request", 1, 3), event("request", 2, 6)):
        worker.events = [repeated]
        exchange = worker.exchange()
        assert (exchange.dropped, exchange.num_fenced) == ([], 0)
    assert read_log(redis_client, keys, "request") == tokens_of("request", 0, 6)


async def test_gap_puts_the_request_back_and_its_missing_tokens_are_generated_again(
    make_gateway, make_worker, redis_client, keys
):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=8))
    worker.exchange()
    worker.step(num_tokens=4)
    redis_client.set(keys.tokens("request"), redis_client.getrange(keys.tokens("request"), 0, 7))  # a lost write
    exchange = worker.step(capacity=8)
    assert exchange.dropped == ["request"]
    assert [(a.attempt, len(a.generated_token_ids)) for a in exchange.assignments] == [(2, 2)]
    worker.run_until_idle()
    assert [t async for e in stream for t in e.token_ids] == tokens_of("request", 0, 8)


@pytest.mark.parametrize("lost", ["call", "reply"])
async def test_tokens_survive_a_lost_exchange(make_gateway, make_worker, redis_client, keys, lost):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=6))
    worker.exchange()
    for _ in range(3):
        worker.generate(num_tokens=2)
        worker.link.lose_next = lost
        with pytest.raises(BrokerUnavailable):
            worker.exchange()
        exchange = worker.exchange()
        assert (exchange.dropped, exchange.assignments, exchange.num_fenced) == ([], [], 0)
    assert read_log(redis_client, keys, "request") == tokens_of("request", 0, 6)
    assert [t async for e in stream for t in e.token_ids] == tokens_of("request", 0, 6)


@pytest.mark.parametrize("lost", ["call", "reply"])
async def test_assignments_of_a_lost_reply_are_sent_again(make_gateway, make_worker, lost):
    gateway, worker = await make_gateway(), make_worker()
    for number in range(3):
        await gateway.submit(make_request(f"request-{number}"))
    worker.exchange(capacity=1)
    worker.link.lose_next = lost
    with pytest.raises(BrokerUnavailable):
        worker.exchange(capacity=1)
    again = worker.exchange(capacity=1 if lost == "call" else 0)
    assert [(a.request.request_id, a.attempt) for a in again.assignments] == [("request-1", 1)]
    assert worker.exchange(capacity=0).assignments == []


async def test_drop_of_a_lost_reply_is_sent_again(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("request"))
    worker.exchange()
    await gateway.abort("request")
    worker.link.lose_next = "reply"
    with pytest.raises(BrokerUnavailable):
        worker.exchange()
    assert worker.exchange().dropped == ["request"]


async def test_events_of_a_dropped_request_are_ignored(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("request"))
    worker.exchange()
    await gateway.abort("request")
    assert worker.exchange().dropped == ["request"]
    worker.events = [event("request", 0, 1)]
    exchange = worker.exchange()
    assert (exchange.dropped, exchange.num_fenced) == ([], 0)


async def test_final_event_with_an_error_ends_the_request(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request"))
    worker.exchange()
    worker.events = [
        TokenEvent(request_id="request", index=0, token_ids=[], finish_reason=FinishReason.ERROR, error="too long")
    ]
    worker.exchange()
    (final,) = [e async for e in stream]
    assert (final.finish_reason, final.error) == (FinishReason.ERROR, "too long")


async def test_thousands_of_sequences_fit_into_one_exchange(make_gateway, redis_url, namespace, redis_client, keys):
    gateway, worker = await make_gateway(max_queued=5000), SyntheticWorker(redis_url, "worker", namespace)
    for number in range(2100):
        await gateway.submit(make_request(f"request-{number}", max_tokens=2))
    assert len(worker.exchange(capacity=5000).assignments) == 2100
    for _ in range(2):
        worker.generate()
        worker.link.lose_next = "reply"
        with pytest.raises(BrokerUnavailable):
            worker.exchange()
        worker.exchange()
    assert read_log(redis_client, keys, "request-2099") == tokens_of("request-2099", 0, 2)
    assert redis_client.hlen(keys.worker(worker.name)) == 0
    worker.broker.close()


async def test_wait_returns_at_once_when_a_request_is_submitted(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    delays = []
    for number in range(20):
        worker.exchange(capacity=1)
        waiting = asyncio.create_task(asyncio.to_thread(worker.broker.wait, 10))
        await asyncio.sleep(0.005)
        started = time.perf_counter()
        await gateway.submit(make_request(f"request-{number}", max_tokens=1))
        await waiting
        delays.append(time.perf_counter() - started)
        assert len(worker.exchange(capacity=1).assignments) == 1
        worker.step(capacity=0)
    assert sorted(delays)[10] < 0.02  # the median, on a busy machine; the deadline of a wait is ten times that


async def test_wait_does_not_miss_a_submit_just_before_it(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    worker.exchange()
    await gateway.submit(make_request("request"))
    started = time.perf_counter()
    worker.broker.wait(10)
    assert time.perf_counter() - started < MAX_WAIT_S / 2


async def test_wait_returns_when_a_held_request_is_aborted(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("request"))
    worker.exchange(capacity=1)
    worker.exchange(capacity=0)  # full: other requests do not wake it
    await gateway.submit(make_request("another"))
    await gateway.abort("request")
    started = time.perf_counter()
    worker.broker.wait(10)
    assert time.perf_counter() - started < MAX_WAIT_S / 2
    assert worker.exchange().dropped == ["request"]


async def test_full_worker_does_not_take_the_wake_up_of_another(make_gateway, make_worker):
    gateway, full, idle = await make_gateway(), make_worker("full"), make_worker("idle")
    full.exchange(capacity=0)
    idle.exchange(capacity=1)
    await gateway.submit(make_request("request"))
    started = time.perf_counter()
    full.broker.wait(10)
    assert time.perf_counter() - started > MAX_WAIT_S / 2
    full.exchange(capacity=0)
    started = time.perf_counter()
    idle.broker.wait(10)
    assert time.perf_counter() - started < MAX_WAIT_S / 2
    assert len(idle.exchange(capacity=1).assignments) == 1


async def test_wake_up_taken_by_a_worker_that_became_full_is_passed_on(make_gateway, make_worker):
    gateway, first, second = await make_gateway(), make_worker("first"), make_worker("second")
    for worker in (first, second):
        worker.exchange(capacity=1)
    await gateway.submit(make_request("a"))
    first.broker.wait(10)  # takes the wake-up, but says that it is full in its exchange
    first.exchange(capacity=0)
    started = time.perf_counter()
    second.broker.wait(10)
    assert time.perf_counter() - started < MAX_WAIT_S / 2


async def test_idle_wait_ends_after_its_time_and_leaves_no_stale_wake_ups(
    make_gateway, make_worker, redis_client, keys
):
    gateway, worker = await make_gateway(), make_worker()
    for number in range(3):
        await gateway.submit(make_request(f"request-{number}", max_tokens=1))
    worker.run_until_idle()
    worker.exchange()
    assert redis_client.llen(keys.wake) == 0
    started = time.perf_counter()
    worker.broker.wait(0.05)
    assert 0.04 < time.perf_counter() - started < MAX_WAIT_S


async def test_close_hands_requests_back_to_their_place(make_gateway, make_worker, redis_client, keys):
    gateway, leaving, staying = await make_gateway(), make_worker("leaving"), make_worker("staying")
    streams = [await gateway.submit(make_request(f"request-{number}", max_tokens=6)) for number in range(3)]
    leaving.exchange(capacity=2)
    leaving.step(capacity=0)
    leaving.broker.close()
    assert redis_client.zcard(keys.leases) == 0
    exchange = staying.exchange()
    assert [(a.request.request_id, a.attempt, len(a.generated_token_ids)) for a in exchange.assignments] == [
        ("request-0", 2, 1),
        ("request-1", 2, 1),
        ("request-2", 1, 0),
    ]
    assert exchange.num_recovered == 0
    staying.run_until_idle()
    for number, stream in enumerate(streams):
        assert [t async for e in stream for t in e.token_ids] == tokens_of(f"request-{number}", 0, 6)


async def test_appends_after_a_hand_back_are_refused(make_gateway, make_worker):
    gateway, leaving = await make_gateway(), make_worker("leaving")
    await gateway.submit(make_request("request", max_tokens=6))
    leaving.exchange()
    # the process goes on using another connection after its hand-back, as a confused loop might
    held = dict(leaving.broker._attempts)
    leaving.broker.close()
    leaving.broker._attempts = held
    leaving.generate()
    exchange = leaving.exchange(capacity=0)
    assert (exchange.dropped, exchange.num_fenced) == (["request"], 1)


async def test_event_of_an_earlier_attempt_is_refused_from_the_same_worker(
    make_gateway, make_worker, redis_client, keys
):
    gateway, zombie, other = await make_gateway(), make_worker("zombie"), make_worker("other")
    await gateway.submit(make_request("request", max_tokens=9))
    zombie.exchange()
    redis_client.zadd(keys.leases, {zombie.name: 1})
    other.exchange(capacity=0)  # the request is back in the queue
    zombie.link.lose_next = "reply"  # of its new assignment: it still generates for the old one
    with pytest.raises(BrokerUnavailable):
        zombie.exchange()
    zombie.generate(num_tokens=2)
    exchange = zombie.exchange()
    assert read_log(redis_client, keys, "request") == []
    assert (exchange.dropped, exchange.num_fenced) == (["request"], 1)
    assert [(a.attempt, a.generated_token_ids) for a in exchange.assignments] == [(2, [])]


async def test_renew_keeps_a_lease_and_tells_when_it_is_lost(make_worker, redis_client, keys):
    worker = make_worker(lease_s=5)
    assert worker.broker.renew() is False
    worker.exchange()
    redis_client.zincrby(keys.leases, -2000, worker.name)
    before = redis_client.zscore(keys.leases, worker.name)
    results = []
    thread = threading.Thread(target=lambda: results.append(worker.broker.renew()))
    thread.start()
    thread.join()
    assert results == [True]
    assert redis_client.zscore(keys.leases, worker.name) > before + 1900


def test_unreachable_server_raises_and_wait_does_not_spin(tmp_path, namespace):
    with EmbeddedValkey(tmp_path) as server:
        broker = WorkerBroker(server.url, "worker", namespace=namespace)
        broker.exchange([], 1, INFO)
    with pytest.raises(BrokerUnavailable):
        broker.exchange([], 1, INFO)
    started = time.perf_counter()
    broker.wait(0.05)
    assert time.perf_counter() - started >= 0.045
    broker.close()  # logs, does not raise


def test_server_that_refuses_writes_is_unavailable(tmp_path, namespace):
    with EmbeddedValkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        broker = WorkerBroker(server.url, "worker", namespace=namespace)
        with pytest.raises(BrokerUnavailable):
            broker.exchange([], 1, INFO)
        client.config_set("maxmemory", 0)
        broker.exchange([], 1, INFO)
        broker.close()


async def test_scripts_are_loaded_again_when_the_server_forgot_them(make_gateway, make_worker, redis_client):
    gateway, worker = await make_gateway(), make_worker()
    worker.exchange()
    redis_client.script_flush()
    await gateway.submit(make_request("request"))
    redis_client.script_flush()
    assert len(worker.exchange().assignments) == 1
