"""`owner/name[@revision]` from a Hugging Face hub: which files, of which commit, checked how.

A model is a folder in the cache named by its commit; it appears only when every file in it has been
verified. Owns the hub's API and the cache layout:

    hub/OWNER--NAME/refs/REVISION      the commit a revision was last seen at
    hub/OWNER--NAME/COMMIT/            the files
    hub/OWNER--NAME/COMMIT.partial/    the same while it arrives; kept, so that it resumes
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanocupy.errors import CapacityError, ConfigError, DownloadError
from nanocupy.hub.cache import cache_dir, make_folder, model_lock, require_space
from nanocupy.hub.http import HttpClient
from nanocupy.progress import Report, byte_progress

PUBLIC_ENDPOINT = "https://huggingface.co"

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The hub's file names are untrusted: only plain names, of files we know what to do with.
_SMALL_FILES = re.compile(
    r"(config|generation_config|vocab)\.json"
    r"|tokenizer[A-Za-z0-9_-]{0,40}\.json|tokenizer\.model|special_tokens_map\.json"
    r"|added_tokens\.json|[A-Za-z0-9_-]{1,60}\.tiktoken|merges\.txt|chat_template\.(jinja|json)"
)
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.safetensors(\.index\.json)?")
_MAX_FILES = 20_000
_MAX_FILE_BYTES = 1 << 44


@dataclass(frozen=True)
class HubName:
    """owner/name at a revision (branch, tag or commit)."""

    owner: str
    name: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """None where `text` is not of that form."""
        match = _NAME.fullmatch(text)
        if match is None or ".." in text:
            return None
        return cls(match[1], match[2], match[3] or "main")

    def __str__(self) -> str:
        suffix = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.owner}/{self.name}{suffix}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps all that belongs to it."""
        return cache_dir() / "hub" / f"{self.owner}--{self.name}"

    @property
    def ref_file(self) -> Path:
        return self.folder / "refs" / quote(self.revision, safe="")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub announces it; one of the two digests is there.

    git_sha1 is git's blob id: SHA-1 over "blob <size>\\0" and the content.
    """

    name: str
    num_bytes: int
    sha256: str | None
    git_sha1: str | None


def cached_repo(name: HubName) -> Path | None:
    """The folder of the last complete fetch, without asking the network."""
    if _COMMIT.fullmatch(name.revision):
        commit = name.revision
    else:
        try:
            commit = name.ref_file.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    folder = name.folder / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def pull_repo(
    name: HubName, *, force: bool = False, progress: bool = True, client: HttpClient | None = None
) -> Path:
    """Bring the model's newest commit of that revision into the cache; gives its folder.

    Raises DownloadError, CapacityError, ConfigError (a bad HF_ENDPOINT or HF_TOKEN).
    """
    client = client or client_from_environment()
    with model_lock(f"{name.owner}/{name.name}", progress=progress):
        commit, files = list_files(client, name)
        final = name.folder / commit
        if force or not final.is_dir():
            partial = make_folder(name.folder / f"{commit}.partial")
            try:
                _fetch_all(client, name, commit, files, partial, progress)
                _swap_in(partial, final)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise
                raise CapacityError(
                    f"{name} could not be kept in {name.folder}: {exc.strerror}; make room there "
                    "or set NANOCUPY_CACHE_DIR; what has arrived is kept and will be resumed"
                ) from exc
        make_folder(name.ref_file.parent)
        new_ref = name.ref_file.with_name(name.ref_file.name + ".new")
        new_ref.write_text(commit + "\n", encoding="ascii")
        os.replace(new_ref, name.ref_file)
    return final


def client_from_environment() -> HttpClient:
    """For $HF_ENDPOINT, or the public hub, with $HF_TOKEN."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise DownloadError("HF_HUB_OFFLINE is set and the model is not in the cache; unset it")
    endpoint = (os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT).rstrip("/")
    return HttpClient(endpoint, os.environ.get("HF_TOKEN") or None)


def list_files(client: HttpClient, name: HubName) -> tuple[str, list[RemoteFile]]:
    """The commit that `name.revision` is now, and the files of it that we need.

    Source: GET /api/models/{owner}/{name}/revision/{revision}?blobs=true of the hub's API.
    """
    path = f"/api/models/{name.owner}/{name.name}/revision/{quote(name.revision, safe='')}"
    answer = client.get_json(path + "?blobs=true", what=str(name))
    commit = answer.get("sha") if isinstance(answer, dict) else None
    siblings = answer.get("siblings") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise DownloadError(f"{name}: the hub names no commit ({str(commit)[:60]!r})")
    if not isinstance(siblings, list) or len(siblings) > _MAX_FILES:
        raise DownloadError(f"{name}: the hub gives no list of files")
    names = [s.get("rfilename") for s in siblings if isinstance(s, dict)]
    wanted = set(choose_files(str(name), [n for n in names if isinstance(n, str)]))
    files: dict[str, RemoteFile] = {}
    for sibling in siblings:
        if isinstance(sibling, dict) and sibling.get("rfilename") in wanted:
            file = _remote_file(name, sibling)
            if file.name.lower() in files:
                raise DownloadError(f"{name}: the hub lists {file.name!r} twice")
            files[file.name.lower()] = file  # some file systems fold case
    return commit, list(files.values())


