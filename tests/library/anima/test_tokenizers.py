from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from library.anima.tokenizers import BUNDLED_QWEN, AnimaTokenizers, find_tokenizers, load_qwen
from library.errors import CheckpointError
from library.text.tokenizer_files import BUNDLED_T5, CONFIGS, SentencePieceIds, load_t5, padded
from tests.library.anima.tiny_qwen import SMALL_VOCABULARY, save_tiny_qwen

CAPTIONS = ["", "a cat", "1girl, (best:1.2), it's 12345", "猫が窓辺で。 e\u0301", "🎨🚀 naïve\n\n  x ", "<|im_start|>user </s>"]


@pytest.fixture(scope="module")
def bundled() -> AnimaTokenizers:
    return AnimaTokenizers.bundled()


@pytest.fixture(scope="module")
def qwen_json() -> dict:
    return json.loads(gzip.decompress((BUNDLED_QWEN / "tokenizer.json.gz").read_bytes()))


def test_published_ids(bundled):
    assert bundled.ids("a cat") == ([64, 8251], [3, 9, 1712, 1])
    assert bundled.ids("") == ([], [1])
    assert bundled.lengths("a cat") == ((2, None), (4, None))
    assert bundled.qwen_pad_id == 151643


def test_long_captions_lose_their_end_and_t5_keeps_its_last_token(bundled):
    short = AnimaTokenizers(bundled.qwen, bundled.t5, 5, 7)
    whole, cut = bundled.ids("a long caption about cats and dogs"), short.ids("a long caption about cats and dogs")
    assert cut.qwen == whole.qwen[:5]
    assert cut.t5 == [*whole.t5[:6], 1]
    assert short.lengths("a long caption about cats and dogs").t5.tokens == len(whole.t5) > 7


@pytest.mark.parametrize("caption", [*CAPTIONS, "a long caption, with été, 猫 and 🐈‍⬛; and more words"])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13])
def test_where_a_caption_is_cut(bundled, caption, limit):
    """What is left is all that the encoder sees: the kept characters alone give the kept tokens, but for a last one that had a part of a character."""
    lengths = AnimaTokenizers(bundled.qwen, bundled.t5, limit, limit).lengths(caption)
    for length, tokenizer, kept in ((lengths.qwen, bundled.qwen, limit), (lengths.t5, bundled.t5, limit - 1)):
        whole = tokenizer.encode(caption).ids
        assert length.tokens == len(whole) and (length.cut_at is None) == (len(whole) <= limit)
        if length.cut_at is not None:
            start = [token for token in tokenizer.encode(caption[: length.cut_at]).ids if token != 1 or tokenizer is bundled.qwen]
            assert len(start) <= kept and start[:-1] == whole[: len(start)][:-1]


def test_a_tokenizer_without_offsets_is_cut_at_the_same_places(bundled):
    class WithoutOffsets:
        def encode(self, caption):
            return SentencePieceIds(bundled.t5.encode(caption).ids)

    caption = "a long caption about cats and dogs, and about birds"
    for limit in range(1, 12):
        with_offsets = AnimaTokenizers(bundled.qwen, bundled.t5, 512, limit).lengths(caption).t5
        without = AnimaTokenizers(bundled.qwen, WithoutOffsets(), 512, limit).lengths(caption).t5
        assert without.tokens == with_offsets.tokens and without.cut_at is not None and with_offsets.cut_at is not None
        assert 0 <= without.cut_at - with_offsets.cut_at <= 1  # a blank that is no token yet


def test_padding():
    assert padded([[5, 6], []], 9) == ([[5, 6], [9, 9]], [[True, True], [False, False]])
    assert padded([[]], 9) == ([[9]], [[False]])
    assert padded([[5]], 0, 3) == ([[5, 0, 0]], [[True, False, False]])


def test_shipped_files_are_the_listed_ones():
    listed = dict(
        reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  .+$", (CONFIGS / "README.md").read_text("utf-8"), re.M)
    )
    shipped = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*") if path.parent.name != "examples"}
    assert set(listed) == shipped
    for name, digest in listed.items():
        assert hashlib.sha256((CONFIGS / name).read_bytes()).hexdigest() == digest, name


def test_own_folder_of_the_encoder_is_used(tmp_path, bundled, qwen_json):
    save_tiny_qwen(tmp_path / "model.safetensors", SMALL_VOCABULARY)
    assert find_tokenizers(tmp_path).qwen_dir == BUNDLED_QWEN
    (tmp_path / "tokenizer.json").write_text(json.dumps(qwen_json | {"truncation": {"max_length": 1, "strategy": "LongestFirst",
                                                                                  "stride": 0, "direction": "Right"}}), "utf-8")  # fmt: skip
    files = find_tokenizers(tmp_path, qwen_max=8, t5_max=9)
    assert (files.qwen_dir, files.t5_dir, files.qwen_max, files.t5_max) == (tmp_path, BUNDLED_T5, 8, 9)
    assert load_qwen(tmp_path).encode("a cat").ids == [64, 8251]  # the file's own limit of one token is not ours


@pytest.mark.parametrize("with_config", [True, False])
def test_vocabulary_and_merges_give_the_same_ids(tmp_path, bundled, qwen_json, with_config):
    (tmp_path / "vocab.json").write_text(json.dumps(qwen_json["model"]["vocab"]), "utf-8")
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in qwen_json["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    if with_config:
        shutil.copy(BUNDLED_QWEN / "tokenizer_config.json", tmp_path)
    own = load_qwen(tmp_path)
    for caption in CAPTIONS:
        assert own.encode(caption).ids == bundled.qwen.encode(caption).ids


def test_damaged_and_missing_tokenizers(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer.json and no vocab.json"):
        load_qwen(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer .*tokenizer.json"):
        load_qwen(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("[1]")
    (tmp_path / "merges.txt").write_text("a b c d\n")
    with pytest.raises(CheckpointError, match="vocab.json, merges.txt"):
        load_qwen(tmp_path)


def test_own_t5_folder(tmp_path, bundled):
    with pytest.raises(CheckpointError, match="--t5_tokenizer_path .* does not exist"):
        find_tokenizers(t5_path=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="has no tokenizer.json and no spiece.model"):
        find_tokenizers(t5_path=tmp_path)
    shutil.copy(BUNDLED_T5 / "tokenizer.json", tmp_path)
    assert find_tokenizers(t5_path=tmp_path).t5_dir == find_tokenizers(t5_path=tmp_path / "tokenizer.json").t5_dir == tmp_path
    assert load_t5(tmp_path).encode("a cat").ids == [3, 9, 1712, 1]


def test_t5_folder_with_the_tokenizer_of_another_model(tmp_path, qwen_json):
    (tmp_path / "tokenizer.json").write_text(json.dumps(qwen_json), "utf-8")
    with pytest.raises(CheckpointError, match="is not a T5 tokenizer"):
        load_t5(tmp_path)


def test_sentencepiece_model(tmp_path, monkeypatch):
    import sys

    (tmp_path / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"cannot load the tokenizer .*spiece.model"):
        load_t5(Path(tmp_path))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_t5(Path(tmp_path))


def test_tokenizer_larger_than_the_encoder(bundled):
    bundled.check_vocabulary(151936)
    with pytest.raises(CheckpointError, match="151,669 tokens, the encoder only 64"):
        bundled.check_vocabulary(64)
