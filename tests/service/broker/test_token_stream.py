import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import logprobs_of, tokens_of

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.stream_table import StreamTable
from nibble.service.broker.token_stream import NEVER_S, TokenStream
from nibble.service.broker.wire import encode

LENGTH = 12


def event(start: int, stop: int, is_final: bool = False, request_id: str = "request") -> TokenEvent:
    return TokenEvent(
        request_id=request_id,
        index=start,
        token_ids=tokens_of(request_id, start, stop),
        finish_reason=FinishReason.LENGTH if is_final else None,
        logprobs=logprobs_of(request_id, start, stop),
    )


async def collect(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]


SPANS = st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted)


@given(
    spans=st.lists(SPANS, max_size=30),
    from_index=st.integers(0, LENGTH),
    drains=st.sets(st.integers(0, 30)),
    name=st.sampled_from(["request", "request-1"]),
)
def test_any_order_of_offers_is_delivered_contiguously(spans, from_index, drains, name):
    async def run() -> list[TokenEvent]:
        stream = TokenStream(name, from_index)
        delivered = []
        for number, (start, stop) in enumerate(spans):
            has_gap = start > len(stream.log.token_ids)
            assert stream.offer(event(start, stop, False, name)) is not has_gap
            num_delivered = sum(len(each.token_ids) for each in delivered)
            if number in drains and len(stream.log.token_ids) > from_index + num_delivered:
                delivered.append(await anext(stream))
        stream.offer(event(len(stream.log.token_ids), LENGTH, True, name))
        stream.offer(event(0, LENGTH, True, name))
        return delivered + await collect(stream)

    delivered = asyncio.run(run())
    index = from_index
    for each in delivered:
        assert each.index == index
        assert each.logprobs == logprobs_of(name, index, index + len(each.token_ids))
        index += len(each.token_ids)
    assert [t for each in delivered for t in each.token_ids] == tokens_of(name, from_index, LENGTH)
    assert [each.finish_reason for each in delivered] == [None] * (len(delivered) - 1) + [FinishReason.LENGTH]


async def test_stream_from_beyond_the_end_has_the_final_event_alone():
    stream = TokenStream("request", LENGTH + 5)
    stream.offer(event(0, LENGTH, is_final=True))
    (final,) = await collect(stream)
    assert (final.index, final.token_ids, final.finish_reason) == (LENGTH, [], FinishReason.LENGTH)


async def test_reader_that_timed_out_loses_nothing():
    stream = TokenStream("request")
    stream.offer(event(0, 1))
    assert (await anext(stream)).token_ids == tokens_of("request", 0, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    stream.offer(event(1, 3))
    assert (await anext(stream)) == event(1, 3)


async def test_ended_stream_stays_ended():
    stream = TokenStream("request")
    stream.offer(event(0, 2, is_final=True))
    stream.fail("too late to fail")
    assert await collect(stream) == [event(0, 2, is_final=True)]
    assert await collect(stream) == []


async def test_failed_stream_delivers_what_it_has_then_the_error():
    stream = TokenStream("request")
    stream.offer(event(0, 2))
    stream.fail("why")
    (last,) = await collect(stream)
    assert last.token_ids == tokens_of("request", 0, 2)
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "why")


async def test_gap_asks_for_the_log():
    stream = TokenStream("request")
    assert stream.heard_s > NEVER_S
    assert not stream.offer(event(1, 2))
    assert stream.heard_s == NEVER_S


def message(*events: TokenEvent) -> bytes:
    return b"\xdd" + len(events).to_bytes(4, "big") + b"".join(map(encode, events))


async def test_table_delivers_to_all_streams_of_a_request_and_ignores_others():
    table = StreamTable()
    streams = [TokenStream("request"), TokenStream("request", 1), TokenStream("another")]
    for stream in streams:
        table.add(stream)
    assert table.dispatch(message(event(0, 2), event(0, 1, request_id="unknown")))
    assert [len(stream.log.token_ids) for stream in streams] == [2, 2, 0]
    assert "request" in table
    assert table.dispatch(message(event(2, 3, is_final=True)))
    assert "request" not in table
    assert len(table) == 1


async def test_table_keeps_a_request_whose_final_event_did_not_fit():
    table = StreamTable()
    behind, level = TokenStream("request"), TokenStream("request")
    table.add(behind)
    table.add(level)
    level.offer(event(0, 2))
    assert not table.dispatch(message(event(2, 3, is_final=True)))
    assert (level.is_complete, behind.is_complete) == (True, False)
    assert table.silent(1000) == ["request"]
    table.offer(event(0, 3, is_final=True))
    assert behind.is_complete
    assert len(table) == 0


async def test_silent_streams_are_found_longest_silence_first():
    table = StreamTable()
    for name, heard_s in [("a", 5.0), ("b", 1.0), ("c", float("inf"))]:
        stream = TokenStream(name)
        stream.heard_s = heard_s
        table.add(stream)
    assert table.silent(0.0) == ["b", "a"]
