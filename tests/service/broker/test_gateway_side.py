"""Admission, streams, attach and abort, with a live worker and a live gateway."""

import asyncio
import time

import pytest
from synthetic import SyntheticWorker, make_request, tokens_of, until

from nibble.engine.protocol import FinishReason, RequestMetrics, TokenEvent
from nibble.service.broker.errors import BrokerUnavailable, DuplicateRequest, NoWorker, QueueFull, UnknownRequest
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.terms import Terms
from nibble.service.broker.token_stream import TokenStream


async def collect(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


async def test_request_streams_from_submit_to_its_end_on_every_server(server_url: str, namespace: str):
    gateway = GatewayBroker(server_url, "gateway", namespace=namespace, needs_worker=False)
    await gateway.start()
    worker = SyntheticWorker(server_url, "worker", namespace)
    streams = [await gateway.submit(make_request(f"request-{number}", max_tokens=20)) for number in range(5)]
    readers = [asyncio.create_task(collect(stream)) for stream in streams]
    await asyncio.to_thread(worker.run_until_idle)
    for number, events in enumerate(await asyncio.gather(*readers)):
        assert tokens(events) == tokens_of(f"request-{number}", 0, 20)
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason is FinishReason.LENGTH
    late = await gateway.attach("request-2", from_index=15)
    assert tokens(await collect(late)) == tokens_of("request-2", 15, 20)
    status = await gateway.status()
    assert (status.num_queued, status.num_running) == (0, 0)
    assert status.workers == (worker.info,)
    worker.broker.close()
    await gateway.close()


async def test_waiting_events_are_coalesced_into_one(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=6))
    worker.run_until_idle()
    await until(lambda: stream.is_complete)
    (event,) = await collect(stream)
    assert event == TokenEvent(
        request_id="request", index=0, token_ids=tokens_of("request", 0, 6), finish_reason=FinishReason.LENGTH
    )


async def test_metrics_of_the_final_event_reach_live_and_attached_streams(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=1))
    worker.exchange()
    metrics = RequestMetrics(
        prompt_tokens=3, cached_tokens=2, generated_tokens=1, queue_s=0.5, prefill_s=0.25, decode_s=0.0
    )
    worker.events = [
        TokenEvent(
            request_id="request",
            index=0,
            token_ids=tokens_of("request", 0, 1),
            finish_reason=FinishReason.STOP,
            metrics=metrics,
        )
    ]
    worker.exchange()
    for each in (stream, await gateway.attach("request")):
        events = await collect(each)
        assert (events[-1].finish_reason, events[-1].metrics) == (FinishReason.STOP, metrics)


