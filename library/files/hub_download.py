"""Model folders on the Hugging Face hub: only the files that are needed, into the hub's own cache.

Of several processes all ask alike: huggingface_hub locks each file, so that one fetches it and the others find it. Where the hub
cannot be asked (HF_HUB_OFFLINE, no network), what the cache holds is taken.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
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


def fetch_model(repo_id: str, choose: Choose, *, flag: str, token: str | None) -> Path:
    """The folder in the cache with the chosen files of a repository. Raises CheckpointError, without the token in it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()
    try:
        api = HfApi(token=token)
        api.repo_info(repo_id, timeout=TIMEOUT_S)  # asks once, where listing and fetching would try again for long
        wanted = list(choose(api.list_repo_files(repo_id)))
        if not wanted:
            raise CheckpointError(f"{flag} {repo_id}: this repository on the hub holds no model in the layout of diffusers")
        return Path(snapshot_download(repo_id, allow_patterns=wanted, token=token))
    except CheckpointError:
        raise
    except Exception as error:  # of the library, its HTTP client or the system: which ones depends on versions
        if is_unreachable(error) and (kept := _from_cache(repo_id)):
            return kept
        raise CheckpointError(f"{flag} {repo_id} is no file or folder here, and on the hub {reason(error, token)}") from error


def _from_cache(repo_id: str) -> Path | None:
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # not there
        folder = Path(snapshot_download(repo_id, local_files_only=True))
        if os.environ.get("RANK", "0") == "0":
            logger.info("the hub is not asked: %s is taken from %s", repo_id, folder)
        return folder
    return None


def is_unreachable(error: Exception) -> bool:
    """Whether the hub was not asked, or did not answer. huggingface_hub asks by requests or by httpx, as its version has it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    is_network = (
        isinstance(error, (ConnectionError, TimeoutError))
        or _status(error) is None
        and type(error).__module__.startswith(("requests", "httpx", "httpcore", "urllib3"))
    )
    return is_network or bool(names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"})


def reason(error: Exception, token: str | None) -> str:
    """Why a repository cannot be read, on one line and without the token, and what to do."""
    status = _status(error)
    kind = type(error).__name__
    if kind == "OfflineModeIsEnabled":
        return "nothing is asked, since HF_HUB_OFFLINE is set, and the cache does not have it: take that off, or give a path"
    if is_unreachable(error):
        return f"it cannot be looked for ({kind}: {_told(error, token)}): check the path, or the network"
    if kind == "GatedRepoError":
        return "its owner has to let you in: ask for access on its page, and give a token that has it (HF_TOKEN, hf auth login)"
    if kind == "RepositoryNotFoundError" or status in (401, 404):
        return "there is no such repository, or this access token may not see it: check the name (and HF_TOKEN, hf auth login)"
    return f"it cannot be read ({kind}: {_told(error, token)})"


def _status(error: Exception) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None)


def _told(error: Exception, token: str | None) -> str:
    lines = (getattr(error, "server_message", None) or str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(token, "***") if token else lines[0]
