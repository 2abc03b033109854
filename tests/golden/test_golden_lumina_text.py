from __future__ import annotations

import json

import pytest
import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.files.weights_source import module_tensors
from library.lumina.gemma import build_gemma, run_gemma
from library.lumina.gemma_layout import gemma_part
from library.nn.loading import load_into
from tests.golden.golden_files import load_golden, relative_error

TOLERANCE = 1e-5  # the file allows 1e-4


@pytest.mark.parametrize("prefix", ["model.", "", "text_encoders.gemma2_2b.transformer.model."])
def test_states_with_the_soft_cap(tmp_path, prefix):
    golden = load_golden("lumina/gemma2_text_encoder.safetensors")
    about = golden.about["config"]
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in golden.weights.items()}
    header = {"config": json.dumps({"gemma2": {"heads": about["num_attention_heads"]}})}
    save_safetensors(tmp_path / "gemma2.safetensors", tensors, header)
    part = gemma_part(open_weights(tmp_path / "gemma2.safetensors", flag="--gemma2"))
    assert (part.config.head_dim, part.config.key_heads) == (about["head_dim"], about["num_key_value_heads"])
    assert (part.config.softcap, part.config.query_scalar) == (about["attn_logit_softcapping"], about["query_pre_attn_scalar"])
    model = build_gemma(part.config).eval()
    load_into(model, module_tensors(part.source, part.pieces), device="cpu", dtype=torch.float32)
    valid = golden.inputs["attention_mask"].bool()
    with torch.no_grad():
        states = run_gemma(model, golden.inputs["input_ids"])[valid]
    assert relative_error(states, golden.outputs["hidden_states_second_last_with_softcap"][valid]) < TOLERANCE
    # attention without the cap, as some of transformers' kernels do it, is told from it by far
    assert relative_error(states, golden.outputs["hidden_states_second_last"][valid]) > 100 * TOLERANCE
