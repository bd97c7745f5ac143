import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.wire import decode_event, decode_events, encode, pack_tokens, unpack_tokens

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1))


@given(TOKEN_IDS)
def test_tokens_survive_packing(token_ids: list[int]) -> None:
    assert unpack_tokens(pack_tokens(token_ids)) == token_ids


def test_packed_tokens_are_little_endian_uint32() -> None:
    assert pack_tokens([1, 0x01020304]) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


@pytest.mark.parametrize("token_ids", [[-1], [2**32], [1, -1], [1, 2**32]])
def test_token_id_that_does_not_fit_is_an_error(token_ids: list[int]) -> None:
    with pytest.raises(OverflowError):
        pack_tokens(token_ids)


@given(st.lists(st.builds(TokenEvent, request_id=st.text(), index=st.integers(0, 2**31), token_ids=TOKEN_IDS)))
def test_events_behind_an_array_header_are_a_message(events: list[TokenEvent]) -> None:
    message = b"\xdd" + len(events).to_bytes(4, "big") + b"".join(encode(event) for event in events)
    assert decode_events(message) == events


@pytest.mark.parametrize("index", [0, 1, 127, 128, 70000])
@pytest.mark.parametrize("error", ["why", None])
def test_event_packed_by_a_script_decodes(redis_client: redis.Redis, index: int, error: str | None) -> None:
    script = "return cmsgpack.pack({ARGV[1], ARGV[2] / 4, {}, 'error', ARGV[3] ~= '' and ARGV[3] or nil})"
    packed = redis_client.eval(script, 0, "request", index * 4, error or "")
    expected = TokenEvent(
        request_id="request", index=index, token_ids=[], finish_reason=FinishReason.ERROR, error=error
    )
    assert decode_event(packed) == expected


def test_event_with_a_field_from_the_future_decodes() -> None:
    packed = msgspec.msgpack.encode(["request", 0, [], None, None, None, None, None, [], "new"])
    assert decode_event(packed) == TokenEvent(request_id="request", index=0, token_ids=[])
