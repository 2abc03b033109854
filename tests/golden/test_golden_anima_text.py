from __future__ import annotations

import pytest
import torch

from library.anima.text import AnimaTextEncoder, build_qwen3
from library.anima.text_layout import read_text_encoder_layout
from library.anima.tokenizers import AnimaTokenizers
from library.files.safetensors_file import read_tensors, save_safetensors
from library.nn.loading import load_into
from library.text.tokenizer_files import padded
from tests.golden.golden_files import load_golden, relative_error


@pytest.mark.parametrize("prefix", ["model.", "", "text_encoders.qwen3_06b.transformer.model."])
def test_qwen3_states(tmp_path, prefix):
    golden = load_golden("anima/qwen3_text_encoder.safetensors")
    save_safetensors(tmp_path / "qwen3.safetensors", {prefix + k.removeprefix("model."): t for k, t in golden.weights.items()})
    layout = read_text_encoder_layout(tmp_path / "qwen3.safetensors")
    about = golden.about["config"]
    assert (layout.config.heads, layout.config.key_heads) == (about["num_attention_heads"], about["num_key_value_heads"])
    model = build_qwen3(layout.config)
    (source,) = layout.sources
    load_into(model, ((source.names[k], t) for k, t in read_tensors(source.header)), device="cpu", dtype=torch.float32)
    encoder = AnimaTextEncoder(model.eval(), AnimaTokenizers(None, None), layout.config.width)  # ids are given here
    states = encoder.states(golden.inputs["input_ids"], golden.inputs["attention_mask"])
    assert relative_error(states, golden.outputs["prompt_embeds"]) < 1e-5
    assert torch.equal(states == 0, golden.outputs["prompt_embeds"] == 0)
    nothing = encoder.states(golden.inputs["input_ids"][:1], torch.zeros(1, 14, dtype=torch.bool), nothing=True)
    assert torch.equal(nothing, golden.outputs["empty_prompt_embeds"])


@pytest.mark.parametrize("length", [12, 32])
def test_token_ids_and_masks(length):
    golden = load_golden("anima/tokenization.safetensors")
    tokenizers = AnimaTokenizers.bundled(qwen_max=length, t5_max=length)
    rows = [tokenizers.ids(prompt) for prompt in golden.about["prompts"]]
    for name, ids, pad_id in (("qwen3", [row.qwen for row in rows], tokenizers.qwen_pad_id), ("t5", [row.t5 for row in rows], 0)):
        full, mask = padded(ids, pad_id, length)
        assert full == golden.outputs[f"max_length_{length}/{name}_input_ids"].tolist()
        assert torch.equal(torch.tensor(mask), golden.outputs[f"max_length_{length}/{name}_attention_mask"].bool())
