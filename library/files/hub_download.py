"""Model folders on the Hugging Face hub: only the files that are needed, into the hub's own cache.

Of several processes all ask alike: huggingface_hub locks each file, so that one fetches it and the others find it. Where the hub
cannot be asked (HF_HUB_OFFLINE, no network), what the cache holds is taken.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.errors import CheckpointError

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)

Choose = Callable[[Sequence[str]], Iterable[str]]  # all files of a repository -> those that are wanted


def is_repo_id(value: str) -> bool:
    """Whether a text can be OWNER/NAME on the hub, and is no path of something here."""
    return bool(REPO_ID.fullmatch(value)) and not Path(value).parent.exists()


def cached_file(repo_id: str, name: str) -> Path | None:
    """A file of a repository's main branch that the cache holds already; None where it does not. The hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name)
    return Path(found) if isinstance(found, str) else None


def fetch_model(  # noqa: PLR0913  # a repository, what of it, and for messages
    repo_id: str,
    choose: Choose,
    *,
    parts: Collection[str],
    flag: str,
    token: str | None,
    what: str = "model in the layout of diffusers",
) -> Path:
    """The folder in the cache with the chosen files of a repository. Raises CheckpointError, without the token in it.

    ``parts``: folders of which files must be in the cache, where that is all there is to take them from. For messages: ``flag``
    that names the repository, "" where no one has named it; ``what`` is fetched.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()
    wanted: list[str] = []
    try:
        api = HfApi(token=token)
        api.repo_info(repo_id, timeout=TIMEOUT_S)  # asks once, where listing and fetching would try again for long
        wanted = list(choose(api.list_repo_files(repo_id)))
        if not wanted:
            raise CheckpointError(f"{f'{flag} {repo_id}'.strip()}: this repository on the hub holds no {what}")
        return Path(snapshot_download(repo_id, allow_patterns=wanted, token=token))
    except CheckpointError:
        raise
    except Exception as error:  # of the library, its HTTP client or the system: which ones depends on versions
        kept = _from_cache(repo_id) if is_unreachable(error) else None
        if kept is None or not _is_complete(kept, choose, wanted, parts):
            where = (
                f"{flag} {repo_id} is no file or folder here, and on the hub"
                if flag
                else f"{repo_id} on the hub does not give it:"
            )
            raise CheckpointError(f"{where} {reason(error, token)}") from error
        if os.environ.get("RANK", "0") == "0":
            logger.info("the hub is not asked: %s is taken from %s", repo_id, kept)
        return kept


def _from_cache(repo_id: str) -> Path | None:
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # not there
        # [] = no file need be there: else newer versions want the whole repository, of which never more than a part is fetched
        return Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=[]))
    return None


def _is_complete(folder: Path, choose: Choose, wanted: Sequence[str], parts: Collection[str]) -> bool:
    """A download may have been broken off, or have fetched other parts. ``wanted``: its files, where the hub has told them."""
    chosen = wanted or list(choose([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]))
    has_parts = all(any(name.startswith(f"{part}/") for name in chosen) for part in parts)
    return bool(chosen) and has_parts and all((folder / name).is_file() for name in chosen)


def is_unreachable(error: Exception) -> bool:
    """Whether the hub was not asked, or did not answer. huggingface_hub asks by requests or by httpx, as its version has it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    is_network = (
        isinstance(error, (ConnectionError, TimeoutError))
        or status_of(error) is None
        and type(error).__module__.startswith(("requests", "httpx", "httpcore", "urllib3"))
    )
    return is_network or bool(names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"})


def reason(error: Exception, token: str | None) -> str:
    """Why a repository cannot be read, on one line and without the token, and what to do."""
    status = status_of(error)
    kind = type(error).__name__
    if kind == "OfflineModeIsEnabled":
        return "nothing is asked, since HF_HUB_OFFLINE is set, and the cache does not have it: take that off, or give a path"
    if is_unreachable(error):
        return f"it cannot be looked for ({kind}: {told(error, token)}): check the path, or the network"
    if kind == "GatedRepoError":
        return "its owner has to let you in: ask for access on its page, and give a token that has it (HF_TOKEN, hf auth login)"
    if kind == "RepositoryNotFoundError" or status in (401, 404):
        return "there is no such repository, or this access token may not see it: check the name (and HF_TOKEN, hf auth login)"
    return f"it cannot be read ({kind}: {told(error, token)})"


def status_of(error: Exception) -> Any:
    """The number of the hub's answer; None where there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def told(error: Exception, token: str | None) -> str:
    """What the hub, or else the library, says, on one line and without the token."""
    lines = (getattr(error, "server_message", None) or str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(token, "***") if token else lines[0]
