"""diffusers loads what we save into its Stable Diffusion 3 pipeline, and its models change as ours do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from networks import lora_sd3
from networks.lora_formats import read_in_our_layout
from networks.sd3_layouts import SD3_NAMES
from tests.networks.sd3_models import TINY, tiny_denoiser, tiny_text_encoders
from tests.networks.sd_models import randomize
from tests.networks.test_sd_client_diffusers import their_encoder

diffusers = pytest.importorskip("diffusers", minversion="0.35")
pytest.importorskip("peft")

EMBEDDERS = {"emb_dims": "[3,1,2,5,4,4]"}
RANKS = {"x_attn_dim": "2", "context_mlp_dim": "6"}


class Models:
    """Ours with a LoRA in them, and a pipeline of diffusers with the same weights."""

    def __init__(self, arguments: dict[str, str]):
        self.denoiser, self.encoders = tiny_denoiser(), tiny_text_encoders()[:2]
        self.pipeline = pipeline_of(self.denoiser, self.encoders)
        torch.manual_seed(4)
        self.network = lora_sd3.create_network(1.0, 4, 3.0, None, self.encoders, self.denoiser, **arguments)
        self.network.apply_to(self.encoders, self.denoiser)
        randomize(self.network)

    @property
    def their_parts(self) -> list[nn.Module]:
        return [self.pipeline.transformer, self.pipeline.text_encoder, self.pipeline.text_encoder_2]


def pipeline_of(denoiser: nn.Module, encoders: list[nn.Module]):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=TINY.position_side * 2, patch_size=2, in_channels=16, num_layers=TINY.blocks, num_attention_heads=TINY.heads,
        attention_head_dim=TINY.head_dim, joint_attention_dim=TINY.context_width, caption_projection_dim=TINY.width,
        pooled_projection_dim=TINY.pooled_width, out_channels=16, pos_embed_max_size=TINY.position_side,
        dual_attention_layers=TINY.dual_blocks, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(denoiser.state_dict()))
    with_mlp = resized_mlps(transformer)
    with_mlp.load_state_dict(converted)
    return diffusers.StableDiffusion3Pipeline(
        transformer=with_mlp, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=their_encoder(encoders[0]),
        tokenizer=None, text_encoder_2=their_encoder(encoders[1]), tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def resized_mlps(transformer: nn.Module) -> nn.Module:
    """diffusers' MLPs are four times as wide as the model; ours are what the file says."""
    for block in transformer.transformer_blocks:
        for feed_forward in (block.ff, block.ff_context):
            if feed_forward is not None:
                feed_forward.net[0].proj = nn.Linear(TINY.width, TINY.mlp_hidden)
                feed_forward.net[2] = nn.Linear(TINY.mlp_hidden, TINY.width)
    return transformer


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "latents": torch.randn(2, 16, 8, 12, generator=generator),
        "times": torch.tensor([30.0, 700.0]),
        "context": torch.randn(2, 5, TINY.context_width, generator=generator),
        "pooled": torch.randn(2, TINY.pooled_width, generator=generator),
        "ids": torch.tensor([[0, 9, 33, 2, 1], [0, 50, 7, 8, 2]]),
    }


@torch.no_grad()
def our_outputs(models: Models) -> list[Tensor]:
    given = inputs()
    predicted = models.denoiser(given["latents"], given["times"], given["context"], given["pooled"])
    texts = [encoder.run(encoder.embed(given["ids"]), 0, encoder.config.layers) for encoder in models.encoders]
    return [predicted, *texts]


