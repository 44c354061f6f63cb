"""Checkpoints of the hub: the official client over real HTTP, against a server that speaks what it asks for."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save

from bench.published import KRONOS_TINY, TOTO_TINY, random_weights, toto_config
from candlecast import main
from model_store.hub import FetchFailed
from model_store.store import ModelStore
from model_store.upstream import ImportRefused, import_checkpoint

ROOT = Path(__file__).parents[2]
TOTO = "Datadog/Toto-Open-Base-1.0"
Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories by id: commits, the branches and tags that point at them, and what goes wrong on the way."""

    url: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    gated: bool = False
    spoil: Callable[[bytes], bytes] = bytes  # of what is sent; its size is the one that was announced
    cut: int | None = None  # bytes after which the connection ends, once
    announced: int = 0  # bytes that a file is said to have more than it has

    def push(self, repository: str, files: Files, ref: str = "main") -> str:
        commit = sha1(repr((repository, files)).encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.refs.setdefault(repository, {})[ref] = commit
        return commit


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        kind, *rest = unquote(self.path).partition("?")[0].strip("/").split("/")
        self.hub.asked.append(self.path)
        self.hub.tokens.add(self.headers.get("Authorization"))
        rest = rest[1:] if kind == "api" else [kind, *rest]
        repository, (verb, revision, *path) = "/".join(rest[:2]), rest[2:] if len(rest) > 3 else ["", ""]
        commits = self.hub.commits.get(repository, {})
        commit = self.hub.refs.get(repository, {}).get(revision, revision)
        if self.hub.gated:
            self.refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif not commits:
            self.refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif commit not in commits:
            self.refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        elif verb == "resolve":
            self.send_file(commit, commits[commit]["/".join(path)])
        else:
            files = [self.entry(name, data) for name, data in commits[commit].items()]
            self.send_json(files if verb == "tree" else {"id": repository, "sha": commit, "siblings": []})

    do_HEAD = do_GET

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        found = {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
        large = {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found | ({"lfs": large} if name.endswith(".safetensors") else {})

    def send_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, commit: str, data: bytes) -> None:
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(HTTPStatus.PARTIAL_CONTENT if first else HTTPStatus.OK)
        self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(data) + self.hub.announced))
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = self.hub.spoil(data)[first:]
        if self.hub.cut is not None and len(sent) > self.hub.cut:
            sent, self.hub.cut, self.close_connection = sent[: self.hub.cut], None, True
        self.wfile.write(sent)

    def refuse(self, status: HTTPStatus, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Not to the test's output."""


def start_client_anew(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path, offline: bool = False) -> None:
    """As if the client, which reads its environment when it is imported, started with this one."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Empty; this process' client talks to it and to nobody else."""
    served = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"hub": served})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        start_client_anew(monkeypatch, served.url, tmp_path / "cache")
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "artifacts")


def published(config: dict[str, Any], weights: dict[str, Any], card: str = "") -> Files:
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": card.encode(),
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(weights),
        "pytorch_model.bin": b"a pickle that nobody asked for",
    }


def toto_files(seed: int = 3) -> Files:
    weights = random_weights("toto", toto_config(TOTO_TINY), seed)
    return published(TOTO_TINY, weights, "---\nlicense: apache-2.0\n---\n# Toto\n")


def kronos_files(**predictor: int) -> tuple[Files, Files]:
    """Predictor and tokenizer."""
    config = KRONOS_TINY | {"predictor": KRONOS_TINY["predictor"] | predictor}
    weights = random_weights("kronos", config)
    parts = ({k.partition(".")[2]: v for k, v in weights.items() if k.startswith(part)} for part in config)
    found = dict(zip(config, parts, strict=True))
    card = "---\nlicense: mit\n---\n"
    return published(config["predictor"], found["predictor"], card), published(config["tokenizer"], found["tokenizer"])


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}


def fails(store: ModelStore, reference: str, match: str, **options: Any) -> None:
    with pytest.raises(FetchFailed, match=match):
        import_checkpoint(store, reference, "imported", **options)
    assert store.models() == [], "something was stored"


# -- what is fetched ----------------------------------------------------------------------------


