"""`owner/name` fetched from a hub on the loopback interface: whole, resumed, refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanocupy.errors import CapacityError, ConfigError, DownloadError
from nanocupy.hub import pull_model, resolve_model
from nanocupy.hub.cache import cache_dir
from nanocupy.hub.http import HttpClient
from nanocupy.hub.huggingface import HubName, choose_files, client_from_environment, pull_repo
from tests.hub.loopback import COMMIT, Hub, serve

WEIGHTS = random.Random(1).randbytes(3_000_000)
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "generation_config.json": b"",
    "chat_template.jinja": "{{ 'ü' }}".encode(),
}
NAME = HubName("acme", "tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    files = {**SMALL, "README.md": b"not needed", "model.safetensors": WEIGHTS}
    with serve(Hub(files=files, lfs={"model.safetensors"})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def quick(hub: Hub, token: str | None = None) -> HttpClient:
    return HttpClient(hub.endpoint, token, timeout_s=5, stalls=3, backoff_s=0.001)


def fetch(hub: Hub, **options: object) -> Path:
    return pull_repo(NAME, progress=False, client=quick(hub), **options)  # type: ignore[arg-type]


def left_in_cache() -> set[str]:
    return {p.name for p in cache_dir().rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_brings_the_files_a_model_needs_and_no_others(hub: Hub) -> None:
    folder = pull_model("acme/tiny", progress=False)
    assert folder.name == COMMIT
    assert {p.name for p in folder.iterdir()} == {*SMALL, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "chat_template.jinja").read_bytes() == SMALL["chat_template.jinja"]
    assert not any(p.name.endswith((".partial", ".part")) for p in cache_dir().rglob("*"))


def test_a_cached_model_needs_no_network(hub: Hub) -> None:
    folder = pull_model("acme/tiny", progress=False)
    hub.requests.clear()
    assert resolve_model("acme/tiny", progress=False) == folder
    assert hub.requests == []


def test_pull_asks_for_news_but_fetches_nothing_twice(hub: Hub) -> None:
    pull_model("acme/tiny", progress=False)
    hub.requests.clear()
    pull_model("acme/tiny", progress=False)
    assert len(hub.requests) == 1
    pull_model("acme/tiny", force=True, progress=False)
    assert any(path.endswith("model.safetensors") for path in hub.paths())


def test_resumes_within_a_pull_where_connections_break(hub: Hub) -> None:
    hub.cut_after["model.safetensors"] = [1_200_000, 1_100_000]
    folder = fetch(hub)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [h.get("range") for p, h in hub.requests if p.endswith("model.safetensors")]
    assert ranges == [None, "bytes=1200000-", "bytes=2300000-"]


def test_resumes_in_a_later_pull(hub: Hub) -> None:
    hub.cut_after["model.safetensors"] = [1_000_000, 0, 0]  # as many as quick() tolerates
    with pytest.raises(DownloadError, match="check the network"):
        fetch(hub)
    assert not (NAME.folder / COMMIT).exists()
    hub.requests.clear()
    fetch(hub)
    asked = [h.get("range") for p, h in hub.requests if p.endswith("model.safetensors")]
    assert asked == ["bytes=1000000-"]
    assert not any(p.endswith("config.json") for p in hub.paths())  # it had arrived


def test_begins_again_where_the_server_ignores_ranges(hub: Hub) -> None:
    hub.cut_after["model.safetensors"] = [1_500_000]
    hub.ignore_ranges = True
    assert (fetch(hub) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_always_breaks_off_is_given_up(hub: Hub) -> None:
    hub.cut_after["model.safetensors"] = [10] * 1000
    with pytest.raises(DownloadError, match="ended early"):
        fetch(hub)
    assert len(hub.cut_after["model.safetensors"]) > 990


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_digest_is_thrown_away(hub: Hub, name: str) -> None:
    content = hub.files[name]
    hub.wrong_content[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(DownloadError, match=f"{name} is damaged"):
        fetch(hub)
    assert name not in left_in_cache()
    assert f"{name}.part" not in left_in_cache()
    hub.wrong_content.clear()
    assert (fetch(hub) / name).read_bytes() == content


def test_more_bytes_than_announced_are_refused(hub: Hub) -> None:
    hub.wrong_content["config.json"] = SMALL["config.json"] + b" " * 5_000_000
    with pytest.raises(DownloadError, match="more than the 23 bytes"):
        fetch(hub)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "set HF_TOKEN"),
        (403, "gated"),
        (404, "no such model"),
        (500, "no answer to use"),
        (429, "no answer to use"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, status: int, words: str) -> None:
    hub.status["/main"] = status
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(hub)
    assert "\n" not in str(caught.value)
    assert "acme/tiny" in str(caught.value)


def test_an_unreachable_hub_says_what_to_do() -> None:
    client = HttpClient("http://127.0.0.1:9", stalls=2, backoff_s=0.001, timeout_s=2)
    with pytest.raises(DownloadError, match="HF_ENDPOINT to a mirror"):
        client.get_json("/x", what="acme/tiny")


def test_the_token_reaches_the_endpoint_and_no_other_host(hub: Hub) -> None:
    with serve(Hub(files=hub.files)) as storage:
        hub.redirect_to = storage.endpoint
        pull_repo(NAME, progress=False, client=quick(hub, token="secret"))
        assert {h.get("authorization") for _, h in hub.requests} == {"Bearer secret"}
        assert len(storage.requests) == len(SMALL)  # the empty file is not asked for
        assert {h.get("authorization") for _, h in storage.requests} == {None}


def test_a_redirect_out_of_http_is_refused(hub: Hub) -> None:
    hub.redirect_to = "ftp://127.0.0.1"
    with pytest.raises(DownloadError, match="not followed"):
        fetch(hub)
    hub.redirect_to = "file:///etc"
    with pytest.raises(DownloadError):
        fetch(hub)


@pytest.mark.parametrize("token", ["a b", "x\ny", "ü"])
def test_a_token_that_would_break_the_header_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="HF_TOKEN") as caught:
        HttpClient("http://127.0.0.1:9", token)
    assert token not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["ftp://host", "host", "file:///etc/passwd", "http://"])
def test_an_endpoint_that_is_no_address_is_refused(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ConfigError, match="HF_ENDPOINT"):
        client_from_environment()


@pytest.mark.parametrize(
    "hostile",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "..\\evil.safetensors",
        ".hidden.safetensors",
        "a\0b.safetensors",
        "sub/dir/evil.safetensors",
        "C:evil.safetensors",
        "evil\n.safetensors",
    ],
)
def test_hostile_file_names_are_never_asked_for(hub: Hub, hostile: str, tmp_path: Path) -> None:
    hub.files[hostile] = b"evil"
    hub.lfs.add(hostile)
    folder = fetch(hub)
    assert {p.name for p in folder.iterdir()} == {*SMALL, "model.safetensors"}
    assert not any("evil" in path for path in hub.paths())
    assert not any("evil" in p.name for p in tmp_path.rglob("*"))


def _listing(**changes: object) -> dict[str, object]:
    weights = {"rfilename": "model.safetensors", "size": 4, "lfs": {"sha256": "0" * 64}}
    config = {"rfilename": "config.json", "size": 2, "blobId": "0" * 40}
    return {"sha": COMMIT, "siblings": [config, {**weights, **changes}]}


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ([], "names no commit"),
        ({"sha": "../..", "siblings": []}, "names no commit"),
        ({"sha": COMMIT, "siblings": "x"}, "no list of files"),
        ({"sha": COMMIT, "siblings": [{}, 3, {"rfilename": 7}]}, "no config.json"),
        (_listing(size=-1), "the size '-1'"),
        (_listing(size=1 << 60), "the size"),
        (_listing(size="4"), "the size"),
        (_listing(size=True), "the size"),
        (_listing(lfs={"sha256": "xyz"}), "no digest"),
        (_listing(lfs=None), "no digest"),
    ],
)
def test_answers_of_the_wrong_form_are_refused(hub: Hub, listing: object, words: str) -> None:
    hub.listing = listing
    with pytest.raises(DownloadError, match=words):
        fetch(hub)


def test_a_model_larger_than_the_disk_is_refused_before_it_is_fetched(hub: Hub) -> None:
    hub.listing = _listing(size=1 << 44)
    with pytest.raises(CapacityError, match="NANOCUPY_CACHE_DIR"):
        fetch(hub)
    assert len(hub.requests) == 1


def test_chooses_shards_with_their_index_over_a_second_copy() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    others = ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]
    chosen = choose_files("acme/tiny", ["config.json", *shards, index, *others, "qwen.tiktoken"])
    assert set(chosen) == {"config.json", *shards, index, "qwen.tiktoken"}


def test_a_repository_without_safetensors_says_what_it_has() -> None:
    with pytest.raises(DownloadError, match=r"it has \.bin, \.gguf files"):
        choose_files("acme/tiny", ["config.json", "pytorch_model.bin", "tiny.gguf"])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Qwen/Qwen3-0.6B", HubName("Qwen", "Qwen3-0.6B")),
        ("a/b@v1.0", HubName("a", "b", "v1.0")),
        ("a/b@refs/pr/1", HubName("a", "b", "refs/pr/1")),
        ("a/b/c", None),
        ("a/..", None),
        ("../b", None),
        ("a/b@../x", None),
        ("a", None),
        ("a/b?x", None),
        ("a/b\n", None),
    ],
)
def test_hub_names(text: str, parsed: HubName | None) -> None:
    assert HubName.parse(text) == parsed
