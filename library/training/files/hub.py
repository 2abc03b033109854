"""A Hugging Face repository as a second place for what a run saves, and as the place of a state to go on from.

Nothing here imports huggingface_hub, or asks the network, unless a flag says so. Before training it is found out whether uploads
can work (``check_upload``, ``make_repository``); from then on a failed upload is a warning, never the end of a run. The token is
handed to huggingface_hub and written nowhere.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from library.errors import OptionError, did_you_mean
from library.files.hub_download import is_unreachable, status_of, told
from library.options.hub import HubFolder, HubOptions, hub_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DESCRIPTION_FILE = "train_state.json"  # what makes a folder a state; library/training/files/state.py
DOWNLOADS = "huggingface"  # in the output folder: states that were fetched
POLL_S = 0.2  # on Windows a wait without an end would hold back Ctrl-C
TIMEOUT_S = 30.0
UPLOAD = "--huggingface_repo_id"
MIB = 2**20

logger = logging.getLogger(__name__)


def hub_api(options: HubOptions) -> HfApi:
    """Asks as the owner of --huggingface_token, else as whoever is logged in on this machine."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # they would tear that of the training
    return HfApi(token=options.huggingface_token or None)


# ---------------------------------------------------------------------- before training


def check_upload(options: HubOptions) -> None:
    """Raises OptionError where uploads cannot work: no token, a wrong one, one that may only read, or no network.

    The main process asks for all.
    """
    if options.huggingface_repo_id is None or not _is_main():
        return
    from huggingface_hub import get_token

    if not (options.huggingface_token or get_token()):
        raise OptionError(
            "--huggingface_repo_id needs an access token: give --huggingface_token, set the variable HF_TOKEN, or log in with "
            "hf auth login; tokens are made at https://huggingface.co/settings/tokens"
        )
    try:
        user = hub_api(options).whoami()
    except Exception as error:  # of the library, its HTTP client or the system: which ones depends on versions
        raise OptionError(f"--huggingface_repo_id {options.huggingface_repo_id}: {_reason(error, options, UPLOAD)}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OptionError(
            f"--huggingface_repo_id {options.huggingface_repo_id}: the access token of {user.get('name')} may only read; give "
            "one that may write"
        )


def make_repository(options: HubOptions) -> None:
    """Makes the repository of the uploads if it is not there. Raises OptionError where that is not allowed."""
    if options.huggingface_repo_id is None or not _is_main():
        return
    repo_id, repo_type = options.huggingface_repo_id, options.huggingface_repo_type or "model"
    private = options.huggingface_repo_visibility != "public"
    try:
        api = hub_api(options)
        if api.repo_exists(repo_id, repo_type=repo_type):
            return
        kind = {"space_sdk": "static"} if repo_type == "space" else {}
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **kind)  # type: ignore[arg-type]
    except Exception as error:  # as above
        raise OptionError(f"--huggingface_repo_id {repo_id}: {_reason(error, options, UPLOAD)}") from error
    logger.info("made the %s %s repository %s", "private" if private else "public", repo_type, repo_id)


def fetch_state(options: HubOptions, resume: str, output_dir: Path) -> Path:
    """The state that ``resume`` (OWNER/NAME/FOLDER[:REVISION[:TYPE]]) names, as a folder below ``output_dir``.

    What lies there already and is the same is not fetched again. Raises OptionError.
    """
    place = hub_folder(resume)
    target = output_dir / DOWNLOADS / place.repo_id.replace("/", "--") / (place.revision or "main").replace("/", "--")
    where: dict[str, Any] = {"repo_id": place.repo_id, "repo_type": place.repo_type}
    try:
        api = hub_api(options)
        # the commit, so that all files are of one; and this asks once, where listing and fetching would try again for long
        where["revision"] = api.repo_info(revision=place.revision, timeout=TIMEOUT_S, **where).sha
        wanted = _files_of(place, api.list_repo_files(**where))
        for name in wanted:
            api.hf_hub_download(filename=name, local_dir=target, **where)
    except OptionError:
        raise
    except Exception as error:  # as above
        raise OptionError(f"--resume {resume}: {_reason(error, options, '--resume_from_huggingface')}") from error
    folder = target / place.folder
    size = sum((target / name).stat().st_size for name in wanted) / MIB
    if _is_main():
        logger.info("the state %s of %s is in %s (%.1f MiB)", place.folder, place.repo_id, folder, size)
    return folder