def test_a_toto_of_the_hub_becomes_a_version_that_names_its_commit(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    commit = hub.push(TOTO, toto_files())
    manifest = import_checkpoint(store, f"hf://{TOTO}", "toto")
    assert (manifest.origin.source, manifest.origin.revision) == (TOTO, commit)
    assert (manifest.origin.licence, manifest.origin.tokenizer) == ("apache-2.0", None)
    assert store.verify(f"toto@{manifest.version}") == manifest
    assert cached(tmp_path) == {"README.md", "config.json", "model.safetensors"}
    assert not [path for path in hub.asked if "pytorch_model" in path]


@pytest.mark.parametrize(
    ("layers", "width", "name"),
    [(4, 256, "Kronos-Tokenizer-2k"), (8, 512, "Kronos-Tokenizer-base"), (12, 832, "Kronos-Tokenizer-base")],
    ids=["mini", "small", "base"],
)
def test_a_predictor_without_tokenizer_asks_for_the_one_that_it_was_trained_with(
    hub: Hub, store: ModelStore, layers: int, width: int, name: str
) -> None:
    predictor, _ = kronos_files()
    config = json.loads(predictor["config.json"]) | {"n_layers": layers, "d_model": width}
    hub.push("me/kronos-mine", predictor | {"config.json": json.dumps(config).encode()})
    fails(store, "hf://me/kronos-mine", rf"hf://NeoQuasar/{name} cannot be fetched.*`--tokenizer {name}`$")
    assert f"/api/models/NeoQuasar/{name}/revision/main" in hub.asked


def with_group(files: Files, group_size: int) -> bytes:
    return json.dumps(json.loads(files["config.json"]) | {"group_size": group_size}).encode()


def test_both_parts_of_a_kronos_are_named_by_their_commits(hub: Hub, store: ModelStore) -> None:
    predictor, tokenizer = kronos_files(n_layers=4, d_model=256, n_heads=4)
    matching = tokenizer | {"config.json": with_group(tokenizer, 5)}
    commits = hub.push("NeoQuasar/Kronos-mini", predictor), hub.push("NeoQuasar/Kronos-Tokenizer-2k", matching)
    manifest = import_checkpoint(store, "hf://NeoQuasar/Kronos-mini", "kronos-mini")
    origin = manifest.origin
    assert (origin.source, origin.revision, origin.licence) == ("NeoQuasar/Kronos-mini", commits[0], "mit")
    assert (origin.tokenizer, origin.tokenizer_revision) == ("NeoQuasar/Kronos-Tokenizer-2k", commits[1])
    assert manifest.limits.max_total == 2048


def test_a_tokenizer_may_be_named_and_must_be_of_the_kind_that_the_predictor_was_trained_with(
    hub: Hub, store: ModelStore
) -> None:
    predictor, tokenizer = kronos_files(n_layers=4, d_model=256, n_heads=4)
    hub.push("NeoQuasar/Kronos-mini", predictor)
    tuned = hub.push("me/my-tokenizer", tokenizer | {"config.json": with_group(tokenizer, 5)}, "v2")
    hub.push("me/my-tokenizer", tokenizer)
    with pytest.raises(ImportRefused, match=r"group_size 4: predictors of this size .*Kronos-Tokenizer-2k"):
        import_checkpoint(store, "hf://NeoQuasar/Kronos-mini", "kronos", tokenizer="hf://me/my-tokenizer")
    origin = import_checkpoint(
        store, "hf://NeoQuasar/Kronos-mini", "kronos", tokenizer="hf://me/my-tokenizer@v2"
    ).origin
    assert (origin.tokenizer, origin.tokenizer_revision) == ("me/my-tokenizer", tuned)


def test_a_tokenizer_inside_the_repository_is_its_own(hub: Hub, store: ModelStore) -> None:
    predictor, tokenizer = kronos_files()
    hub.push("me/kronos-mine", predictor | {f"tokenizer/{name}": data for name, data in tokenizer.items()})
    origin = import_checkpoint(store, "hf://me/kronos-mine", "kronos-mine").origin
    assert (origin.source, origin.tokenizer) == ("me/kronos-mine", None)


def test_a_branch_that_moved_is_another_version_and_a_commit_stays_what_it_was(hub: Hub, store: ModelStore) -> None:
    old = hub.push(TOTO, toto_files(seed=1))
    first = import_checkpoint(store, f"hf://{TOTO}", "toto")
    new = hub.push(TOTO, toto_files(seed=2))
    second = import_checkpoint(store, f"hf://{TOTO}", "toto")
    assert [m.origin.revision for m in (first, second)] == [old, new]
    assert first.version != second.version
    assert import_checkpoint(store, f"hf://{TOTO}@{old}", "toto") == first
    assert import_checkpoint(store, f"hf://{TOTO}@main", "toto") == second


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, store: ModelStore) -> None:
    files = toto_files()
    hub.push(TOTO, files)
    hub.cut = len(files["model.safetensors"]) // 2
    manifest = import_checkpoint(store, f"hf://{TOTO}", "toto")
    assert hub.cut is None
    assert store.verify(f"toto@{manifest.version}") == manifest


