"""Uploading and resuming over real HTTP, against a hub of our own (tests/fake_hub.py)."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from huggingface_hub import constants, file_download

from library.errors import OptionError
from library.options.hub import HubOptions
from library.training.files import hub as hub_module
from library.training.files.hub import HubUploads, check_upload, fetch_state, make_repository
from tests.fake_hub import FakeHub, Repository, serving
from tests.tiny_runs import TinyRuns, same_tensors
from tests.two_processes import run_two

TOKEN = "hf_good"


def hub_options(**options: object) -> HubOptions:
    return HubOptions(**{"huggingface_repo_id": "me/lora", "huggingface_token": TOKEN, **options})  # type: ignore[arg-type]


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # old versions copy it
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RANK"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(4))


@pytest.fixture
def repository(hub) -> dict[str, bytes]:
    hub.repositories["model", "me/lora"] = Repository(private=True)
    return hub.files("me/lora")


def problem_of(ask, *arguments) -> str:
    with pytest.raises(OptionError) as caught:
        ask(*arguments)
    (problem,) = caught.value.problems
    return problem


# ---------------------------------------------------------------- before training


def test_a_token_that_may_write_is_all_that_is_needed(hub):
    check_upload(hub_options())
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("hf_bad", "--huggingface_repo_id me/lora: the access token is not valid"),
        ("hf_reader", "the access token of me may only read"),
        (None, "--huggingface_repo_id needs an access token: give --huggingface_token, set the variable HF_TOKEN"),
    ],
)
def test_tokens_with_which_nothing_can_be_uploaded(hub, token, expected):
    assert expected in problem_of(check_upload, hub_options(huggingface_token=token))


def test_the_token_of_the_environment_counts(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "may only read" in problem_of(check_upload, hub_options(huggingface_token=None))


def test_without_a_network_the_error_says_so(hub, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    told = problem_of(check_upload, hub_options())
    assert "the Hugging Face hub cannot be reached (" in told
    assert told.endswith("check the network, or drop --huggingface_repo_id")
    told = problem_of(fetch_state, hub_options(), "me/lora/x", Path("out"))
    assert "--resume me/lora/x: the Hugging Face hub cannot be reached" in told
    assert told.endswith("check the network, or drop --resume_from_huggingface")


def test_offline_mode_is_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached (OfflineModeIsEnabled" in problem_of(check_upload, hub_options())


@pytest.mark.parametrize(
    ("options", "kind", "private"),
    [
        ({}, "model", True),
        ({"huggingface_repo_visibility": "public"}, "model", False),
        ({"huggingface_repo_visibility": "Public"}, "model", True),
        ({"huggingface_repo_type": "dataset"}, "dataset", True),
        ({"huggingface_repo_type": "space"}, "space", True),
    ],
)
def test_a_missing_repository_is_made(hub, options, kind, private):
    make_repository(hub_options(**options))
    assert hub.repositories == {(kind, "me/lora"): Repository(private=private)}


def test_a_repository_that_is_there_stays_as_it_is(hub, repository):
    make_repository(hub_options(huggingface_repo_visibility="public"))
    assert hub.repositories["model", "me/lora"].private and not hub.asked("POST", "repos/create")


def test_a_repository_of_others_cannot_be_made(hub):
    assert "--huggingface_repo_id them/lora: the hub forbids it (" in problem_of(
        make_repository, hub_options(huggingface_repo_id="them/lora")
    )


def test_without_the_flag_and_in_other_processes_nothing_is_asked(hub, monkeypatch):
    for step in (check_upload, make_repository):
        step(HubOptions())
    monkeypatch.setenv("RANK", "1")
    for step in (check_upload, make_repository):
        step(hub_options())
    assert hub.requests == []


# ---------------------------------------------------------------- states


@pytest.fixture
def state(repository) -> dict[str, bytes]:
    repository.update({
        "states/a-state/train_state.json": b"{}", "states/a-state/network.safetensors": b"net", "states/a-state/more/x": b"x",
        "b-state/train_state.json": b"{}", "README.md": b"hello",
    })  # fmt: skip
    return repository


@pytest.mark.parametrize("revision", ["", ":main", ":{commit}", ":{commit}:model"])
def test_a_state_is_fetched_into_the_output_folder(hub, state, tmp_path, revision):
    resume = "me/lora/states/a-state" + revision.format(commit=hub.repositories["model", "me/lora"].commit)
    folder = fetch_state(HubOptions(huggingface_token=TOKEN), resume, tmp_path)
    assert folder.is_relative_to(tmp_path) and folder.name == "a-state"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "train_state.json": b"{}",
        "network.safetensors": b"net",
    }


def test_a_state_of_a_dataset_repository(hub, tmp_path):
    hub.repositories["dataset", "me/sets"] = Repository(private=True, files={"s/train_state.json": b"{}"})
    folder = fetch_state(HubOptions(huggingface_token=TOKEN), "me/sets/s::dataset", tmp_path)
    assert (folder / "train_state.json").read_bytes() == b"{}"


def test_what_is_there_is_not_fetched_again_unless_it_has_changed(hub, state, tmp_path):
    for network, fetched in ((b"net", 2), (b"net", 2), (b"changed", 3)):
        state["states/a-state/network.safetensors"] = network
        folder = fetch_state(HubOptions(huggingface_token=TOKEN), "me/lora/states/a-state", tmp_path)
        assert (folder / "network.safetensors").read_bytes() == network
        assert hub.asked("GET", "/resolve/") == fetched


@pytest.mark.parametrize(
    ("resume", "expected"),
    [
        ("me/lora/states/b-state", "the repository me/lora has no state states/b-state (did you mean"),
        ("me/lora/states", "it has b-state, states/a-state"),
        ("me/lora/states/a-state:v9", "--resume me/lora/states/a-state:v9: the repository has no such branch, tag or commit"),
        ("me/other/a-state", "--resume me/other/a-state: there is no such repository, or this access token may not see it"),
    ],
)
def test_states_that_are_not_there(hub, state, tmp_path, resume, expected):
    assert expected in problem_of(fetch_state, HubOptions(huggingface_token=TOKEN), resume, tmp_path)


# ---------------------------------------------------------------- while training


def test_files_and_states_go_where_they_are_to_lie(hub, repository, tmp_path):
    (tmp_path / "a-state").mkdir()
    for name in ("x.safetensors", "a-state/network.safetensors", "a-state/train_state.json"):
        (tmp_path / name).write_bytes(name.encode())
    for folder in (None, "", "/", "loras/cats/"):
        uploads = HubUploads(hub_options(huggingface_path_in_repo=folder), is_main=True)
        uploads.add(tmp_path / "x.safetensors")
        uploads.add(tmp_path / "a-state")
        uploads.wait()
    names = ["x.safetensors", "a-state/network.safetensors", "a-state/train_state.json"]
    assert repository == {f"{folder}{name}": name.encode() for name in names for folder in ("", "loras/cats/")}


def test_a_failed_upload_is_a_warning_that_names_file_and_reason(hub, repository, tmp_path, caplog):
    hub.refuses_commits = True
    (tmp_path / "x.safetensors").write_bytes(b"x")
    uploads = HubUploads(hub_options(), is_main=True)
    uploads.add(tmp_path / "x.safetensors")
    uploads.add(tmp_path / "gone.safetensors")
    uploads.wait()
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "x.safetensors was not uploaded to me/lora: the hub forbids it (" in first and "you cannot write" in first
    assert "give a token that may write there" in first and "make room" in first  # a full storage is forbidden, too
    assert str(tmp_path / "x.safetensors") in first and TOKEN not in caplog.text
    assert "gone.safetensors was not uploaded to me/lora: " in second and "cannot be reached" not in second


def test_a_reason_never_shows_the_token():
    assert hub_module._reason(OSError(f"bad header: Bearer {TOKEN}"), hub_options(), "--x") == "OSError: bad header: Bearer ***"


class Held(HubUploads):
    """Sends nothing before it may."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.may_send, self.sent = Event(), []

    def _send(self, path):
        assert self.may_send.wait(20)
        self.sent.append(path)


