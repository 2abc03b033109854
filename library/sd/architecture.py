"""Stable Diffusion 1.x and 2.x before torch is imported: where the models are, what their caches depend on.

SDXL's answers are these but for a few (library/sdxl/architecture.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.token_use import (
    TokenCounter,
    TokenLengths,
    TokenLimit,
    TokenUse,
    cut_caption_warnings,
    cut_texts,
    weight_warnings,
)
from library.errors import CheckpointError, OptionError, ProblemList
from library.files.model_parts import model_line
from library.files.model_path import SD1
from library.files.weights_source import Part, WeightsSource
from library.sd.clip_layout import ClipConfig, clip_part, clip_skip_problem
from library.sd.clip_layout import Layout as ClipNames
from library.sd.clip_tokenizer import CLIP_L, OPEN_CLIP_H, PIECE, PROMPT_PIECES, TokenizerKind, load_tokenizers
from library.sd.fingerprint import part_fingerprint
from library.sd.latents import coder_recipe
from library.sd.layout import SD_SCALE, SDXL_SCALE, Marks, StableDiffusionLayouts
from library.sd.model_kind import check_kind, prediction_problem, read_marks, unmarked_velocity_warning, zero_snr_warning
from library.sd.source import MODEL_FLAG, TEXT_ENCODERS, UNET, VAE, VAE_FLAG, ModelSource, find_model, find_vae
from library.sd.unet_layout import PREFIX as UNET_PREFIX
from library.sd.unet_layout import unet_part
from library.sd.vae_layout import LATENT_CHANNELS, VaeConfig, vae_part
from library.sd.vae_layout import find_vae as find_vae_place

if TYPE_CHECKING:
    from library.dataset.items import TrainingSet
    from library.sd.reference_caches import SdReferenceFormat

SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
BYTES_PER_VALUE = 2
PUBLISHED_SCALES = {SD_SCALE: "Stable Diffusion 1.x and 2.x", SDXL_SCALE: "SDXL"}
# as library/options/samples.py has them
SAMPLERS = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
            "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a")  # fmt: skip


class StableDiffusionArchitecture:
    """See library/training/architecture.py for what each answer means."""

    name: ClassVar[str] = "sd"
    bucket_step: ClassVar[int] = 64  # pixels: 8 of the VAE times 3 halvings in the U-Net
    prompt_settings: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "width", "height", "seed", "sample_steps", "scale"}
        | {f"sample_sampler={sampler}" for sampler in SAMPLERS}
    )
    knows_all_samplers: ClassVar[bool] = True
    prompts_apart: ClassVar[bool] = True  # the weights in prompts always count
    wanted: ClassVar[str] = SD1  # 2.x too, with --v2
    text_folders: ClassVar[tuple[str, ...]] = TEXT_ENCODERS[:1]  # in a diffusers folder
    encoder_names: ClassVar[tuple[str, ...]] = ("text encoder",)
    latent_scale: ClassVar[float] = SD_SCALE  # where the VAE's config says none

    def read_layouts(self, options: Any, parts: Collection[str] = ("denoiser", "text", "vae")) -> StableDiffusionLayouts:
        problems = ProblemList()
        found: dict[str, Any] = {}
        if "vae" in parts and options.model.vae:
            with problems.collect():
                found["vae"] = named_vae(options.model.vae, hub_token(options))
        if not set(parts) <= {"vae"} or not options.model.vae:
            with problems.collect():
                model = self._model(options, parts)
                self._read_model(model, options, parts, found, problems)
        problems.raise_if_any()
        layouts = StableDiffusionLayouts(**found)
        if misfits := list(self.fit_problems(layouts)):
            raise CheckpointError(*misfits)
        return layouts

    def _model(self, options: Any, parts: Collection[str]) -> ModelSource:
        """The model, of the right kind."""
        folders = [*([UNET] if "denoiser" in parts else []), *(self.text_folders if "text" in parts else [])]
        folders += [VAE] if "vae" in parts and not options.model.vae else []
        model = find_model(options.model.pretrained_model_name_or_path, parts=folders, token=hub_token(options))
        if model.file is not None or "denoiser" in parts or model.has_part(UNET):
            check_kind(model, wanted=self.wanted, v2=options.clip.v2)
        return model

    def _read_model(  # noqa: PLR0913  # one step of read_layouts
        self, model: ModelSource, options: Any, parts: Collection[str], found: dict[str, Any], problems: ProblemList
    ) -> None:
        if "denoiser" in parts:
            with problems.collect():
                found["denoiser"] = denoiser_part(model)
            with problems.collect():
                found["marks"] = checked_marks(model, options)
        if "text" in parts:
            with problems.collect():
                found["text"] = self.text_parts(model, options)
                self.check_clip_skip(found["text"], options)
        if "vae" in parts and not options.model.vae:
            with problems.collect():
                found["vae"] = bundled_vae(model)

    def text_parts(self, model: ModelSource, options: Any) -> tuple[Part[ClipConfig], ...]:
        """SD 2 is used without the last layer of its text encoder; folders do not have that layer."""
        if model.file is None:
            return (clip_part(model.part(TEXT_ENCODERS[0]), prefix="", layout="hf"),)
        if options.clip.v2:
            return (file_text_part(model.file, SD2_TEXT, "open_clip", keep_layers=-1),)
        return (file_text_part(model.file, SD1_TEXT, "hf"),)

    def check_clip_skip(self, parts: tuple[Part[ClipConfig], ...], options: Any) -> None:
        """Raises OptionError where a text encoder has too few layers for --clip_skip."""
        if problem := clip_skip_problem(options.clip.clip_skip, min(part.config.layers for part in parts)):
            raise OptionError(problem)

    def fit_problems(self, layouts: StableDiffusionLayouts) -> Iterator[str]:
        """Parts that are right in themselves but not made for each other."""
        if layouts.denoiser is None or not layouts.text:
            return
        given, wanted = sum(part.config.width for part in layouts.text), layouts.denoiser.config.context_width
        if given != wanted:
            yield (
                f"{MODEL_FLAG} {layouts.denoiser.source.path}: its U-Net takes text of width {wanted}, its text encoder gives "
                f"{given}: they belong to different models"
            )

    def model_lines(self, layouts: StableDiffusionLayouts, options: Any) -> Iterator[str]:
        assert layouts.vae is not None  # asked for
        model = Path(options.model.pretrained_model_name_or_path)
        parts = [(name, model) for name in self.encoder_names]
        parts.append(("VAE", layouts.vae.source.path if options.model.vae else model))
        yield model_line(self.model_name(options), model, parts)

    def model_name(self, options: Any) -> str:
        """As people call what ``read_layouts`` let through."""
        return f"Stable Diffusion {2 if options.clip.v2 else 1}.x"

    def warnings_of(self, layouts: StableDiffusionLayouts, options: Any) -> Iterator[str]:
        yield from self._scale_warning(layouts.vae)
        marks, ddpm = layouts.marks, getattr(options, "ddpm", None)
        if ddpm is None:
            return
        name = options.model.pretrained_model_name_or_path
        notes = [zero_snr_warning(marks, zero_terminal_snr=ddpm.zero_terminal_snr)]
        if layouts.denoiser is not None:  # else its marks were not read
            notes.append(unmarked_velocity_warning(marks, velocity=ddpm.v_parameterization, v2=options.clip.v2))
        if not marks.is_certain:
            notes.append(prediction_problem(marks, velocity=ddpm.v_parameterization))
        yield from (f"{MODEL_FLAG} {name} {note}" for note in notes if note)

    def _scale_warning(self, vae: Part[VaeConfig] | None) -> Iterator[str]:
        scale = None if vae is None else vae.config.scale
        if vae is not None and scale in PUBLISHED_SCALES and scale != self.latent_scale:
            yield (
                f"{vae.source.path} says scaling_factor = {scale:g}, as VAEs of {PUBLISHED_SCALES[scale]} do; this model has "
                f"{self.latent_scale:g}: latents are scaled by what the VAE says; if it is another model's, name the right one "
                f"with {VAE_FLAG}"
            )

    def size_problems(self, layouts: Any, sizes_wh: Iterable[tuple[int, int]], options: Any) -> tuple[str, ...]:
        return ()

    def latent_recipe(self, layouts: StableDiffusionLayouts, options: Any) -> LatentRecipe:
        assert layouts.vae is not None  # asked for
        return coder_recipe(self.name, layouts.vae, options, self.scale_of(layouts))

    def scale_of(self, layouts: StableDiffusionLayouts) -> float:
        """What raw latents are multiplied by."""
        assert layouts.vae is not None  # asked for
        return layouts.vae.config.scale or self.latent_scale

    def text_recipe(self, layouts: StableDiffusionLayouts, options: Any) -> TextRecipe:
        clip = options.clip
        settings: dict[str, object] = {"tokens": clip.max_token_length or PIECE, **self.text_settings(options)}
        if clip.v2:  # a folder's encoder alone does not tell; it decides the tokenizer
            settings["v2"] = True
        if clip.weighted_captions:
            settings["weighted"] = True
        if options.memory.fp8_base:
            settings["weights"] = "float8"
        return TextRecipe(
            arch=self.name,
            encoder_fingerprint="-".join(part_fingerprint(part) for part in layouts.text),
            dtype=options.run.weight_dtype,
            settings=settings,
            bytes_per_token=BYTES_PER_VALUE * sum(part.config.width for part in layouts.text),
        )

    def text_settings(self, options: Any) -> dict[str, object]:
        """The last layer is the first counted from the end."""
        return {"clip_skip": options.clip.clip_skip or 1}

    def tokenizer_kinds(self, options: Any) -> tuple[TokenizerKind, ...]:
        return (OPEN_CLIP_H if options.clip.v2 else CLIP_L,)

    def token_counter(self, options: Any) -> TokenCounter:
        tokens = options.clip.max_token_length or PIECE
        return token_counter(self.tokenizer_kinds(options), tokens=tokens, weighted=options.clip.weighted_captions)

    def positive_prompt(self, prompt: str, options: Any) -> str:
        return prompt

    def cut_prompts(self, texts: Sequence[str], options: Any) -> Iterator[tuple[str, TokenUse]]:
        kinds, tokens = self.tokenizer_kinds(options), self.prompt_tokens(options)
        return cut_texts(texts, lambda: token_counter(kinds, tokens=tokens, weighted=True), limit=tokens)

    def caption_warnings(self, training_set: TrainingSet, options: Any) -> Iterator[str]:
        tokens, weighted = options.clip.max_token_length or PIECE, options.clip.weighted_captions
        longer = f"raise --max_token_length ({PROMPT_PIECES * PIECE} at most) or shorten them"
        limit = TokenLimit(tokens, "shorten them" if tokens >= PROMPT_PIECES * PIECE else longer)
        kinds = self.tokenizer_kinds(options)
        yield from cut_caption_warnings(training_set, lambda: token_lengths(kinds, tokens=tokens, weighted=weighted), limit)
        if not weighted:
            yield from weight_warnings(training_set)

    def prompt_tokens(self, options: Any) -> int:
        """Of a prompt that count, whatever the captions' length is."""
        return PROMPT_PIECES * PIECE

    def reference_format(self, layouts: StableDiffusionLayouts, options: Any) -> SdReferenceFormat:
        from library.sd.reference_caches import SdReferenceFormat

        return SdReferenceFormat(self.name, self.latent_scale if layouts.vae is None else self.scale_of(layouts))