def test_what_was_fetched_once_is_imported_again_without_a_network(
    hub: Hub, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(TOTO, toto_files())
    first = import_checkpoint(store, f"hf://{TOTO}", "toto")
    start_client_anew(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    hub.asked.clear()
    assert import_checkpoint(store, f"hf://{TOTO}", "toto") == first
    assert hub.asked == []


def test_a_folder_downloaded_by_hand_tells_its_commit(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    commit = hub.push(TOTO, toto_files())
    folder = snapshot_download(TOTO, local_dir=tmp_path / "Toto-Open-Base-1.0", ignore_patterns="*.bin")
    origin = import_checkpoint(store, folder, "toto").origin
    assert (origin.source, origin.revision) == ("Toto-Open-Base-1.0", commit)


# -- what is not --------------------------------------------------------------------------------

BY_HAND = (
    r"By hand: `hf download Datadog/Toto-Open-Base-1\.0 --local-dir Toto-Open-Base-1\.0`"
    r" on a machine that reaches it, copy the folder, `candlecast store import Toto-Open-Base-1\.0` .*\)$"
)


def test_offline_the_way_by_hand_is_told(
    hub: Hub, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_client_anew(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    fails(store, f"hf://{TOTO}", rf"OfflineModeIsEnabled.*{BY_HAND}")
    assert hub.asked == []


def test_without_a_network_the_way_by_hand_is_told(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_client_anew(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    fails(store, f"hf://{TOTO}", rf"ConnectError.*{BY_HAND}")


def test_a_gated_checkpoint_says_so_and_the_way_by_hand(hub: Hub, store: ModelStore) -> None:
    hub.gated = True
    fails(store, f"hf://{TOTO}", rf"GatedRepoError: 403.*{BY_HAND}")


@pytest.mark.parametrize(
    ("reference", "kind"), [("a/b", "RepositoryNotFoundError"), (f"{TOTO}@v9", "RevisionNotFound")]
)
def test_what_the_hub_does_not_have_is_said(hub: Hub, store: ModelStore, reference: str, kind: str) -> None:
    hub.push(TOTO, toto_files())
    fails(store, f"hf://{reference}", kind)


def test_a_file_shorter_than_announced_is_not_imported(hub: Hub, store: ModelStore) -> None:
    hub.push(TOTO, toto_files())
    hub.announced = 1
    fails(store, f"hf://{TOTO}", "Consistency check failed")


def test_a_file_with_one_wrong_bit_is_not_imported(hub: Hub, store: ModelStore) -> None:
    hub.push(TOTO, toto_files())
    hub.spoil = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    fails(store, f"hf://{TOTO}", r"model\.safetensors is not what the hub announced")
    hub.spoil = bytes  # and stays out of the store however often it is tried
    fails(store, f"hf://{TOTO}", r"model\.safetensors is not what the hub announced")


@pytest.mark.parametrize("reference", ["hf://Toto", "hf://a/b/c", "hf://a/b@", "hf://../etc@x y"])
def test_what_is_no_reference_is_refused_before_anybody_is_asked(hub: Hub, store: ModelStore, reference: str) -> None:
    fails(store, reference, "is not hf://OWNER/NAME")
    assert hub.asked == []


def test_parts_of_a_checkpoint_are_refused(hub: Hub, store: ModelStore) -> None:
    files = toto_files()
    part = files.pop("model.safetensors")
    hub.push(TOTO, files | {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": part})
    with pytest.raises(ImportRefused, match=r"no model\.safetensors, but parts of one"):
        import_checkpoint(store, f"hf://{TOTO}", "toto")


def test_without_the_client_the_extra_is_named(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(store, f"hf://{TOTO}", r"pip install 'candlecast\[hub\]'")


# -- the command --------------------------------------------------------------------------------


def test_the_command_names_the_model_after_its_repository(hub: Hub, tmp_path: Path) -> None:
    hub.push(TOTO, toto_files())
    done = CliRunner().invoke(main, ["store", "import", f"hf://{TOTO}@main", "--store", str(tmp_path / "artifacts")])
    assert done.exit_code == 0, done.output
    assert ModelStore(tmp_path / "artifacts").models() == ["toto-open-base-1.0"]


def test_the_client_takes_its_settings_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    commit = hub.push(TOTO, toto_files())
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    program = f"from model_store.hub import fetch; print(fetch('hf://{TOTO}', ''))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.startswith(str(tmp_path / "home")), done.stdout.endswith(f"{commit}\n")) == (True, True)
    assert "Bearer hf_mine" in hub.tokens
