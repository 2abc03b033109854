from __future__ import annotations

import json

import pytest
import torch

from library.sd.clip import build_clip, load_clip
from library.sd.clip_layout import clip_part
from library.sd.clip_tokenizer import CLIP_L, OPEN_CLIP_G, OPEN_CLIP_H, ClipTokenizer, load_tokenizers
from library.sd.prompt_weights import parse_weights
from library.sd.text import SdTextEncoder, equally_long
from library.sdxl.text import SdxlTextEncoder
from tests.golden.golden_files import Golden, load_golden, relative_error
from tests.library.sd.clip_files import MemorySource

KINDS = {"sd1": CLIP_L, "sd2": OPEN_CLIP_H, "sdxl_te1": CLIP_L, "sdxl_te2": OPEN_CLIP_G}
LENGTHS = {"77": None, "75": 75, "150": 150, "225": 225}
L_PREFIX, G_PREFIX = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ClipTokenizer]:
    return dict(zip(KINDS, load_tokenizers(*KINDS.values()), strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_token_ids(tokenizers, name, length):
    golden = load_golden("sd/clip_token_ids.safetensors")
    for weighted in (False, True):
        texts = [tokenizers[name].rows(c, tokens=LENGTHS[length] or 75, weighted=weighted) for c in golden.about["captions"]]
        start = "weighted_" if weighted else ""
        assert [text.ids for text in texts] == golden.outputs[f"{start}ids/{name}/{length}"].tolist()
        if weighted:
            expected = golden.outputs[f"weighted_weights/{name}/{length}"]
            assert torch.allclose(torch.tensor([text.weights for text in texts]), expected, rtol=1e-6)


def test_parsed_weights():
    about = load_golden("sd/clip_token_ids.safetensors").about
    captions = dict(zip(about["caption_names"], about["captions"], strict=True))
    for name, expected in about["parsed_weights"].items():
        assert [list(part) for part in parse_weights(captions[name])] == expected


def clip_model(golden: Golden, prefix: str, layout: str, settings: dict, *, keep_layers: int | None = None):
    weights = {key: tensor.float() for key, tensor in golden.weights.items()}
    number = 1 if "embedders.1." in prefix else 0
    entry = {"heads": settings["heads"], "activation": settings["act"]}
    source = MemorySource(weights, {"config": json.dumps({"text": [{}] * number + [entry]})})
    part = clip_part(source, prefix=prefix, layout=layout, keep_layers=keep_layers)
    assert (part.config.layers, part.config.width, part.config.mlp_width) == tuple(
        settings[name] for name in ("layers", "hidden", "intermediate")
    )
    model = build_clip(part.config)
    load_clip(model, part, device="cpu", dtype=torch.float32)
    return model


def check_states(golden: Golden, model, tokenizer: ClipTokenizer) -> None:
    """Every ``hidden_[weighted_]<length>_clipskip_<n>`` of the file."""
    checked = 0
    for name, expected in golden.outputs.items():
        *weighted, length, _, skip = name.removeprefix("hidden_").split("_")
        encoder = SdTextEncoder(
            model,
            tokenizer,
            clip_skip=None if skip == "absent" else int(skip),
            max_token_length=LENGTHS[length],
            weighted_captions=bool(weighted),
        )
        with torch.no_grad():
            assert relative_error(encoder.encode(golden.about["captions"]).states, expected) < 1e-5, name
        checked += 1
    assert checked >= 7


def test_states_of_stable_diffusion_1(tokenizers):
    golden = load_golden("sd/sd1_text.safetensors")
    check_states(golden, clip_model(golden, "cond_stage_model.transformer.", "hf", golden.about["config"]), tokenizers["sd1"])


def test_states_of_stable_diffusion_2(tokenizers):
    golden = load_golden("sd/sd2_text.safetensors")
    model = clip_model(golden, "cond_stage_model.model.", "open_clip", golden.about["config"], keep_layers=-1)
    check_states(golden, model, tokenizers["sd2"])


def test_prompts_of_previews(tokenizers):
    golden = load_golden("sd/sd1_sampling_prompt.safetensors")
    model = clip_model(golden, "cond_stage_model.transformer.", "hf", golden.about["config"])
    for case in golden.about["cases"]:
        encoder = SdTextEncoder(model, tokenizers["sd1"], clip_skip=case["clip_skip"])
        with torch.no_grad():
            positive, negative = encoder.encode_prompts([case["prompt"], case["negative"]]).split()
        name = f"{case['index']}_{case['clip_skip']}"
        for found, which in zip(equally_long(positive, negative), ("cond", "uncond"), strict=True):
            assert found.states.shape[1] == case["length"]
            assert relative_error(found.states, golden.outputs[f"{name}/{which}"]) < 1e-5, (name, which)


@pytest.mark.parametrize("length", ["77", "150"])
def test_states_and_pooled_vectors_of_sdxl(tokenizers, length):
    golden = load_golden("sdxl/sdxl_text.safetensors")
    about = golden.about["config"]
    clip_l, clip_g = clip_model(golden, L_PREFIX, "hf", about["te1"]), clip_model(golden, G_PREFIX, "open_clip", about["te2"])
    encoder = SdxlTextEncoder(clip_l, clip_g, (tokenizers["sdxl_te1"], tokenizers["sdxl_te2"]), max_token_length=LENGTHS[length])
    width = about["te1"]["hidden"]
    with torch.no_grad():
        plain, weighed = encoder.encode(golden.about["captions"]), encoder.encode_prompts(golden.about["captions"])
    for found, start in ((plain, ""), (weighed, "weighted_")):
        states = found.states.split([width, found.states.shape[2] - width], dim=2)
        for number, own in enumerate(states, start=1):
            assert relative_error(own, golden.outputs[f"{length}/{start}hidden{number}"]) < 1e-5
    assert relative_error(plain.pooled, golden.outputs[f"{length}/pooled_x_at_P"]) < 1e-5
    # the golden file has the pooled vectors of weighted captions only with the matrix turned the wrong way round
    turned = torch.nn.Parameter(clip_g.text_projection.weight.t().contiguous(), requires_grad=False)
    clip_g.text_projection.weight = turned
    with torch.no_grad():
        found = encoder.encode_prompts(golden.about["captions"])
    assert relative_error(found.pooled, golden.outputs[f"{length}/weighted_pooled_reference_as_is"]) < 1e-5
