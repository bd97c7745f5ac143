import pytest
import redis
from redis.crc import key_slot
from synthetic import make_request

from nibble.service.broker.keys import Keys


@pytest.mark.parametrize("namespace", ["", "a{b", "a}b", "a:b", "a b"])
def test_namespace_that_would_break_key_names_is_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        Keys(namespace)


async def test_all_keys_of_a_deployment_share_its_slot(make_worker, make_gateway, redis_client: redis.Redis, keys):
    before = set(redis_client.scan_iter("*", count=1000))
    gateway, worker = await make_gateway(), make_worker()
    for number in range(4):
        await gateway.submit(make_request(f"request-{number}", max_tokens=3, deadline_s=4e9))
    worker.step(capacity=3)
    worker.step()
    await gateway.abort("request-0")
    written = set(redis_client.scan_iter("*", count=1000)) - before
    assert len(written) > 10
    assert {key_slot(key) for key in written} == {key_slot(keys.root.encode())}


async def test_two_namespaces_do_not_see_each_other(make_worker, make_gateway, redis_url: str):
    from nibble.service.broker.gateway_side import GatewayBroker

    other = GatewayBroker(redis_url, "gateway", namespace="test-other", needs_worker=True)
    gateway, worker = await make_gateway(), make_worker()
    await gateway.submit(make_request("request"))
    assert len(worker.exchange().assignments) == 1
    assert (await other.status()).workers == ()
    await other.close()
