"""diffusers loads what we save into its pipelines, and its models change as ours do: the same tiny weights, the same LoRA."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import lora
from tests.networks.sd_models import TINY_TEXTS, TINY_UNETS, randomize, text_encoders_of, unet_of

diffusers = pytest.importorskip("diffusers", minversion="0.35")
pytest.importorskip("peft")

CONVOLUTIONS = {"conv_dim": "3", "conv_alpha": "2"}
METADATA = {"ss_network_module": "networks.lora"}


class Models:
    """One kind's models, ours with a LoRA in them, and a pipeline of diffusers with the same weights."""

    def __init__(self, kind: str, arguments: dict[str, str]):
        torch.manual_seed(0)
        self.kind = kind
        self.unet, self.encoders = unet_of(kind, tiny=True), text_encoders_of(kind, tiny=True)
        self.pipeline = pipeline_of(kind, self.unet, self.encoders)
        self.network = lora.create_network(1.0, 4, 3.0, None, self.encoders, self.unet, **arguments)
        self.network.apply_to(self.encoders, self.unet)
        randomize(self.network)

    @property
    def their_encoders(self) -> list[nn.Module]:
        second = [self.pipeline.text_encoder_2] if self.kind == "sdxl" else []
        return [self.pipeline.text_encoder, *second]


def pipeline_of(kind: str, unet: nn.Module, encoders: list[nn.Module]):
    from library.sd.unet import diffusers_config

    # SD 2 as it is published: with Linears
    config = {**diffusers_config(TINY_UNETS[kind]), "use_linear_projection": kind != "sd1"}
    theirs = diffusers.UNet2DConditionModel(**config).eval()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in unet.state_dict().items()})
    parts = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor"))
    parts |= {"unet": theirs, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    parts |= {name: their_encoder(encoder) for name, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=False)}
    made = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    known = inspect.signature(made.__init__).parameters
    settings = {"add_watermarker": False} if kind == "sdxl" else {"requires_safety_checker": False}
    return made(**{name: part for name, part in parts.items() if name in known}, **settings)


def their_encoder(encoder: nn.Module) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ours = encoder.config
    config = CLIPTextConfig(
        hidden_size=ours.width, num_hidden_layers=ours.layers, intermediate_size=ours.mlp_width, num_attention_heads=ours.heads,
        vocab_size=ours.vocabulary, max_position_embeddings=ours.positions, hidden_act=ours.activation,
        projection_dim=ours.projection or 8, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    made = (CLIPTextModelWithProjection if ours.projection else CLIPTextModel)(config).eval()
    flat = not any(name.startswith("text_model.") for name in made.state_dict())
    made.load_state_dict({name.removeprefix("text_model.") if flat else name: t for name, t in encoder.state_dict().items()})
    return made


def inputs(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "times": torch.tensor([3, 700]),
        "context": torch.randn(2, 5, TINY_UNETS[kind].context_width, generator=generator),
        "pooled": torch.randn(2, 24, generator=generator),
        "sizes": torch.randint(0, 64, (2, 6), generator=generator),
        "ids": torch.tensor([[0, 9, 33, 2, 1], [0, 50, 7, 8, 2]]),
    }


@torch.no_grad()
def our_outputs(models: Models) -> list[Tensor]:
    given, vector = inputs(models.kind), None
    if models.kind == "sdxl":
        waves = models.pipeline.unet.add_time_proj(given["sizes"].flatten()).reshape(2, -1)
        vector = torch.cat((given["pooled"], waves), dim=1)
    unet = models.unet.predict(given["latents"], given["times"], given["context"], vector)
    layers = [config.layers for config in TINY_TEXTS[models.kind]]
    texts = [encoder.run(encoder.embed(given["ids"]), 0, count) for encoder, count in zip(models.encoders, layers, strict=True)]
    return [unet, *texts]


@torch.no_grad()
def their_outputs(models: Models) -> list[Tensor]:
    given = inputs(models.kind)
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if models.kind == "sdxl" else None
    unet = models.pipeline.unet(given["latents"], given["times"], given["context"], added_cond_kwargs=added).sample
    texts = [encoder(given["ids"], output_hidden_states=True).hidden_states[-1] for encoder in models.their_encoders]
    return [unet, *texts]


@pytest.mark.parametrize(
    ("kind", "layout", "arguments"),
    [
        ("sd1", None, {}),
        pytest.param("sd1", None, CONVOLUTIONS, marks=pytest.mark.slow),
        pytest.param("sdxl", None, {}, marks=pytest.mark.slow),
        ("sdxl", None, CONVOLUTIONS),
        pytest.param("sd1", "diffusers", CONVOLUTIONS, marks=pytest.mark.slow),
        ("sd2", "diffusers", {}),
        pytest.param("sd2", "diffusers", CONVOLUTIONS, marks=pytest.mark.slow),
        pytest.param("sdxl", "diffusers", CONVOLUTIONS, marks=pytest.mark.slow),
    ],
)
def test_a_saved_file_changes_diffusers_output_as_ours(kind, layout, arguments, tmp_path):
    models = Models(kind, arguments)
    save(models, layout, tmp_path / "a.safetensors")
    theirs_before, ours = their_outputs(models), our_outputs(models)
    models.network.set_enabled(False)
    ours_before = our_outputs(models)
    models.pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert loaded_modules(models) == len(models.network.loras)
    theirs = their_outputs(models)
    for before, their_before, our, their in zip(ours_before, theirs_before, ours, theirs, strict=True):
        assert (before - their_before).abs().max() / before.abs().max() < 3e-5
        change = our - before
        assert change.abs().max() / before.abs().max() > 0.05  # the LoRA does something
        assert (change - (their - their_before)).abs().max() / change.abs().max() < 1e-4


def save(models: Models, layout: str | None, file: Path) -> None:
    if layout is None:
        models.network.save_weights(file, None, METADATA)
    else:
        models.network.save_weights_as(layout, file, None, METADATA)


def loaded_modules(models: Models) -> int:
    parts = [models.pipeline.unet, *models.their_encoders]
    return sum(hasattr(module, "lora_A") and len(module.lora_A) > 0 for part in parts for module in part.modules())


def test_why_sd2_has_a_layout_of_its_own(tmp_path):
    """If this fails, diffusers has learnt to take SD 2's 4-D weights, and the docs need not send people to --save_format."""
    models = Models("sd2", {})
    save(models, None, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match=r"proj_in.*shape torch\.Size\(\[4, 8, 1, 1\]\)"):
        models.pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
