"""Uploading to a Hugging Face repository, and resuming from one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Hub: send what is saved to a Hugging Face repository, or go on from a state there."""

    huggingface_repo_id: str | None = opt(None, "repository that gets the saved files, OWNER/NAME (not set = no upload)")
    huggingface_repo_type: str | None = opt(None, "kind of repository: model, dataset or space (not set = model)")
    huggingface_path_in_repo: str | None = opt(None, "folder in the repository (not set = its root)")
    huggingface_token: str | None = opt(
        None, "access token (not set = as logged in with huggingface-cli, or the variable HF_TOKEN)", secret=True
    )
    huggingface_repo_visibility: str | None = opt(
        None, "public makes a new repository public (not set = private, as any other value)"
    )
    save_state_to_huggingface: bool = opt(False, "upload saved states too")
    resume_from_huggingface: bool = opt(False, "--resume names a folder in a repository: OWNER/NAME/FOLDER[:REVISION[:TYPE]]")
    async_upload: bool = opt(False, "upload while training goes on; the last file is waited for")

    def problems(self) -> Iterator[str]:
        if self.huggingface_repo_type not in (None, *REPO_TYPES):
            yield f"--huggingface_repo_type is {self.huggingface_repo_type}: give one of {', '.join(REPO_TYPES)}"
        if self.huggingface_repo_id is None and self.save_state_to_huggingface:
            yield "--save_state_to_huggingface needs --huggingface_repo_id: name the repository, or drop the flag"

    def warnings(self) -> Iterator[str]:
        for name in ("huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload"):
            if getattr(self, name) and self.huggingface_repo_id is None:
                yield f"--{name} does nothing without --huggingface_repo_id"