async def test_requests_are_served_by_priority_then_arrival(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    for name, priority in [("a", 0), ("b", 5), ("c", -5), ("d", 0), ("e", -5), ("f", 4095), ("g", -4095)]:
        await gateway.submit(make_request(name, priority=priority))
    order = [worker.exchange(capacity=1).assignments[0].request.request_id for _ in range(7)]
    assert order == ["g", "c", "e", "a", "d", "b", "f"]


async def test_a_priority_is_worth_time_so_that_nobody_waits_for_ever(make_gateway, redis_client, keys):
    gateway = await make_gateway()
    for name, priority in [("a", 0), ("b", 1), ("c", -2)]:
        await gateway.submit(make_request(name, priority=priority))
    score = {name.decode(): score for name, score in redis_client.zrange(keys.queue, 0, -1, withscores=True)}
    per_s = 1000 * 1024  # see scripts/submit.lua
    assert (score["b"] - score["a"]) / per_s == pytest.approx(60, abs=5)
    assert (score["c"] - score["a"]) / per_s == pytest.approx(-120, abs=5)


async def test_priority_beyond_what_the_queue_can_order_is_an_error(make_gateway):
    gateway = await make_gateway()
    with pytest.raises(ValueError, match="4096"):
        await gateway.submit(make_request("request", priority=4096))
    assert (await gateway.status()).num_queued == 0


async def test_full_queue_refuses_until_a_worker_takes_a_request(make_gateway, make_worker):
    gateway, worker = await make_gateway(max_queued=2), make_worker()
    await gateway.submit(make_request("a"))
    await gateway.submit(make_request("b"))
    with pytest.raises(QueueFull) as refusal:
        await gateway.submit(make_request("c"))
    assert (refusal.value.queued, refusal.value.limit) == (2, 2)
    assert 1 <= refusal.value.retry_after_s <= 60
    worker.exchange(capacity=1)
    await gateway.submit(make_request("c"))


async def test_retry_after_follows_the_measured_service_rate(make_gateway, make_worker, redis_client, keys):
    gateway, worker = await make_gateway(max_queued=100), make_worker()
    for number in range(100):
        await gateway.submit(make_request(f"old-{number}", max_tokens=1))
    worker.exchange(capacity=20)
    worker.step(capacity=0)  # 20 requests are finished at once
    for number in range(20):
        await gateway.submit(make_request(f"new-{number}"))
    # as if the 20 had been measured over the last ten seconds: about 2 per second, half of 100 wait for 25 s
    fields = redis_client.hgetall(f"{keys.root}:rate")
    redis_client.hset(f"{keys.root}:rate", "first_ms", int(fields[b"first_ms"]) - 10_000)
    with pytest.raises(QueueFull) as refusal:
        await gateway.submit(make_request("refused"))
    assert refusal.value.retry_after_s == pytest.approx(50 / (20 / (30 * (1 - 2.718281828 ** (-10 / 30)))), rel=0.02)


async def test_no_live_worker_refuses_when_one_is_needed(make_gateway, make_worker, redis_client, keys):
    gateway = await make_gateway(needs_worker=True)
    with pytest.raises(NoWorker) as refusal:
        await gateway.submit(make_request("request"))
    assert refusal.value.retry_after_s > 0
    worker = make_worker()
    worker.exchange()
    await gateway.submit(make_request("request"))
    redis_client.zadd(keys.leases, {worker.name: 1})
    with pytest.raises(NoWorker):
        await gateway.submit(make_request("another"))


async def test_request_id_is_taken_while_it_runs_and_after_it_finished(make_gateway, make_worker):
    gateway, other, worker = await make_gateway(), await make_gateway("other"), make_worker()
    stream = await gateway.submit(make_request("request"))
    for each in (gateway, other):
        with pytest.raises(DuplicateRequest):
            await each.submit(make_request("request"))
    worker.run_until_idle()
    await collect(stream)
    with pytest.raises(DuplicateRequest):
        await gateway.submit(make_request("request"))


async def test_repeat_of_a_submit_with_its_nonce_queues_once(make_gateway):
    gateway = await make_gateway()
    for _ in range(2):
        await gateway._calls.submit(make_request("request"), "same", Terms())
    assert (await gateway.status()).num_queued == 1
    with pytest.raises(DuplicateRequest):
        await gateway._calls.submit(make_request("request"), "different", Terms())


async def test_attach_to_a_running_request_joins_log_and_live_events(make_gateway, make_worker):
    first, second, worker = await make_gateway("first"), await make_gateway("second"), make_worker()
    own = await first.submit(make_request("request", max_tokens=10))
    worker.exchange()
    for _ in range(4):
        worker.step()
    attached = await second.attach("request", from_index=2)
    again = await first.attach("request")
    worker.run_until_idle()
    assert tokens(await collect(own)) == tokens_of("request", 0, 10)
    events = await collect(attached)
    assert events[0].index == 2
    assert tokens(events) == tokens_of("request", 2, 10)
    assert tokens(await collect(again)) == tokens_of("request", 0, 10)


async def test_attach_to_a_queued_request_follows_it(make_gateway, make_worker):
    first, second, worker = await make_gateway("first"), await make_gateway("second"), make_worker()
    await first.submit(make_request("request"))
    attached = await second.attach("request")
    worker.run_until_idle()
    assert tokens(await collect(attached)) == tokens_of("request", 0, 4)


async def test_attach_to_an_unknown_request_is_an_error(make_gateway):
    gateway = await make_gateway()
    with pytest.raises(UnknownRequest):
        await gateway.attach("nothing")


async def test_log_of_a_finished_request_expires(make_gateway, make_worker):
    gateway, worker = await make_gateway(log_ttl_s=0.05), make_worker()
    stream = await gateway.submit(make_request("request"))
    worker.run_until_idle()
    await collect(stream)
    await asyncio.sleep(0.06)
    with pytest.raises(UnknownRequest):
        await gateway.attach("request")


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
async def test_aborted_request_ends_its_streams_and_leaves_its_worker(make_gateway, make_worker, reason):
    gateway, other, worker = await make_gateway(), await make_gateway("other"), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=100))
    worker.exchange()
    worker.step()
    attached = await other.attach("request")
    await other.abort("request", reason)
    for each in (stream, attached):
        events = await collect(each)
        assert tokens(events) == tokens_of("request", 0, 1)
        assert (events[-1].finish_reason, events[-1].error) == (reason, None)
    worker.generate()
    exchange = worker.exchange()
    assert exchange.dropped == ["request"]
    assert exchange.num_fenced == 0  # nobody took it over


