"""Find weights on Hugging Face's hub, as `hf://owner/name`, through its own client and in its own cache.

Only files are fetched here; `resnet_fast.models.checkpoint` reads them, without running anything they contain.
"""

from __future__ import annotations

import posixpath
import re
import urllib.parse
from pathlib import Path
from typing import Any

from resnet_fast.models.checkpoint import WeightsError, one_line
from resnet_fast.models.folder import COMPANIONS, WEIGHT_FILES

__all__ = ["PREFIX", "fetch"]

PREFIX = "hf://"

_FORM = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?")


def fetch(address: str) -> Path:
    """Return the local path of the weights at `hf://OWNER/NAME[@REVISION][/FILE]`, downloaded if need be.

    The configurations in the same folder lie next to it, of the same commit. A revision with slashes is written with
    `%2F`: `hf://owner/name@refs%2Fpr%2F1`. The hub's variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) are
    obeyed; what is in the hub's cache needs no connection.

    Raises:
        ValueError: if the address has another form.
        WeightsError: if huggingface_hub is missing, or the weights cannot be found or downloaded.
    """
    match = _FORM.fullmatch(address)
    if match is None or any(part in ("", ".", "..") for part in (match["file"] or "weights").split("/")):
        raise ValueError(f"weights is {address!r}, expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or .../FILE")
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsError(
            f"{address}: needs the package huggingface_hub: pip install 'resnet_fast[hub]' ({one_line(error)})"
        ) from error
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None

    repo = match["repo"]

    def missing(name: str, revision: str | None) -> bool:
        """Return whether the cache knows that the repository has no such file."""
        cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        return cached is huggingface_hub._CACHED_NO_EXIST

    def get(name: str, revision: str | None) -> Path | None:
        """Return the file, or None if the repository has none of this name."""
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
        except LocalEntryNotFoundError:
            if missing(name, revision):
                return None
            raise  # it may exist
        except EntryNotFoundError:
            return None

    try:
        names = (match["file"],) if match["file"] else WEIGHT_FILES
        found = next((path for name in names if (path := get(name, revision)) is not None), None)
        if found is not None:
            folder = posixpath.dirname(match["file"] or "")
            commit = found.parents[posixpath.normpath(folder).count("/") + 1 if folder else 0].name
            for name in (posixpath.join(folder, name) for name in COMPANIONS):
                if not missing(name, commit):  # a commit does not change
                    get(name, commit)
    except Exception as error:  # of its client, of the client's HTTP library, or the system's
        raise WeightsError(f"{address}: {_reason(error)}") from error
    if found is None:
        raise WeightsError(f"{address}: has no {' and no '.join(names)}")
    return found


def _reason(error: Any) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for an agreement on huggingface.co, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "cannot be downloaded, for want of a connection or because HF_HUB_OFFLINE is set, and is not in the cache"
        )
    return f"cannot be downloaded ({one_line(error)})"