def choose_files(model: str, names: list[str]) -> list[str]:
    """Which files of a repository make the model: config, tokenizer, template and weights."""
    small = [n for n in names if _SMALL_FILES.fullmatch(n)]
    weights = [n for n in names if _WEIGHTS.fullmatch(n) and not n.startswith("adapter_")]
    # Some repositories hold the weights twice, also as consolidated.safetensors.
    weights = [n for n in weights if n.startswith("model")] or weights
    if "config.json" not in small:
        raise DownloadError(f"{model} has no config.json; it is not a model nanocupy can load")
    if not any(n.endswith(".safetensors") for n in weights):
        others = sorted({Path(n).suffix for n in names if re.search(r"\.(bin|gguf|pth|pt|h5)$", n)})
        found = f" (it has {', '.join(others)} files)" if others else ""
        raise DownloadError(
            f"{model} has no safetensors weights{found}; look for a repository that has them, or "
            "download a GGUF file and give its path"
        )
    return small + weights


def _remote_file(name: HubName, sibling: dict[str, Any]) -> RemoteFile:
    file_name, num_bytes = sibling["rfilename"], sibling.get("size")
    lfs = sibling.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    git_sha1 = sibling.get("blobId") if lfs is None else None
    if (
        not isinstance(num_bytes, int)
        or isinstance(num_bytes, bool)
        or not 0 <= num_bytes <= _MAX_FILE_BYTES
    ):
        raise DownloadError(f"{name}: the hub gives {file_name} the size {str(num_bytes)[:40]!r}")
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        return RemoteFile(file_name, num_bytes, sha256, None)
    if isinstance(git_sha1, str) and _COMMIT.fullmatch(git_sha1):
        return RemoteFile(file_name, num_bytes, None, git_sha1)
    raise DownloadError(f"{name}: the hub gives no digest of {file_name}, so it cannot be checked")


def _fetch_all(
    client: HttpClient,
    name: HubName,
    commit: str,
    files: list[RemoteFile],
    partial: Path,
    progress: bool,
) -> None:
    arrived = {f.name: _size(partial / f.name) or _size(partial / f"{f.name}.part") for f in files}
    total = sum(f.num_bytes for f in files)
    require_space(partial, total - sum(arrived.values()), f"fetching {name}")
    before = 0
    with byte_progress(f"downloading {name}", progress) as report:
        for file in files:
            _fetch_one(client, name, commit, file, partial, _shifted(report, before, total))
            before += file.num_bytes
            report(before, total)


def _fetch_one(
    client: HttpClient, name: HubName, commit: str, file: RemoteFile, partial: Path, report: Any
) -> None:
    whole = partial / file.name
    if _size(whole) == file.num_bytes and whole.is_file():
        return  # an earlier attempt verified it
    part = partial / f"{file.name}.part"
    path = f"/{name.owner}/{name.name}/resolve/{commit}/{quote(file.name)}"
    client.fetch(path, part, file.num_bytes, report, what=f"{name}: {file.name}")
    found = digest_of(part, file)
    expected = file.sha256 or file.git_sha1
    if found != expected:
        part.unlink()
        raise DownloadError(
            f"{name}: {file.name} is damaged: its digest is {found}, the hub says {expected}; it "
            "was thrown away, pull again"
        )
    os.replace(part, whole)


def digest_of(path: Path, file: RemoteFile) -> str:
    """The digest of `path` of the kind that `file` has."""
    with path.open("rb") as source:
        if file.sha256 is not None:
            return hashlib.file_digest(source, "sha256").hexdigest()
        digest = hashlib.sha1(f"blob {file.num_bytes}\0".encode(), usedforsecurity=False)
        while chunk := source.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _shifted(report: Report, before: int, total: int) -> Any:
    return lambda done: report(before + done, total)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _swap_in(partial: Path, final: Path) -> None:
    """Put the complete folder under its final name; a forced pull replaces the old one."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def require_hub_name(text: str) -> HubName:
    """Parse, or raise ConfigError."""
    name = HubName.parse(text)
    if name is None:
        raise ConfigError(f"{text!r} is not of the form owner/name[@revision]")
    return name
