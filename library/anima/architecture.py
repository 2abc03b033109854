"""Anima before torch is imported: its files, its bucket step, what its caches depend on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from library.anima.layout import CONTEXT_ROWS, DenoiserLayout, read_denoiser_layout
from library.anima.text_layout import TextEncoderLayout, read_text_encoder_layout
from library.anima.tokenizers import TokenizerFiles, find_tokenizers
from library.anima.vae_layout import VaeLayout, read_vae_layout
from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.token_use import TokenCounter, TokenLengths, TokenLimit, TokenUse, cut_caption_warnings, cut_texts
from library.errors import CheckpointError, ProblemList
from library.files.model_parts import model_line
from library.files.safetensors_file import file_fingerprint
from library.nn.blocks import check_block_swap
from library.randomness import derive_seed

if TYPE_CHECKING:
    from library.anima.reference_caches import AnimaReferenceFormat
    from library.dataset.items import TrainingSet


@dataclass(frozen=True, slots=True)
class AnimaLayouts:
    """The checked files of a run; None for those that were not asked for."""

    denoiser: DenoiserLayout | None = None
    text: TextEncoderLayout | None = None
    tokenizers: TokenizerFiles | None = None
    vae: VaeLayout | None = None


class AnimaArchitecture:
    """See library/training/architecture.py for what each answer means."""

    name: ClassVar[str] = "anima"
    bucket_step: ClassVar[int] = 16  # pixels: 8 of the VAE times patches of 2
    prompt_settings: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "width", "height", "seed", "sample_steps", "scale", "flow_shift",
         "sample_sampler=euler", "sample_sampler=er_sde"}
    )  # fmt: skip

    knows_all_samplers: ClassVar[bool] = False
    prompts_apart: ClassVar[bool] = False

    def read_layouts(self, options: Any, parts: Collection[str] = ("denoiser", "text", "vae")) -> AnimaLayouts:
        model, anima = options.model, options.anima
        problems = ProblemList()
        found: dict[str, Any] = {}
        if "denoiser" in parts:
            with problems.collect():
                found["denoiser"] = read_denoiser_layout(model.pretrained_model_name_or_path, anima.llm_adapter_path)
                check_block_swap(options, found["denoiser"].config.blocks)
        if "text" in parts:
            with problems.collect():
                found["text"] = read_text_encoder_layout(anima.qwen3)
            with problems.collect():
                found["tokenizers"] = tokenizer_files(options)
        if "vae" in parts:
            with problems.collect():
                found["vae"] = read_vae_layout(model.vae)
        problems.raise_if_any()
        layouts = AnimaLayouts(**found)
        if misfits := list(fit_problems(layouts)):
            raise CheckpointError(*misfits)
        return layouts

    def model_lines(self, layouts: AnimaLayouts, options: Any) -> Iterator[str]:
        denoiser, text, vae = layouts.denoiser, layouts.text, layouts.vae
        assert denoiser is not None and text is not None and vae is not None  # asked for
        file, adapter = denoiser.files[0], denoiser.files[-1]
        yield model_line("Anima", file, [("LLM adapter", adapter), ("Qwen3", text.path), ("VAE", vae.path)])

    def warnings_of(self, layouts: AnimaLayouts, options: Any) -> tuple[str, ...]:
        return ()

    def size_problems(self, layouts: Any, sizes_wh: Iterable[tuple[int, int]], options: Any) -> tuple[str, ...]:
        return ()

    def latent_recipe(self, layouts: AnimaLayouts, options: Any) -> LatentRecipe:
        dtype = "float32" if options.model.no_half_vae else options.run.weight_dtype
        vae = layouts.vae
        assert vae is not None  # asked for
        fingerprint = file_fingerprint(vae.path)
        if vae.config is not None:  # a config.json beside the file may set the scale of the latents
            fingerprint += f"-{derive_seed(*map(repr, (*vae.config.latents_mean, *vae.config.latents_std))):x}"
        return LatentRecipe(arch=self.name, vae_fingerprint=fingerprint, dtype=dtype)

    def text_recipe(self, layouts: AnimaLayouts, options: Any) -> TextRecipe:
        anima = options.anima
        assert layouts.text is not None and layouts.tokenizers is not None  # asked for
        tokenizer = file_fingerprint(layouts.tokenizers.t5_dir) if anima.t5_tokenizer_path else "bundled"
        lengths = {"qwen3_tokens": anima.qwen3_max_token_length, "t5_tokens": anima.t5_max_token_length}
        return TextRecipe(
            arch=self.name,
            encoder_fingerprint=file_fingerprint(layouts.text.path),
            dtype=options.run.weight_dtype,
            settings={**lengths, "t5_tokenizer": tokenizer, **({"weights": "float8"} if options.memory.fp8_base else {})},
        )

    def token_counter(self, options: Any) -> TokenCounter:
        tokenizers = tokenizer_files(options).load()

        def count(text: str) -> tuple[TokenUse, TokenUse]:
            qwen, t5 = tokenizers.lengths(text)
            return (
                TokenUse("Qwen3", qwen.tokens, tokenizers.qwen_max, qwen.cut_at),
                TokenUse("T5", t5.tokens, tokenizers.t5_max, t5.cut_at),
            )

        return count

    def positive_prompt(self, prompt: str, options: Any) -> str:
        return prompt

    def cut_prompts(self, texts: Sequence[str], options: Any) -> Iterator[tuple[str, TokenUse]]:
        return cut_texts(texts, lambda: self.token_counter(options), limit=unmarked_tokens(options))

    def caption_warnings(self, training_set: TrainingSet, options: Any) -> Iterator[str]:
        can_raise = min(options.anima.qwen3_max_token_length, options.anima.t5_max_token_length) < CONTEXT_ROWS
        cure = "raise --qwen3_max_token_length and --t5_max_token_length, or shorten them" if can_raise else "shorten them"
        limit = TokenLimit(unmarked_tokens(options), cure)
        return cut_caption_warnings(training_set, lambda: self._token_lengths(options), limit)

    def _token_lengths(self, options: Any) -> TokenLengths:
        count = self.token_counter(options)
        return lambda text: [(use.tokens, use.limit) for use in count(text)]

    def reference_format(self, layouts: AnimaLayouts, options: Any) -> AnimaReferenceFormat:
        from library.anima.reference_caches import AnimaReferenceFormat

        return AnimaReferenceFormat(layouts.tokenizers, layouts.text.config.width if layouts.text is not None else None)


def tokenizer_files(options: Any) -> TokenizerFiles:
    anima = options.anima
    return find_tokenizers(
        anima.qwen3, anima.t5_tokenizer_path, qwen_max=anima.qwen3_max_token_length, t5_max=anima.t5_max_token_length
    )


def unmarked_tokens(options: Any) -> int:
    """Of a text of no more bytes both encoders see the whole: T5 adds a mark at each end."""
    return min(options.anima.qwen3_max_token_length, options.anima.t5_max_token_length) - 2


def fit_problems(layouts: AnimaLayouts) -> Iterator[str]:
    """Parts that are right in themselves but not made for each other."""
    denoiser, text, vae = layouts.denoiser, layouts.text, layouts.vae
    if denoiser is None:
        return
    adapter = denoiser.config.adapter
    if adapter is not None and text is not None and adapter.source_width != text.config.width:
        yield (
            f"--qwen3 {text.path} gives states of width {text.config.width}, the LLM adapter wants {adapter.source_width}: "
            "give the Qwen3-0.6B that belongs to this Anima model"
        )
    if vae is not None and vae.config is not None and vae.config.latent_channels != denoiser.config.in_channels:
        yield (
            f"--vae {vae.path} makes latents of {vae.config.latent_channels} channels, the model wants "
            f"{denoiser.config.in_channels}: give the Qwen-Image VAE"
        )


ANIMA = AnimaArchitecture()
