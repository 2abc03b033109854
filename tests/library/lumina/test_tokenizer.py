"""Gemma's tokenizer: the same ids as Hugging Face's, from wherever it comes. Hubs are our own (tests/fake_hub.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.lumina.tokenizer import HUB_ID, GemmaTokenizer, GemmaTokenizerFile, find_gemma_tokenizer
from tests.fake_hub import FakeHub, Repository, asked
from tests.library.lumina.gemma_files import gemma_tensors, written
from tools.tiny_lumina import MARKS, trained_tokenizer

TEXTS = [
    "a red circle on a white table, soft light",
    "",
    "a",
    " leading and trailing  ",
    "runs  of   spaces    and     more",
    "lines\nand\n\nmore\n\n\n\nlines",
    "tabs\tand\r\nother things",
    "unknown: \u732b \U0001f408 \u00e9\u00df \u0416 \u2581 \u200b",
    "digits 1234567890, (brackets:1.3) <tags> \\escapes",
    "a <bos> b<eos>c <pad><unk> <start_of_turn>user <mask> <0x41> </s>",
]


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return trained_tokenizer()


@pytest.fixture(scope="module")
def model_file(spiece, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gemma tokenizer") / "tokenizer.model"
    path.write_bytes(spiece)
    return path


@pytest.fixture(scope="module")
def json_file(model_file, tmp_path_factory) -> Path:
    """The same tokenizer as ``tokenizer.json``, made by transformers."""
    from transformers import GemmaTokenizerFast

    path = tmp_path_factory.mktemp("gemma json") / "tokenizer.json"
    GemmaTokenizerFast.from_pretrained(str(model_file.parent)).backend_tokenizer.save(str(path))
    return path


def loaded(path: Path, max_tokens: int = 256) -> GemmaTokenizer:
    return GemmaTokenizerFile(path=path, max_tokens=max_tokens).load()


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_are_those_of_hugging_face(model_file, json_file, text):
    from tokenizers import Tokenizer

    theirs = [2, *Tokenizer.from_file(str(json_file)).encode(text, add_special_tokens=False).ids]
    assert loaded(model_file).ids(text) == theirs
    assert loaded(json_file).ids(text) == theirs


def test_marks_and_bytes(model_file):
    tokenizer = loaded(model_file)
    assert tokenizer.ids("") == [2]
    assert tokenizer.ids("<bos><eos><pad><unk>") == [2, 2, 1, 0, 3]
    assert tokenizer.ids("\n\n") == [2, 4 + MARKS.index("\n\n")]
    first_byte = tokenizer.pieces.model.piece_to_id("<0x00>")
    assert tokenizer.ids("\u732b") == [2, *(first_byte + byte for byte in "\u732b".encode())]


@pytest.mark.parametrize("text", [text for text in TEXTS if len(text) > 1])
def test_where_a_text_is_cut(model_file, json_file, text):
    whole = loaded(model_file).ids(text)
    assert loaded(model_file, len(whole)).length(text) == (len(whole), None)
    for limit in range(1, len(whole)):
        ours, theirs = (loaded(path, limit) for path in (model_file, json_file))
        assert ours.ids(text) == theirs.ids(text) == whole[:limit]
        assert ours.length(text) == theirs.length(text)  # of which the second goes by the package's own places
        assert ours.length(text).tokens == len(whole) and 0 <= ours.length(text).cut_at < len(text)


def test_a_character_cut_in_two_does_not_count(model_file):
    text = "a \u732b"
    whole = loaded(model_file).ids(text)
    for lost in (1, 2, 3):
        assert loaded(model_file, len(whole) - lost).length(text).cut_at == 2
    assert loaded(model_file, len(whole)).length(text).cut_at is None


def test_counting_needs_no_torch_and_is_quick(tiny_lumina):
    code = (
        "import sys; from pathlib import Path; from library.files.open_weights import open_weights; "
        "from library.lumina.tokenizer import find_gemma_tokenizer; "
        f"weights = open_weights(Path({str(tiny_lumina['whole'])!r}), flag='--gemma2'); "
        "print(find_gemma_tokenizer(None, weights, max_tokens=4).load().length('a red circle on a table').tokens); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7"


# ---------------------------------------------------------------- where it comes from


@pytest.mark.parametrize("role", ["gemma2", "gemma2_folder", "whole"])
def test_it_comes_with_the_weights(tiny_lumina, spiece, role):
    weights = open_weights(tiny_lumina[role], flag="--gemma2")
    found = find_gemma_tokenizer(None, weights, max_tokens=9)
    assert found.content() == spiece and found.load().max_tokens == 9
    assert ("tokenizer.model" if role == "gemma2_folder" else "spiece_model in ") in found.name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("name", ["spiece_model", "encoders.gemma.spiece_model"])
@pytest.mark.parametrize("is_pickle", [False, True])
def test_its_bytes_may_have_any_prefix_and_either_type(tiny_lumina, tmp_path, spiece, name, dtype, is_pickle):
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    tensors = {"a.spiece_model": torch.zeros(4), name: tensors.pop("spiece_model").view(dtype), **tensors}
    if name == "spiece_model":
        del tensors["a.spiece_model"]  # of another text encoder
    path = tmp_path / f"weights.{'pt' if is_pickle else 'safetensors'}"
    if is_pickle:
        torch.save(tensors, path)
    else:
        written(path, tensors, like=tiny_lumina["gemma2"])
    assert find_gemma_tokenizer(None, open_weights(path, flag="--gemma2"), max_tokens=9).content() == spiece


def test_shards_carry_it_too(tiny_lumina, tmp_path, spiece):
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    names = sorted(tensors)
    index = {}
    for shard, own in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        written(tmp_path / shard, {name: tensors[name] for name in own}, like=tiny_lumina["gemma2"])
        index.update(dict.fromkeys(own, shard))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert find_gemma_tokenizer(None, open_weights(tmp_path, flag="--gemma2"), max_tokens=9).content() == spiece


def test_it_lies_beside_the_encoder_of_a_diffusers_folder(tiny_lumina, model_file, tmp_path, monkeypatch):
    shutil.copytree(tiny_lumina["gemma2_folder"], tmp_path / "text_encoder", ignore=shutil.ignore_patterns("tokenizer.*"))
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(model_file, tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path / "text_encoder")
    for folder in (tmp_path / "text_encoder", Path()):
        found = find_gemma_tokenizer(None, open_weights(folder, flag="--gemma2"), max_tokens=9)
        assert found.path == (tmp_path / "tokenizer" / "tokenizer.model").resolve()


def test_what_is_named_wins(tiny_lumina, json_file, model_file, tmp_path):
    weights = open_weights(tiny_lumina["gemma2"], flag="--gemma2")
    for value in (str(json_file), str(json_file.parent)):
        assert find_gemma_tokenizer(value, weights, max_tokens=9).path == json_file
    shutil.copy(json_file, tmp_path)
    shutil.copy(model_file, tmp_path)
    assert find_gemma_tokenizer(str(tmp_path), weights, max_tokens=9).path == tmp_path / "tokenizer.model"


def test_the_fingerprint_is_of_the_content(tiny_lumina, model_file, json_file):
    weights = open_weights(tiny_lumina["gemma2"], flag="--gemma2")
    one, same, other = (
        find_gemma_tokenizer(value, weights, max_tokens=9).fingerprint() for value in (None, str(model_file), str(json_file))
    )
    assert one == same != other and len(one) == 32


def test_what_is_named_and_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="--gemma2_tokenizer .*nothing does not exist: give a folder with tokenizer.model"):
        find_gemma_tokenizer(str(tmp_path / "nothing"), None, max_tokens=9)
    with pytest.raises(CheckpointError, match="--gemma2_tokenizer .* has neither tokenizer.model nor tokenizer.json"):
        find_gemma_tokenizer(str(tmp_path), None, max_tokens=9)


def test_damaged_and_foreign_tokenizers(tiny_lumina, tmp_path):
    for content in (b"", b"no model"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match="tokenizer.model cannot be loaded: its bytes are no SentencePiece model; give"):
            loaded(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer .*tokenizer.json"):
        loaded(tmp_path / "tokenizer.json")
    from library.text.tokenizer_files import BUNDLED_T5

    with pytest.raises(CheckpointError, match="is not Gemma's: its <bos> is None, not 2"):
        loaded(BUNDLED_T5 / "tokenizer.json")
    tensors = {**gemma_tensors(tiny_lumina["gemma2"]), "spiece_model": torch.zeros(4)}
    weights = written(tmp_path / "gemma.safetensors", tensors, like=tiny_lumina["gemma2"])
    with pytest.raises(CheckpointError, match="spiece_model is stored as F32, where bytes .U8 or I8. are wanted"):
        find_gemma_tokenizer(None, weights, max_tokens=9).load()


def test_a_sentencepiece_model_of_another_family_is_refused(tmp_path):
    import io

    from sentencepiece import SentencePieceTrainer

    written_model = io.BytesIO()
    text = ["a red circle on a table"] * 8
    SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=written_model, vocab_size=30, minloglevel=2,
                               model_type="bpe", hard_vocab_limit=False)  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(written_model.getvalue())
    with pytest.raises(CheckpointError, match="is not Gemma's: its <bos> is 1, not 2"):
        loaded(tmp_path / "tokenizer.model")


def test_a_tokenizer_larger_than_the_encoder(model_file):
    tokenizer = loaded(model_file)
    tokenizer.check_vocabulary(tokenizer.pieces.size)
    with pytest.raises(CheckpointError, match="Gemma 2 only 300: --gemma2_tokenizer must name"):
        tokenizer.check_vocabulary(300)


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    with asked(monkeypatch, tmp_path) as server:
        monkeypatch.chdir(tmp_path)
        yield server


def publish(hub: FakeHub, *files: Path, name: str = HUB_ID) -> None:
    hub.repositories["model", name] = Repository(private=False, files={path.name: path.read_bytes() for path in files})


def test_the_hub_is_asked_where_nothing_else_has_it(hub, tiny_lumina, tmp_path, model_file, json_file, spiece):
    publish(hub, model_file, json_file)
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    del tensors["spiece_model"]
    weights = written(tmp_path / "gemma.safetensors", tensors, like=tiny_lumina["gemma2"])
    found = find_gemma_tokenizer(None, weights, max_tokens=9, token="hf_reader")
    assert found.content() == spiece and found.load().ids("a red circle")[0] == 2
    assert hub.asked("GET", "tokenizer.json") == 0  # one is enough
    asked_so_far = len(hub.requests)
    assert find_gemma_tokenizer(None, weights, max_tokens=9).path == found.path
    assert len(hub.requests) == asked_so_far  # the cache has it


def test_a_repository_of_ones_own(hub, json_file):
    publish(hub, json_file, name="me/gemma")
    found = find_gemma_tokenizer("me/gemma", None, max_tokens=9, token="hf_reader")
    assert found.path.name == "tokenizer.json" and found.load().ids("a")[0] == 2
    hub.repositories["model", "me/other"] = Repository(private=False, files={"README.md": b"x"})
    with pytest.raises(CheckpointError, match="--gemma2_tokenizer me/other.*holds no tokenizer.model or tokenizer.json"):
        find_gemma_tokenizer("me/other", None, max_tokens=9, token="hf_reader")


def test_a_gated_hub_says_what_to_do(hub, model_file):
    publish(hub, model_file)
    hub.gated.add(HUB_ID)
    with pytest.raises(CheckpointError) as error:
        find_gemma_tokenizer(None, None, max_tokens=9, token="hf_reader")
    (text,) = error.value.problems
    for part in ("accepted Google's licence on its page", "hf auth login", "--huggingface_token", "spiece_model",
                 "--gemma2_tokenizer a folder with tokenizer.model"):  # fmt: skip
        assert part in text
    assert "hf_reader" not in text and "\n" not in text


WITHOUT_NETWORK = (
    "^Gemma 2's tokenizer is not with its weights, and google/gemma-2-2b on the hub does not give it: .*HF_HUB_OFFLINE is set.* "
    "Or give a Gemma 2 file that carries"
)


def test_without_the_network(hub, model_file, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=WITHOUT_NETWORK):
        find_gemma_tokenizer(None, None, max_tokens=9)
    assert not hub.requests