def _files_of(place: HubFolder, names: list[str]) -> list[str]:
    """The files of a state: those directly in its folder. Raises OptionError naming the states that are there."""
    wanted = [name for name in names if name.rpartition("/")[0] == place.folder]
    if f"{place.folder}/{DESCRIPTION_FILE}" in wanted:
        return wanted
    states = sorted(name.removesuffix(f"/{DESCRIPTION_FILE}") for name in names if name.endswith(f"/{DESCRIPTION_FILE}"))
    there = f"it has {', '.join(states)}" if states else "it has none"
    raise OptionError(
        f"--resume: the repository {place.repo_id} has no state {place.folder}{did_you_mean(place.folder, states)}: {there}"
    )


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _reason(error: Exception, options: HubOptions, flag: str) -> str:
    """Why the hub could not do what ``flag`` asks of it, on one line, and what to do."""
    status = status_of(error)
    if type(error).__name__ == "RevisionNotFoundError":
        return "the repository has no such branch, tag or commit: look for its name in the repository"
    if type(error).__name__ == "RepositoryNotFoundError" or status == 404:
        return "there is no such repository, or this access token may not see it: check the name and --huggingface_token"
    if status == 401:
        return "the access token is not valid: give another --huggingface_token, or log in again with hf auth login"
    text = told(error, options.huggingface_token)
    if status == 403:  # also when the owner's storage is full
        return f"the hub forbids it ({text}): give a token that may write there, a repository of your own, or make room in it"
    if status is None and is_unreachable(error):
        return f"the Hugging Face hub cannot be reached ({type(error).__name__}: {text}): check the network, or drop {flag}"
    if status is None:
        return f"{type(error).__name__}: {text}"
    return f"the Hugging Face hub answers {status} ({text}): try again later, or drop {flag}"


# ---------------------------------------------------------------------- while training


class HubUploads:
    """Copies of a run's files, sent one after the other by a thread of the main process; no exit waits for it but ``wait``.

    Of several processes all have one and call it alike; only the main one's sends.
    """

    def __init__(self, options: HubOptions, *, is_main: bool):
        self._options = options
        self.is_on = options.huggingface_repo_id is not None
        self._sends = self.is_on and is_main
        self._paths: list[Path] = []  # still to be sent; the first is on its way
        self._changed = Condition()
        self._thread: Thread | None = None
        self.holds_training = False  # something is on its way that training must wait for

    @property
    def takes_states(self) -> bool:
        return self.is_on and self._options.save_state_to_huggingface

    def add(self, path: Path) -> None:
        """A file or folder that is complete."""
        self.holds_training = self.is_on and not self._options.async_upload
        if not self._sends:
            return
        with self._changed:
            self._paths.append(path)
            self._changed.notify_all()
        if self._thread is None:  # made late: most runs upload nothing
            self._thread = Thread(target=self._send_all, name="hub-upload", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when all has been sent, or has failed."""
        if self._paths:
            logger.info("uploading %s to %s", ", ".join(path.name for path in self._paths), self._options.huggingface_repo_id)
        self._wait_while(lambda: bool(self._paths))
        self.holds_training = False

    def leave(self, *paths: Path) -> None:
        """Returns when none of ``paths`` is still to be sent, so that they may be replaced or removed."""
        self._wait_while(lambda: not set(self._paths).isdisjoint(paths))

    def _wait_while(self, is_busy: Callable[[], bool]) -> None:
        if self._sends:
            with self._changed:
                while is_busy():
                    self._changed.wait(POLL_S)

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._paths:
                    self._changed.wait()
                path = self._paths[0]
            try:
                self._send(path)
            finally:
                with self._changed:
                    self._paths.pop(0)
                    self._changed.notify_all()

    def _send(self, path: Path) -> None:
        repo_id, folder = self._options.huggingface_repo_id, self._options.huggingface_path_in_repo
        assert repo_id is not None
        name = f"{folder.strip('/')}/{path.name}" if folder and folder.strip("/") else path.name
        where: dict[str, Any] = {"repo_id": repo_id, "repo_type": self._options.huggingface_repo_type, "path_in_repo": name}
        started = time.monotonic()
        try:
            api = hub_api(self._options)
            if path.is_dir():
                api.upload_folder(folder_path=path, commit_message=f"Upload {path.name}", **where)
            else:
                api.upload_file(path_or_fileobj=path, commit_message=f"Upload {path.name}", **where)
        except Exception as error:  # whatever it is, it must not end a run
            reason = _reason(error, self._options, UPLOAD)
            logger.warning("warning: %s was not uploaded to %s: %s; it is in %s", path.name, repo_id, reason, path)
        else:
            logger.info("uploaded %s to %s in %.0f s", name, repo_id, time.monotonic() - started)
