"""Lumina Image 2.0 before torch is imported: its files, what its caches depend on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.token_use import TokenCounter, TokenLengths, TokenLimit, TokenUse, cut_caption_warnings, cut_texts
from library.errors import CheckpointError, ProblemList
from library.files.model_parts import model_line
from library.files.weights_source import WeightsSource
from library.lumina.layout import LuminaLayouts
from library.lumina.source import (
    SCALE,
    SHIFT,
    check_system_prompt,
    denoiser_part,
    find_checkpoint,
    fit_problems,
    needs_checkpoint,
    text_part,
    token_limit,
    tokenizer_file,
    tokenizer_without_model,
    vae_part,
)
from library.lumina.system_prompt import with_system_prompt
from library.nn.blocks import check_block_swap
from library.sd.fingerprint import part_fingerprint
from library.sd.latents import coder_recipe, scale_and_shift

if TYPE_CHECKING:
    from library.dataset.items import TrainingSet
    from library.lumina.reference_caches import LuminaReferenceFormat

BYTES_PER_VALUE = 2
ENCODER = "Gemma 2"
SHOWN = 60  # characters of a system prompt in the plan


class LuminaArchitecture:
    """See library/training/architecture.py for what each answer means."""

    name: ClassVar[str] = "lumina"
    bucket_step: ClassVar[int] = 16  # pixels: 8 of the VAE times patches of 2
    prompt_settings: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "width", "height", "seed", "sample_steps", "scale", "flow_shift", "cfg_trunc_ratio",
         "renorm_cfg", "sample_sampler=euler", "sample_sampler=er_sde"}
    )  # fmt: skip
    knows_all_samplers: ClassVar[bool] = False
    prompts_apart: ClassVar[bool] = True  # who draws puts the system prompt before them, or nothing before negative ones

    # ---------------------------------------------------------------- files

    def read_layouts(self, options: Any, parts: Collection[str] = ("denoiser", "text", "vae")) -> LuminaLayouts:
        problems = ProblemList()
        found: dict[str, Any] = {}
        checkpoint: WeightsSource | None = None
        if needing := [part for part in parts if needs_checkpoint(options, part)]:
            with problems.collect():
                checkpoint = find_checkpoint(options)
        # where it is missing, that is told; what it would hold is not missing besides
        readable = [part for part in parts if checkpoint is not None or part not in needing]
        if "denoiser" in readable and checkpoint is not None:
            with problems.collect():
                found["denoiser"] = denoiser_part(checkpoint)
                check_block_swap(options, found["denoiser"].config.blocks)
        if "text" in readable:
            with problems.collect():
                found["text"] = text_part(options, checkpoint)
                found["tokenizer"] = tokenizer_file(options, found["text"].source)
                check_system_prompt(options, found["tokenizer"])
        if "vae" in readable:
            with problems.collect():
                found["vae"] = vae_part(options, checkpoint)
        problems.raise_if_any()
        layouts = LuminaLayouts(**found)
        if misfits := list(fit_problems(layouts)):
            raise CheckpointError(*misfits)
        return layouts

    def model_lines(self, layouts: LuminaLayouts, options: Any) -> Iterator[str]:
        denoiser, text, vae = layouts.denoiser, layouts.text, layouts.vae
        assert denoiser is not None and text is not None and vae is not None  # asked for
        parts = [(ENCODER, text.source.path), ("VAE", vae.source.path)]
        yield model_line("Lumina Image 2.0", denoiser.source.path, parts)
        prompt = " ".join(options.lumina.system_prompt.split())
        yield f"system prompt: {prompt[:SHOWN]}{'...' if len(prompt) > SHOWN else ''}" if prompt else "system prompt: none"

    def warnings_of(self, layouts: LuminaLayouts, options: Any) -> Iterator[str]:
        denoiser, limit = layouts.denoiser, token_limit(options)
        if denoiser is not None and limit >= (known := denoiser.config.axes_lens[0]):
            yield (
                f"--gemma2_max_token_length is {limit}; this model was made for texts of fewer than {known} tokens: what longer "
                "ones do is not known"
            )
        if layouts.vae is not None and (found := self.scale_and_shift(layouts)) != (SCALE, SHIFT):
            yield (
                f"{layouts.vae.source.path} says scaling_factor = {found[0]:g} and shift_factor = {found[1]:g}; the VAE of FLUX, "
                f"which this model goes with, has {SCALE} and {SHIFT}: latents are made as the VAE says; if it is another "
                "model's, name the right one with --ae"
            )

        if options.caches.import_reference_caches and options.caches.text_cached:
            yield (
                "--import_reference_caches: kohya-ss/sd-scripts encoded texts without the soft cap of Gemma 2's attention, so "
                "that what it cached differs somewhat from what is encoded here; drop the flag to encode all texts here"
            )

    # ---------------------------------------------------------------- caches

    def size_problems(self, layouts: Any, sizes_wh: Iterable[tuple[int, int]], options: Any) -> tuple[str, ...]:
        return ()

    def latent_recipe(self, layouts: LuminaLayouts, options: Any) -> LatentRecipe:
        assert layouts.vae is not None  # asked for
        return coder_recipe(self.name, layouts.vae, options, *self.scale_and_shift(layouts))

    def scale_and_shift(self, layouts: LuminaLayouts) -> tuple[float, float]:
        """latents = (z - shift) * scale: as the VAE's own config says, else as published."""
        return scale_and_shift(layouts.vae, published=(SCALE, SHIFT))

    def text_recipe(self, layouts: LuminaLayouts, options: Any) -> TextRecipe:
        assert layouts.text is not None and layouts.tokenizer is not None  # asked for
        settings: dict[str, object] = {"tokens": token_limit(options), "tokenizer": layouts.tokenizer.fingerprint()}
        if prompt := options.lumina.system_prompt:
            settings["system_prompt"] = prompt
        if options.memory.fp8_base:
            settings["weights"] = "float8"
        return TextRecipe(
            arch=self.name,
            encoder_fingerprint=part_fingerprint(layouts.text),
            dtype=options.run.weight_dtype,
            settings=settings,
            bytes_per_token=BYTES_PER_VALUE * layouts.text.config.width,
        )

    def reference_format(self, layouts: LuminaLayouts, options: Any) -> LuminaReferenceFormat:
        from library.lumina.reference_caches import LuminaReferenceFormat

        width = None if layouts.text is None else layouts.text.config.width
        return LuminaReferenceFormat(layouts.tokenizer, width, system_prompt=options.lumina.system_prompt)

    # ---------------------------------------------------------------- texts

    def token_counter(self, options: Any) -> TokenCounter:
        """Of captions: the system prompt before them counts, and ``cut_at`` is a place in the caption alone."""
        prompt = options.lumina.system_prompt
        count = prompt_counter(options)

        def counted(text: str) -> tuple[TokenUse, ...]:
            (use,) = count(with_system_prompt(text, prompt))
            before = len(with_system_prompt(text, prompt)) - len(text)
            cut_at = None if use.cut_at is None else max(use.cut_at - before, 0)
            return (TokenUse(ENCODER, use.tokens, use.limit, cut_at),)

        return counted

    def positive_prompt(self, prompt: str, options: Any) -> str:
        return with_system_prompt(prompt, options.lumina.system_prompt)

    def cut_prompts(self, texts: Sequence[str], options: Any) -> Iterator[tuple[str, TokenUse]]:
        """Of texts with their system prompt."""
        return cut_texts(texts, lambda: prompt_counter(options), limit=token_limit(options) - 1)

    def caption_warnings(self, training_set: TrainingSet, options: Any) -> Iterator[str]:
        prompt = options.lumina.system_prompt
        before = len(with_system_prompt("a", prompt).encode("utf-8", "replace")) - 1
        unmarked = max(token_limit(options) - 1 - before, 0)  # bytes that fit in any case: a token is one at least, <bos> is one
        limit = TokenLimit(unmarked, "raise --gemma2_max_token_length or shorten them")
        return cut_caption_warnings(training_set, lambda: caption_lengths(options), limit)


def prompt_counter(options: Any) -> TokenCounter:
    """Of texts as they are."""
    tokenizer = tokenizer_without_model(options).load()

    def count(text: str) -> tuple[TokenUse, ...]:
        length = tokenizer.length(text)
        return (TokenUse(ENCODER, length.tokens, tokenizer.max_tokens, length.cut_at),)

    return count


def caption_lengths(options: Any) -> TokenLengths:
    prompt = options.lumina.system_prompt
    count = prompt_counter(options)
    return lambda text: [(use.tokens, use.limit) for use in count(with_system_prompt(text, prompt))]


LUMINA = LuminaArchitecture()