def token_counter(kinds: Sequence[TokenizerKind], *, tokens: int, weighted: bool) -> TokenCounter:
    tokenizers = load_tokenizers(*kinds)
    return lambda text: tuple(tokenizer.count(text, tokens=tokens, weighted=weighted) for tokenizer in tokenizers)


def token_lengths(kinds: Sequence[TokenizerKind], *, tokens: int, weighted: bool) -> TokenLengths:
    """As ``token_counter``, but without the search for the place of the cut, which takes a hundred times as long."""
    tokenizers = load_tokenizers(*kinds)
    return lambda text: [(len(tokenizer.weighted_ids(text, weighted=weighted)[0]), tokens) for tokenizer in tokenizers]


def hub_token(options: Any) -> str | None:
    """--huggingface_token, in scripts that have it."""
    return getattr(getattr(options, "hub", None), "huggingface_token", None) or None


def denoiser_part(model: ModelSource) -> Part[Any]:
    """The U-Net of a model that ``check_kind`` let through; a file may hold nothing else, without a prefix."""
    if model.file is None:
        return unet_part(model.part(UNET), prefix="", layout="diffusers")
    if not any(name.startswith(UNET_PREFIX) for name in model.file.shapes):
        raise CheckpointError(
            f"{MODEL_FLAG} {model.name} is a U-Net alone: give the whole checkpoint, with text encoders and VAE"
        )
    return unet_part(model.file, prefix=UNET_PREFIX, layout="original")


