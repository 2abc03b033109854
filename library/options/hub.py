"""Uploading to a Hugging Face repository, and resuming from one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

REPO_TYPES = ("model", "dataset", "space")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
ONLY_UPLOADS = ("huggingface_path_in_repo", "huggingface_repo_visibility", "huggingface_repo_type", "async_upload")


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A folder of a repository."""

    repo_id: str  # OWNER/NAME
    folder: str
    revision: str | None  # a branch, tag or commit; None = the main branch
    repo_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Hub: send what is saved to a Hugging Face repository, or go on from a state there."""

    huggingface_repo_id: str | None = opt(None, "repository that gets the saved files, OWNER/NAME (not set = no upload)")
    huggingface_repo_type: str | None = opt(None, "kind of repository: model, dataset or space (not set = model)")
    huggingface_path_in_repo: str | None = opt(None, "folder in the repository (not set = its root)")
    huggingface_token: str | None = opt(
        None, "access token (not set = as logged in with hf auth login, or the variable HF_TOKEN)", secret=True
    )
    huggingface_repo_visibility: str | None = opt(
        None, "public makes a new repository public (not set = private, as any other value)"
    )
    save_state_to_huggingface: bool = opt(False, "upload saved states too")
    resume_from_huggingface: bool = opt(False, "--resume names a folder in a repository: OWNER/NAME/FOLDER[:REVISION[:TYPE]]")
    async_upload: bool = opt(False, "upload while training goes on; the last file is waited for (off = training waits)")

    def problems(self) -> Iterator[str]:
        if self.huggingface_repo_type not in (None, *REPO_TYPES):
            yield f"--huggingface_repo_type is {self.huggingface_repo_type}: give one of {', '.join(REPO_TYPES)}"
        if self.huggingface_repo_id is not None and not REPO_ID.fullmatch(self.huggingface_repo_id):
            yield f"--huggingface_repo_id is {self.huggingface_repo_id!r}: give OWNER/NAME, for example my-name/my-lora"
        if self.huggingface_repo_id is None and self.save_state_to_huggingface:
            yield "--save_state_to_huggingface needs --huggingface_repo_id: name the repository, or drop the flag"

    def resume_problems(self, resume: str | None) -> Iterator[str]:
        """``resume``: the value of --resume."""
        if not self.resume_from_huggingface:
            return
        if resume in (None, "latest"):
            yield (
                "--resume_from_huggingface needs --resume=OWNER/NAME/FOLDER, the folder of a saved state in a repository: give "
                "it, or drop --resume_from_huggingface"
            )
            return
        try:
            hub_folder(str(resume))
        except ValueError as error:
            yield f"--resume {error}"

    def warnings(self) -> Iterator[str]:
        for name in ONLY_UPLOADS:
            if getattr(self, name) and self.huggingface_repo_id is None:
                yield f"--{name} does nothing without --huggingface_repo_id"

    def token_warnings(self, *, fetches_models: bool) -> Iterator[str]:
        """``fetches_models``: whether the run takes a model from the hub, for which the token counts as well."""
        if self.huggingface_token and not (self.huggingface_repo_id or self.resume_from_huggingface or fetches_models):
            yield "--huggingface_token does nothing without --huggingface_repo_id or --resume_from_huggingface"


def hub_folder(resume: str) -> HubFolder:
    """``"owner/name/folder/of/state:revision:type"`` -> its parts; the last two may be missing. Raises ValueError."""
    place, _, rest = resume.replace("\\", "/").partition(":")  # a path as Windows writes it
    revision, _, repo_type = rest.partition(":")
    owner, name, folder = (*place.strip("/").split("/", 2), "", "")[:3]
    if not folder or not REPO_ID.fullmatch(f"{owner}/{name}"):
        raise ValueError(f"is {resume!r}: give OWNER/NAME/FOLDER[:REVISION[:TYPE]], a folder in a Hugging Face repository")
    if repo_type and repo_type not in REPO_TYPES:
        raise ValueError(
            f"is {resume!r}: give OWNER/NAME/FOLDER:REVISION:TYPE with the type model, dataset or space, not {repo_type}"
        )
    return HubFolder(f"{owner}/{name}", folder, revision or None, repo_type or "model")