def test_training_is_held_only_if_uploads_are_to_be_waited_for():
    for asynchronous in (False, True):
        uploads = Held(hub_options(async_upload=asynchronous), is_main=True)
        uploads.add(Path("x"))
        assert uploads.holds_training is not asynchronous and uploads.sent == []
        uploads.may_send.set()
        uploads.wait()
        assert not uploads.holds_training and uploads.sent == [Path("x")]


def test_what_is_on_its_way_is_not_left_before_it_is_sent():
    uploads = Held(hub_options(async_upload=True), is_main=True)
    for name in ("a", "b"):
        uploads.add(Path(name))
    started = time.monotonic()
    uploads.leave(Path("c"))  # at once
    assert time.monotonic() - started < 5 and uploads.sent == []
    uploads.may_send.set()
    uploads.leave(Path("b"))
    assert uploads.sent == [Path("a"), Path("b")]


def test_other_processes_send_nothing_but_wait_alike():
    uploads = HubUploads(hub_options(), is_main=False)
    uploads.add(Path("gone"))
    assert uploads.holds_training and uploads._thread is None
    uploads.wait()
    assert not uploads.holds_training


# ---------------------------------------------------------------- whole runs

UPLOAD = ("--huggingface_repo_id=me/lora", f"--huggingface_token={TOKEN}")