@torch.no_grad()
def their_outputs(models: Models) -> list[Tensor]:
    given = inputs()
    predicted = models.pipeline.transformer(given["latents"], given["context"], given["pooled"], given["times"]).sample
    texts = [encoder(given["ids"], output_hidden_states=True).hidden_states[-1] for encoder in models.their_parts[1:]]
    return [predicted, *texts]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"split_qkv": "true"}, EMBEDDERS, {**EMBEDDERS, **RANKS, "split_qkv": "true"}, {**RANKS, "train_block_indices": "0,2"}],
    ids=["plain", "split", "embedders", "all", "some blocks"],
)
def test_a_saved_file_changes_diffusers_output_as_ours(arguments, tmp_path):
    models, file = Models(arguments), tmp_path / "a.safetensors"
    assert models.network.layout_problems("diffusers") == []
    models.network.save_weights_as("diffusers", file, None, {})
    theirs_before, ours = their_outputs(models), our_outputs(models)
    models.network.set_enabled(False)
    ours_before = our_outputs(models)
    models.pipeline.load_lora_weights(str(file))
    theirs = their_outputs(models)
    for before, their_before, our, their in zip(ours_before, theirs_before, ours, theirs, strict=True):
        assert (before - their_before).abs().max() / before.abs().max() < 3e-5
        change = our - before
        assert change.abs().max() / before.abs().max() > 0.05  # the LoRA does something
        assert (change - (their - their_before)).abs().max() / change.abs().max() < 1e-4


@pytest.mark.parametrize("split", ["true", "false"])
def test_what_diffusers_reads_comes_back_as_it_was(split, tmp_path):
    """Strength apart, which is multiplied in there."""
    models = Models({**EMBEDDERS, "split_qkv": split})
    models.network.save_weights_as("diffusers", tmp_path / "a.safetensors", None, {})
    read, own = read_in_our_layout(tmp_path / "a.safetensors", SD3_NAMES), models.network.file_tensors()
    assert set(read) == set(own)
    for name in {key.partition(".")[0] for key in own}:
        strength = float(own[f"{name}.alpha"]) / own[f"{name}.lora_down.weight"].shape[0]
        assert float(read[f"{name}.alpha"]) == read[f"{name}.lora_down.weight"].shape[0]
        assert torch.equal(read[f"{name}.lora_down.weight"], own[f"{name}.lora_down.weight"]), name
        torch.testing.assert_close(read[f"{name}.lora_up.weight"], own[f"{name}.lora_up.weight"] * strength)


@torch.no_grad()
def test_a_file_that_diffusers_has_saved_acts_here_as_there(tmp_path):
    """With PEFT's own settings: pairs of q and v, k has none, and alpha in the metadata."""
    from peft import LoraConfig

    models = Models({})
    models.network.set_enabled(False)
    ours_before, theirs_before = our_outputs(models), their_outputs(models)
    settings = LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "to_v", "add_k_proj", "norm1_context.linear", "norm_out.linear"]
    )
    transformer = models.pipeline.transformer
    transformer.add_adapter(settings)
    torch.manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    change = their_outputs(models)[0] - theirs_before[0]
    save_as_diffusers(models.pipeline, transformer, tmp_path)
    network, weights = lora_sd3.create_network_from_weights(1.0, only_file(tmp_path), None, None, models.denoiser)
    assert any(name.lora_name.endswith("attn2_qkv") for name in network.loras)
    network.merge_to(None, models.denoiser, weights)
    ours = our_outputs(models)[0] - ours_before[0]
    assert change.abs().max() > 0.05 * theirs_before[0].abs().max()
    assert (change - ours).abs().max() / change.abs().max() < 1e-4


def save_as_diffusers(pipeline, transformer: nn.Module, folder: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    pipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )  # fmt: skip


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_t5_has_no_place_there():
    """diffusers' loader leaves a third text encoder's keys out without a word."""
    unet, encoders = tiny_denoiser(), tiny_text_encoders()
    network = lora_sd3.create_network(1.0, 4, 3.0, None, encoders, unet, train_t5xxl="true")
    network.apply_to(encoders, unet)
    (problem,) = network.layout_problems("diffusers")
    assert "no place for 14 of its modules (lora_te3_encoder_block_0" in problem
    with pytest.raises(CheckpointError, match="no place for 14 modules"):
        network.save_weights_as("diffusers", Path("never.safetensors"), None, {})
    assert "text_encoder_3" not in diffusers.StableDiffusion3Pipeline._lora_loadable_modules