def file_text_part(source: WeightsSource, prefix: str, layout: ClipNames, *, keep_layers: int | None = None) -> Part[ClipConfig]:
    if not any(name.startswith(prefix) for name in source.shapes):
        raise CheckpointError(
            f"{MODEL_FLAG} {source.path} lacks a text encoder ({prefix}*): give the whole checkpoint, with text encoders"
        )
    return clip_part(source, prefix=prefix, layout=layout, keep_layers=keep_layers)


def bundled_vae(model: ModelSource) -> Part[VaeConfig]:
    """The VAE of the model itself. Raises CheckpointError where it has none."""
    place = find_vae_place(model.file.shapes) if model.file is not None else None
    if (model.file is not None and place is None) or (model.folder is not None and not model.has_part(VAE)):
        raise CheckpointError(f"{MODEL_FLAG} {model.name} has no VAE: name one with {VAE_FLAG}")
    source = model.file if model.file is not None else model.part(VAE)
    return placed_vae(source, MODEL_FLAG)


def named_vae(value: str, token: str | None) -> Part[VaeConfig]:
    return placed_vae(find_vae(value, token=token), VAE_FLAG)


def placed_vae(source: WeightsSource, flag: str, *, channels: int = LATENT_CHANNELS) -> Part[VaeConfig]:
    """The VAE in a file of any layout. Raises CheckpointError where there is none, or another one."""
    place = find_vae_place(source.shapes)
    try:
        if place is None:  # says what the file is instead
            return vae_part(source, prefix="", layout="original", channels=channels)
        return vae_part(source, prefix=place.prefix, layout=place.layout, channels=channels)
    except CheckpointError as error:
        raise CheckpointError(*(f"{flag} {problem}" for problem in error.problems)) from error


def checked_marks(model: ModelSource, options: Any) -> Marks:
    """What the model says about itself. Raises CheckpointError where the flags say otherwise."""
    marks, ddpm = read_marks(model), getattr(options, "ddpm", None)
    problem = prediction_problem(marks, velocity=ddpm.v_parameterization) if ddpm is not None and marks.is_certain else None
    if problem:
        raise CheckpointError(f"{MODEL_FLAG} {model.name} {problem}")
    return marks


STABLE_DIFFUSION = StableDiffusionArchitecture()