async def test_aborted_request_in_the_queue_is_never_assigned(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request"))
    await gateway.abort("request")
    assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
    exchange = worker.exchange()
    assert (exchange.assignments, exchange.dropped) == ([], [])


async def test_abort_after_the_end_or_of_nothing_changes_nothing(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request"))
    worker.run_until_idle()
    await gateway.abort("request")
    await gateway.abort("nothing")
    assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH
    assert (await collect(await gateway.attach("request")))[-1].finish_reason is FinishReason.LENGTH


async def test_deadline_ends_a_queued_request_that_nobody_serves(make_gateway):
    gateway = await make_gateway()
    stream = await gateway.submit(make_request("request", deadline_s=time.time() + 0.05))
    (event,) = await asyncio.wait_for(collect(stream), 2)
    assert event.finish_reason is FinishReason.ERROR
    assert "deadline" in (event.error or "")


async def test_deadline_ends_a_running_request_and_frees_its_worker(make_gateway, make_worker, redis_client, keys):
    gateway, worker = await make_gateway(), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=100, deadline_s=time.time() + 60))
    worker.exchange()
    redis_client.zadd(keys.deadlines, {"request": 1})
    exchange = worker.exchange()
    assert exchange.dropped == ["request"]
    assert exchange.num_expired == 1
    assert (await collect(stream))[-1].finish_reason is FinishReason.ERROR


async def test_request_past_its_deadline_is_not_started(make_gateway, make_worker):
    gateway, worker = await make_gateway(silence_s=60), make_worker()
    stream = await gateway.submit(make_request("request", deadline_s=time.time() - 1))
    assert worker.exchange().assignments == []
    assert (await collect(stream))[-1].finish_reason is FinishReason.ERROR


async def test_queued_request_ends_when_no_worker_comes(make_gateway):
    gateway = await make_gateway(no_worker_timeout_s=0.2)
    stream = await gateway.submit(make_request("request"))
    (event,) = await asyncio.wait_for(collect(stream), 2)
    assert event.finish_reason is FinishReason.ERROR
    assert "no worker" in (event.error or "")


async def test_queued_request_waits_on_while_a_worker_lives(make_gateway, make_worker):
    gateway, worker = await make_gateway(no_worker_timeout_s=0.2), make_worker()
    stream = await gateway.submit(make_request("request"))
    worker.exchange(capacity=0)
    await asyncio.sleep(0.5)
    assert not stream.is_complete
    worker.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 4)


async def test_status_counts_queued_running_and_live_workers(make_gateway, make_worker, redis_client, keys):
    gateway, worker, lost = await make_gateway(), make_worker(), make_worker("lost")
    for number in range(3):
        await gateway.submit(make_request(f"request-{number}"))
    lost.exchange(capacity=0)
    worker.exchange(capacity=2)
    redis_client.zadd(keys.leases, {lost.name: 1})
    status = await gateway.status()
    assert (status.num_queued, status.num_running) == (1, 2)
    assert [info.worker_id for info in status.workers] == ["worker"]


async def test_closed_gateway_ends_its_streams_but_not_their_requests(make_gateway, make_worker):
    first, second, worker = await make_gateway("first"), await make_gateway("second"), make_worker()
    stream = await first.submit(make_request("request"))
    await first.close()
    assert (await collect(stream))[-1].finish_reason is FinishReason.ERROR
    attached = await second.attach("request")
    worker.run_until_idle()
    assert tokens(await collect(attached)) == tokens_of("request", 0, 4)


@pytest.mark.parametrize("loss", [BrokerUnavailable("lost on the way back"), asyncio.CancelledError()])
async def test_submit_whose_reply_is_lost_leaves_no_request_behind(make_gateway, redis_client, keys, monkeypatch, loss):
    gateway = await make_gateway()
    submit = gateway._calls.submit

    async def submit_and_lose_the_reply(request, nonce, terms):
        await submit(request, nonce, terms)
        raise loss

    monkeypatch.setattr(gateway._calls, "submit", submit_and_lose_the_reply)
    with pytest.raises(type(loss)):
        await gateway.submit(make_request("request"))
    assert len(gateway._streams) == 0
    await until(lambda: redis_client.zcard(keys.queue) == 0)
    await until(lambda: not gateway._checker.pending_aborts)


async def test_finished_streams_leave_the_table(make_gateway, make_worker):
    gateway, worker = await make_gateway(), make_worker()
    streams = [await gateway.submit(make_request(f"request-{number}")) for number in range(3)]
    worker.run_until_idle()
    for stream in streams:
        await collect(stream)
    assert len(gateway._streams) == 0


async def test_closed_stream_ends_at_once_and_is_forgotten(make_gateway):
    gateway = await make_gateway()
    stream = await gateway.submit(make_request("request"))
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    stream.close()
    assert await reader == []
    assert len(gateway._streams) == 0
