"""A Hugging Face hub of one's own: as much of its HTTP interface as uploading and fetching small files takes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """Another one for other files."""
        return _sha1(repr(sorted(self.files.items())).encode())


@dataclass
class FakeHub:
    """``repositories``: (type, OWNER/NAME) -> what is there. ``tokens``: token -> role, ``read`` or ``write``."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_good": "write", "hf_reader": "read"})
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuses_commits: bool = False
    gated: set[str] = field(default_factory=set)  # OWNER/NAME of those whose files nobody gets

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        return self.repositories[kind, repo_id].files

    def asked(self, method: str, part: str) -> int:
        return sum(line.startswith(method) and part in line for line in self.requests)


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def asked(monkeypatch: Any, folder: Path) -> Iterator[FakeHub]:
    """A served hub that huggingface_hub asks in this process, with a cache of its own in ``folder`` and without anyone's token."""
    from huggingface_hub import constants, file_download

    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # old versions copy it
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(constants, name, str(folder / "cache"), raising=False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RANK"):
            monkeypatch.delenv(name, raising=False)
        yield server


class _Answers(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        """Nothing is shown."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] != "api":
            return self.resolve(parts)
        if self.role is None:
            return self.refuse(401, "Invalid credentials")
        if parts[1] == "whoami-v2":
            return self.tell({"name": "me", "type": "user", "auth": {"accessToken": {"role": self.role}}})
        if parts[1:] == ["repos", "create"]:
            return self.create(json.loads(body))
        return self.of_repository(KINDS[parts[1]], "/".join(parts[2:4]), parts[4:], body)

    @property
    def role(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def create(self, asked: dict) -> None:
        owner = asked.get("organization") or "me"
        if owner != "me":
            return self.refuse(403, "You don't have the rights")
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[asked.get("type", "model"), f"{owner}/{asked['name']}"] = Repository(private)
        return self.tell({"url": f"{self.hub.url}/{owner}/{asked['name']}"})

    def of_repository(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> None:
        repository = self.hub.repositories.get((kind, repo_id))
        if repository is None:
            return self.refuse(404, "Repository not found", code="RepoNotFound")
        what = rest[0] if rest else ""
        if what in ("tree", "revision") and rest[1] not in ("main", repository.commit):
            return self.refuse(404, "Invalid rev id", code="RevisionNotFound")
        if what == "tree":
            files = [{"type": "file", "path": n, "size": len(d), "oid": _sha1(d)} for n, d in repository.files.items()]
            return self.tell(files)
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.tell({"files": files})
        if what == "commit":
            return self.commit(repository, repo_id, body)
        return self.tell({"id": repo_id, "sha": repository.commit, "private": repository.private, "siblings": []})

    def commit(self, repository: Repository, repo_id: str, body: bytes) -> None:
        if self.hub.refuses_commits or self.role != "write":
            return self.refuse(403, "Forbidden: you cannot write")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{repo_id}/commit/{repository.commit}"
        return self.tell({"commitUrl": url, "commitOid": repository.commit, "hookOutput": "", "pullRequestUrl": None})

    def resolve(self, parts: list[str]) -> None:
        """OWNER/NAME/resolve/REVISION/FILE; datasets and spaces have their kind in front."""
        kind = KINDS[parts.pop(0)] if parts[0] in KINDS else "model"
        repository = self.hub.repositories[kind, "/".join(parts[:2])]
        if "/".join(parts[:2]) in self.hub.gated:
            return self.refuse(403, "Access to it is restricted", code="GatedRepo")
        name = "/".join(parts[4:])
        data = repository.files.get(name)
        if data is None:
            return self.refuse(404, "Entry not found", code="EntryNotFound")
        return self.send(
            200,
            data,
            {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": repository.commit, "Content-Type": "application/octet-stream"},
        )

    def tell(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, *, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send(status, json.dumps({"error": message}).encode(), {**headers, "Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
