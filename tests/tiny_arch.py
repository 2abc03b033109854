"""A fake architecture in about forty lines: the proof that the trainer's seams are right. It trains through the real ``train()``."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.token_use import TokenLimit, TokenUse, cut_caption_warnings, cut_texts
from library.nn.blocks import run_plainly
from library.nn.memory_use import MemoryUse
from library.sampling.picture_plan import Picture
from library.training.loss.objective import FlowObjective
from train_network import NetworkTrainer

TOKENS = 40  # of a caption that count for token_counter


class TinyArchitecture:
    name, bucket_step = "tiny", 16
    prompt_settings = frozenset({"prompt", "negative_prompt", "width", "height", "seed"})

    knows_all_samplers = prompts_apart = False

    def model_lines(self, layouts, options):
        return ["model: tiny"]

    def warnings_of(self, layouts, options):
        return ()

    def read_layouts(self, options, parts=()):
        return SimpleNamespace()

    def size_problems(self, layouts, sizes_wh, options):
        return ()

    def latent_recipe(self, layouts, options):
        return LatentRecipe(arch="tiny", vae_fingerprint="0", dtype="float32", channels=3)

    def text_recipe(self, layouts, options):
        return TextRecipe(arch="tiny", encoder_fingerprint="0", dtype="float32", settings={})

    def token_counter(self, options):
        """A character is a token."""
        return lambda text: (TokenUse("letters", len(text), TOKENS, TOKENS if len(text) > TOKENS else None),)

    def positive_prompt(self, prompt, options):
        return prompt

    def cut_prompts(self, texts, options):
        return cut_texts(texts, lambda: self.token_counter(options), limit=TOKENS)

    def caption_warnings(self, training_set, options):
        lengths = lambda text: [(len(text), TOKENS)]  # noqa: E731
        return cut_caption_warnings(training_set, lambda: lengths, TokenLimit(TOKENS, "shorten them"))

    def reference_format(self, layouts, options):
        return TinyReferenceFormat()


class TinyReferenceFormat:
    """Files of another program, named STEM_WxH_tiny.npz and STEM_tiny_te.npz."""

    latents_ending, text_ending, has_sizes = "_tiny.npz", "_tiny_te.npz", False

    def scaled_latents(self, stored):
        return stored

    def conditioning(self, arrays, text):
        return {"lengths": arrays["lengths"]}


@dataclass(frozen=True)
class TinyConditioning:
    lengths: Tensor  # (B, 1): the caption's number of characters

    def to(self, device, *, non_blocking=False):
        return TinyConditioning(self.lengths.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return TinyConditioning(self.lengths.pin_memory())

    def split(self):
        return [TinyConditioning(one[None]) for one in self.lengths]

    def cache_tensors(self):
        return {"lengths": self.lengths[0]}

    @classmethod
    def from_cache(cls, tensors, lengths):
        return cls(tensors["lengths"])

    @classmethod
    def stack(cls, parts):
        return cls(torch.cat([part.lengths for part in parts]))


class TinyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"layer1": nn.Linear(3, 3, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["layer1"](x)


class TinyDenoiser(nn.Module):
    """Names like Anima's, so that networks.lora_anima finds ``blocks.0.mlp.layer1``."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([TinyBlock()])
        self.run_block = run_plainly

    def forward(self, latents: Tensor, shift: Tensor) -> Tensor:
        mixed = self.run_block(0, self.blocks[0], latents.movedim(1, -1)).movedim(-1, 1)  # (B, 3, h, w)
        return mixed + shift[:, :, None, None]


class TinyTrainer(NetworkTrainer):
    def build_denoiser(self):
        return TinyDenoiser().to("meta")

    def fp8_layers(self):
        return r"blocks\.0\.mlp\.layer1"

    def load_denoiser(self, denoiser, *, device, dtype):
        weight = nn.Parameter(torch.eye(3, device=device, dtype=dtype) * 0.5, requires_grad=False)
        denoiser.blocks[0].mlp["layer1"].weight = weight

    def memory_use(self, size_wh, images):
        return MemoryUse(kept=(), carried=(), working=0, encoders=0)

    def load_vae(self, *, device, dtype):
        return nn.AvgPool2d(8)

    def build_text_encoder(self):
        return len

    def text_models(self, text_encoder):
        return []

    def load_text_encoder(self, text_encoder, *, device, dtype):
        """It has no weights."""

    def conditioning_type(self):
        return TinyConditioning

    def encode_images(self, vae, pixels, seeds):
        return vae(pixels)

    def encode_text(self, text_encoder, captions):
        return TinyConditioning(torch.tensor([[float(text_encoder(caption))] for caption in captions]))

    def create_objective(self):
        return FlowObjective(self.options.flow, self.options.noise, self.options.loss)

    def predict(self, denoiser, noisy, batch):
        return denoiser(noisy.latents, batch.text.lengths * 0.001)

    def plan_sample(self, prompt, seed):
        return Picture(prompt=prompt.prompt, negative_prompt="", width=8, height=8, seed=seed, steps=1, scale=1.0, shift=1.0,
                       sampler="euler")  # fmt: skip

    def draw_sample(self, picture, positive, negative):
        noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(picture.seed))
        return self.denoiser(noise, positive.lengths * 0.001)

    def decode_images(self, vae, latents):
        return latents.clamp(-1, 1)

    def describe_model(self):
        return {"ss_base_model_version": "tiny", "modelspec.architecture": "tiny/lora"}
