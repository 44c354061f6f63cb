"""A snapshot cut into keys is what Redis itself says of each."""

from mmap import ACCESS_READ, mmap
from pathlib import Path

import pytest

from service.snapshot import Snapshot, _checksums, payloads
from service.state import PrivateRedis, connect

pytestmark = pytest.mark.anyio


def test_the_checksum_is_that_of_jones() -> None:
    assert _checksums([b"123456789", b"", b"\x00"]) == [0xE9C6D914C4B8D9CA, 0, 0]


async def test_every_form_of_every_value_is_as_dump_has_it(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path / "redis")
    client = connect(f"{server.url}?db=2")
    await server.start(client)
    many = [f"{place} {'x' * (place % 90)}" for place in range(900)]
    for name, value in {"i8": 7, "i16": -3000, "i32": 70_000, "i64": 2**40, "raw": "a", "lzf": "b" * 70_000}.items():
        await client.set(name, value)
    await client.set(b"noise", bytes(range(256)) * 80)
    await client.set("key " * 40, "its name is compressed", px=100_000)
    await client.set(12, "its name is a number", px=200_000)
    for key, each in {"few": many[:3], "many": many}.items():
        await client.rpush(f"list {key}", *each)
        await client.sadd(f"set {key}", *each)
        await client.hset(f"hash {key}", mapping={name: name * 2 for name in each})
        await client.zadd(f"sorted {key}", {name: place / 3 for place, name in enumerate(each)})
    await client.sadd("numbers", *range(300))
    elsewhere = connect(server.url)
    await elsewhere.set("another database's", 1)
    await client.save()
    keys = [key async for key in client.scan_iter()]
    dumps = {key: await client.dump(key) for key in keys}  # type: ignore[no-untyped-call]
    left = {key: await client.pttl(key) for key in keys}
    with open(tmp_path / "redis" / "dump.rdb", "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        snapshot = Snapshot(data)
        kept = list(snapshot.keys(2))
    assert (
        dict(zip((each.key for each in kept), payloads([e.value for e in kept], snapshot.version), strict=True))
        == dumps
    )
    assert {each.key for each in kept if each.expires_at} == {key for key, its in left.items() if its > 0}
    assert all(
        abs(each.expires_at - 1000 * snapshot.made_at - left[each.key]) < 30_000 for each in kept if each.expires_at
    )
    await client.xadd("stream", {"a": 1})
    await client.save()
    with (
        open(tmp_path / "redis" / "dump.rdb", "rb") as file,
        mmap(file.fileno(), 0, access=ACCESS_READ) as data,
        pytest.raises(ValueError, match=r"stream.*not ours"),
    ):
        list(Snapshot(data).keys(2))
    await elsewhere.aclose()
    await client.aclose()
    await server.stop()