@pytest.mark.parametrize("extra", [(), ("--async_upload",)])
def test_a_run_uploads_what_it_saves(hub, runs, extra):
    states = ("--save_state", "--save_state_to_huggingface", "--huggingface_path_in_repo=v1")
    runs.train("--max_train_steps=4", "--save_every_n_steps=2", "--save_last_n_steps=1", *UPLOAD, *states, *extra)
    files = hub.files("me/lora")
    loras = {f"v1/{name}.safetensors" for name in ("t-step00000002", "t-step00000004", "t")}
    assert loras <= set(files) and {name.split("/")[1] for name in files if "state" in name} == {
        "t-step00000002-state", "t-step00000004-state", "t-state",
    }  # fmt: skip
    assert not (runs.folder / "out" / "t-step00000002.safetensors").exists()  # made way here, after it was sent
    assert files["v1/t.safetensors"] == (runs.folder / "out" / "t.safetensors").read_bytes()
    assert all(TOKEN.encode() not in content for content in files.values())


def test_states_stay_here_unless_they_are_to_be_uploaded(hub, runs):
    runs.train("--max_train_steps=1", "--save_state", *UPLOAD)
    assert set(hub.files("me/lora")) == {"t.safetensors"}


def test_failed_uploads_change_nothing(hub, runs, caplog):
    runs.train("--max_train_steps=2", output="plain")
    hub.repositories["model", "me/lora"] = Repository(private=True)
    hub.refuses_commits = True
    runs.train("--max_train_steps=2", "--save_every_n_steps=1", *UPLOAD, output="other")
    assert caplog.text.count("was not uploaded to me/lora") == 3  # both steps and the last file
    assert same_tensors(runs.lora("plain"), runs.lora("other"))


def test_a_run_goes_on_from_a_state_of_the_hub_as_if_it_had_not_stopped(hub, runs):
    runs.train("--max_train_steps=4", output="whole")
    runs.train("--max_train_steps=2", "--save_state", "--save_state_to_huggingface", *UPLOAD, output="first")
    resume = ("--resume=me/lora/t-state", "--resume_from_huggingface", f"--huggingface_token={TOKEN}")
    runs.train("--max_train_steps=4", *resume, output="second")
    assert same_tensors(runs.lora("whole"), runs.lora("second"))


def test_a_dry_run_makes_no_repository_but_checks_the_token(hub, runs):
    runs.checked("--max_train_steps=1", "--dry_run", *UPLOAD)
    assert hub.repositories == {} and hub.asked("GET", "whoami") == 1
    with pytest.raises(OptionError, match="the access token is not valid"):
        runs.checked("--max_train_steps=1", "--huggingface_repo_id=me/lora", "--huggingface_token=hf_bad")


def test_a_wrong_token_is_told_with_the_other_problems(hub, runs):
    with pytest.raises(OptionError) as caught:
        runs.checked("--huggingface_repo_id=me/lora", "--huggingface_token=hf_bad", "--network_weights=gone.safetensors")
    assert len(caught.value.problems) == 2 and hub.repositories == {}


def test_nothing_that_is_written_holds_the_token(hub, runs, caplog):
    caplog.set_level("DEBUG", logger="library")
    runs.train("--max_train_steps=1", "--save_state", f"--logging_dir={runs.folder / 'logs'}", "--log_config", *UPLOAD)
    written = [path for path in runs.folder.rglob("*") if path.is_file()]
    assert len(written) > 5 and all(TOKEN.encode() not in path.read_bytes() for path in written)
    assert TOKEN not in caplog.text and TOKEN not in json.dumps(runs.metadata())


TWO = """
import sys
from pathlib import Path
from tests.tiny_runs import TinyRuns
runs = TinyRuns.__new__(TinyRuns)
runs.folder, runs.pictures = Path(sys.argv[1]), Path(sys.argv[1]) / "pictures"
runs.train("--max_train_steps=2", "--save_every_n_steps=1", "--save_last_n_steps=1", "--save_state",
           "--save_state_to_huggingface", "--huggingface_repo_id=me/lora", "--huggingface_token=hf_good")
"""


def test_of_two_processes_one_uploads_and_both_wait(hub, runs, script_environment, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    environment = {**script_environment, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    assert [status for status, _ in run_two(tmp_path / "two.py", tmp_path, environment=environment)] == [0, 0]
    assert {"t-step00000001.safetensors", "t-step00000002-state/train_state.json", "t.safetensors"} <= set(hub.files("me/lora"))
    assert hub.asked("GET", "whoami") == 1 and hub.asked("POST", "repos/create") == 1
    assert hub.asked("POST", "/commit/") == 6  # two steps and the end, each a file and a state; from one process
