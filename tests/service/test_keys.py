"""What a key looks like, the file that knows its hash, and the verbs that write it."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from candlecast import main
from service.keys import KeyFile, KeysUnreadable, grant, is_wellformed, parse_quota

TRADER = grant(name="trader", scopes=["forecast"])


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def test_a_key_is_found_by_its_whole_text_alone(file: KeyFile) -> None:
    key, record = file.make(TRADER)
    other, _ = file.make(TRADER)
    keys = file.read()
    assert keys.find(key.encode()) == record
    swapped = "_".join([*key.split("_")[:3], other.split("_")[3]])
    wrong = [key[:-1], key + "0", swapped, key.replace("cc_live_", "cc_test_"), ""]
    assert [keys.find(text.encode()) for text in wrong] == [None] * 5


def test_each_character_of_a_key_counts(file: KeyFile) -> None:
    key, _ = file.make(TRADER)
    assert is_wellformed(key.encode())
    for place, digit in enumerate(key):
        mistyped = key[:place] + ("1" if digit == "0" else "0") + key[place + 1 :]
        assert not is_wellformed(mistyped.encode()), mistyped


def test_neither_the_file_nor_a_record_holds_the_secret_and_only_its_owner_reads_it(file: KeyFile) -> None:
    key, record = file.make(TRADER)
    secret = key.rsplit("_", 1)[1]
    for path in file.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert secret not in path.read_text()
        assert secret[:43] not in path.read_text()
    assert record.hash not in f"{record!r} {record}"


def test_without_its_pepper_a_file_says_so_and_denies_nobody_silently(file: KeyFile) -> None:
    file.make(TRADER)
    pepper = file.path.with_name("keys.pepper")
    pepper.write_text("ab" * 32)
    with pytest.raises(KeysUnreadable, match="not the one"):
        file.read()
    pepper.unlink()
    with pytest.raises(KeysUnreadable, match="must lie beside"):
        file.read()


@pytest.mark.parametrize("text", ["", "[]", '{"keys": []}', '{"schema_version": 2, "pepper": "", "keys": []}'])
def test_a_file_that_is_none_of_keys_is_refused_without_its_content(file: KeyFile, text: str) -> None:
    file.make(TRADER)
    file.path.write_text(text)
    with pytest.raises(KeysUnreadable, match="is no file of keys"):
        file.read()


def test_a_rotated_key_counts_beside_the_new_one_until_its_time_is_over(file: KeyFile) -> None:
    old, before = file.make(TRADER, timedelta(days=90))
    new, record = file.rotate(before.kid, timedelta(hours=1))
    keys = file.read()
    changed = keys.find(old.encode())
    assert changed
    assert changed.expires_at
    assert record.expires_at
    assert changed.expires_at - record.created_at == timedelta(hours=1)
    assert (record.grant, record.expires_at - record.created_at) == (before.grant, timedelta(days=90))
    assert keys.find(new.encode()) == record
    file.rotate(before.kid, timedelta(days=7))  # again: an end that was near does not move away
    assert file.read().find(old.encode()) == changed


def test_a_revoked_key_is_found_no_more_and_cannot_be_rotated(file: KeyFile) -> None:
    key, record = file.make(TRADER)
    first = file.revoke(record.kid)
    assert file.revoke(record.kid) == first
    assert file.read().find(key.encode()) is None
    with pytest.raises(LookupError, match="does not count"):
        file.rotate(record.kid, timedelta(hours=1))
    with pytest.raises(LookupError, match="no key is called"):
        file.revoke("nobody")


def test_keys_that_are_made_at_once_are_all_there(file: KeyFile) -> None:
    file.make(TRADER)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: file.make(TRADER)[0], range(24)))
    keys = file.read()
    assert all(keys.find(key.encode()) for key in made)
    assert len(file.all()) == 25


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "a b"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes"),
        ({"symbols": ["BTC[A-Z]"]}, "no pattern"),
        ({"scopes": ["admin"], "symbols": ["BTC"]}, "every symbol"),
        ({"env": "li_ve"}, "env"),
    ],
)
def test_a_grant_that_makes_no_sense_says_why_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        grant(**{"name": "x", "scopes": ["forecast"], **fields})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "symbol", "covers"),
    [
        ("btc/*", "BTC-USDT", True),
        ("BTC-*", "BTC", False),
        ("AAPL", "AAPL", True),
        ("AAPL", "AAPLX", False),
        ("?SPX", "^SPX", True),
        ("*", "IBM", True),
    ],
)
def test_a_pattern_covers_symbols_as_the_api_writes_them(pattern: str, symbol: str, covers: bool) -> None:
    assert grant(name="x", scopes=["forecast"], symbols=[pattern]).covers(symbol) is covers


@pytest.mark.parametrize("text", ["", "5", "0/minute", "-1/minute", "5/fortnight", "1e3/minute", "5/minute/second"])
def test_what_is_no_quota_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no quota"):
        parse_quota(text)


def test_the_verbs_tell_a_key_once_and_never_again(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(main, ["keys", *words], env={"CANDLECAST_HOME": str(tmp_path)})
        assert done.exit_code == 0, done.output
        return done.stdout

    made = json.loads(run("make", "trader", "--symbol", "BTC-*", "--quota", "9/hour", "--expires", "90d", "--json"))
    assert KeyFile(tmp_path / "keys.json").read().find(made["key"].encode())
    assert (made["symbols"], made["quota"], made["scopes"]) == (["BTC-*"], "9/hour", ["forecast"])
    rotated = run("rotate", made["kid"], "--overlap", "24h").strip()
    assert run("revoke", made["kid"]) == f"{made['kid']} of trader counts no more\n"
    listed = json.loads(run("list", "--json"))
    assert [(each["kid"], bool(each["revoked_at"])) for each in listed] == [
        (made["kid"], True),
        (rotated.split("_")[2], False),
    ]
    for key in (made["key"], rotated):
        assert key.rsplit("_", 1)[1] not in run("list") + run("list", "--json")
