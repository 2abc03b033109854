"""Stable Diffusion 3 and 3.5 before torch is imported: their files, what their caches depend on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.token_use import TokenCounter, TokenLengths, TokenLimit, TokenUse, cut_caption_warnings, cut_texts
from library.errors import CheckpointError, ProblemList
from library.files.model_parts import model_line
from library.files.model_path import LUMINA, described, recognise_keys
from library.files.weights_source import Part, WeightsSource
from library.nn.blocks import check_block_swap
from library.sd.architecture import hub_token, placed_vae
from library.sd.clip_tokenizer import PIECE
from library.sd.fingerprint import part_fingerprint
from library.sd.latents import coder_recipe, scale_and_shift
from library.sd.source import MODEL_FLAG, VAE_FLAG, find_vae
from library.sd.vae_layout import VaeConfig
from library.sd.vae_layout import find_vae as find_vae_place
from library.sd3.layout import LARGE_35, MEDIUM, MEDIUM_35, PIXELS_PER_LATENT, Sd3Layouts, Sd3TextParts, position_problem
from library.sd3.source import (
    CLIP_G,
    CLIP_L,
    clip_encoder,
    denoiser_part,
    encoder_problems,
    find_checkpoint,
    has_t5,
    t5_encoder,
    width_problems,
)
from library.sd3.tokenizers import T5_TOKENS, T5Tokenizer, load_sd3_tokenizers
from library.text.tokenizer_files import load_t5

if TYPE_CHECKING:
    from library.dataset.items import TrainingSet
    from library.sd3.reference_caches import Sd3ReferenceFormat

CHANNELS = 16  # of latents
SCALE, SHIFT = 1.5305, 0.0609  # latents = (z - shift) * scale, as published
MARKS = 2  # that T5 may add to a text; all other tokens are a byte at least
BYTES_PER_VALUE = 2
# what says how a T5 works, and the value that says nothing
T5_SETTINGS = {
    "t5xxl_device": None, "t5xxl_dtype": None, "t5xxl_max_token_length": T5_TOKENS, "apply_t5_attn_mask": False,
    "t5_dropout_rate": 0.0,
}  # fmt: skip
NAMES = {MEDIUM: "SD3 medium", MEDIUM_35: "SD 3.5 medium", LARGE_35: "SD 3.5 large"}


class Sd3Architecture:
    """See library/training/architecture.py for what each answer means."""

    name: ClassVar[str] = "sd3"
    bucket_step: ClassVar[int] = 16  # pixels: 8 of the VAE times patches of 2
    prompt_settings: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "width", "height", "seed", "sample_steps", "scale", "flow_shift", "sample_sampler=euler",
         "sample_sampler=er_sde"}
    )  # fmt: skip
    knows_all_samplers: ClassVar[bool] = False
    prompts_apart: ClassVar[bool] = False

    # ---------------------------------------------------------------- files

    def read_layouts(self, options: Any, parts: Collection[str] = ("denoiser", "text", "vae")) -> Sd3Layouts:
        problems = ProblemList()
        found: dict[str, Any] = {}
        checkpoint: WeightsSource | None = None
        is_needed = needs_checkpoint(options, parts)
        may_have_t5 = "text" in parts and not options.sd3.t5xxl and options.model.pretrained_model_name_or_path
        if is_needed or may_have_t5:
            with problems.collect():
                checkpoint = find_checkpoint(options.model.pretrained_model_name_or_path)
        if "denoiser" in parts and checkpoint is not None:
            with problems.collect():
                found["denoiser"] = denoiser_part(checkpoint)
                check_block_swap(options, found["denoiser"].config.blocks)
        lacks_checkpoint = is_needed and checkpoint is None  # which is told; what it would hold is not missing besides
        if "text" in parts:
            found["text"] = read_text(options, checkpoint, problems, lacks_checkpoint=lacks_checkpoint)
        if "vae" in parts and (options.model.vae or not lacks_checkpoint):
            with problems.collect():
                found["vae"] = read_vae(options, checkpoint)
        problems.raise_if_any()
        layouts = Sd3Layouts(**found)
        if misfits := list(fit_problems(layouts)):
            raise CheckpointError(*misfits)
        return layouts

    def model_lines(self, layouts: Sd3Layouts, options: Any) -> Iterator[str]:
        denoiser, text, vae = layouts.denoiser, layouts.text, layouts.vae
        assert denoiser is not None and text is not None and vae is not None  # asked for
        encoders: list[tuple[str, Part[Any] | None]] = [("CLIP-L", text.clip_l), ("CLIP-G", text.clip_g), ("T5-XXL", text.t5)]
        parts = [(name, part.source.path) for name, part in (*encoders, ("VAE", vae)) if part is not None]
        without = "" if text.t5 else "; no T5-XXL"
        yield model_line(NAMES[denoiser.config.kind], denoiser.source.path, parts) + without

    def warnings_of(self, layouts: Sd3Layouts, options: Any) -> Iterator[str]:
        if layouts.text is not None and layouts.text.t5 is None:
            yield "there is no T5-XXL, neither with --t5xxl nor in the checkpoint: zeros take its place, as SD3 allows"
            idle = [f"--{name}" for name, usual in T5_SETTINGS.items() if getattr(options.sd3, name, usual) != usual]
            if idle:
                yield f"{', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing: there is no T5"
        denoiser, sd3 = layouts.denoiser, options.sd3
        if denoiser is None or denoiser.config.kind == MEDIUM_35:
            return
        flags = {
            "--pos_emb_random_crop_rate": getattr(sd3, "pos_emb_random_crop_rate", 0),
            "--enable_scaled_pos_embed": getattr(sd3, "enable_scaled_pos_embed", False),
        }
        for flag in (flag for flag, value in flags.items() if value):
            yield f"{flag} is for SD 3.5 medium, which was trained that way; {denoiser.source.path} is another model"

    def size_problems(self, layouts: Sd3Layouts, sizes_wh: Iterable[tuple[int, int]], options: Any) -> Iterator[str]:
        """Pictures that are larger than the model's table of positions; with --enable_scaled_pos_embed there are none."""
        if layouts.denoiser is None or getattr(options.sd3, "enable_scaled_pos_embed", False):
            return
        side = PIXELS_PER_LATENT * layouts.denoiser.config.patch
        for width, height in sorted(set(sizes_wh)):
            if problem := position_problem(layouts.denoiser.config, height // side, width // side):
                yield problem

    # ---------------------------------------------------------------- caches

    def latent_recipe(self, layouts: Sd3Layouts, options: Any) -> LatentRecipe:
        assert layouts.vae is not None  # asked for
        return coder_recipe(self.name, layouts.vae, options, *self.scale_and_shift(layouts))

    def scale_and_shift(self, layouts: Sd3Layouts) -> tuple[float, float]:
        """latents = (z - shift) * scale: as the VAE's own config says, else as published."""
        return scale_and_shift(layouts.vae, published=(SCALE, SHIFT))

    def text_recipe(self, layouts: Sd3Layouts, options: Any) -> TextRecipe:
        text, sd3 = layouts.text, options.sd3
        assert text is not None  # asked for
        settings: dict[str, object] = {"clip_mask": sd3.apply_lg_attn_mask}
        if text.t5 is not None:
            settings |= {"t5_tokens": sd3.t5xxl_max_token_length, "t5_mask": sd3.apply_t5_attn_mask}
            if sd3.t5_dtype is not None:
                settings["t5_weights"] = sd3.t5_dtype
        if options.memory.fp8_base:
            settings["weights"] = "float8"
        parts: list[Part[Any]] = [text.clip_l, text.clip_g, *([] if text.t5 is None else [text.t5])]
        return TextRecipe(
            arch=self.name,
            encoder_fingerprint="-".join(part_fingerprint(part) for part in parts),
            dtype=options.run.weight_dtype,
            settings=settings,
            bytes_per_token=BYTES_PER_VALUE * sum(part.config.width for part in parts),
        )

    def reference_format(self, layouts: Sd3Layouts, options: Any) -> Sd3ReferenceFormat:
        from library.sd3.reference_caches import Sd3ReferenceFormat

        scale, shift = self.scale_and_shift(layouts)
        return Sd3ReferenceFormat(
            layouts.text,
            scale=scale,
            shift=shift,
            t5_tokens=options.sd3.t5xxl_max_token_length,
            masks=(options.sd3.apply_lg_attn_mask, options.sd3.apply_t5_attn_mask),
        )

    # ---------------------------------------------------------------- texts

    def token_counter(self, options: Any) -> TokenCounter:
        return load_sd3_tokenizers(t5_tokens=options.sd3.t5xxl_max_token_length).counts

    def positive_prompt(self, prompt: str, options: Any) -> str:
        return prompt

    def cut_prompts(self, texts: Sequence[str], options: Any) -> Iterator[tuple[str, TokenUse]]:
        """What the CLIPs do not see of a prompt, the T5 does, where there is one."""
        if uses_t5(options):
            tokens = options.sd3.t5xxl_max_token_length
            return cut_texts(texts, lambda: t5_alone(tokens), limit=tokens - MARKS)
        return cut_texts(texts, lambda: load_sd3_tokenizers(t5_tokens=None).counts, limit=PIECE)

    def caption_warnings(self, training_set: TrainingSet, options: Any) -> Iterator[str]:
        """As for prompts."""
        if uses_t5(options):
            tokens = options.sd3.t5xxl_max_token_length
            limit = TokenLimit(tokens - MARKS, "raise --t5xxl_max_token_length or shorten them")
            return cut_caption_warnings(training_set, lambda: t5_lengths(tokens), limit)
        limit = TokenLimit(PIECE, "shorten them, or give a T5 (--t5xxl), which takes more")
        return cut_caption_warnings(training_set, lambda: load_sd3_tokenizers(t5_tokens=None).lengths, limit)


# ---------------------------------------------------------------- files


def needs_checkpoint(options: Any, parts: Collection[str]) -> bool:
    """Whether --pretrained_model_name_or_path must be given: what has no flag of its own is looked for in it."""
    sd3 = options.sd3
    lacks_clip = "text" in parts and not (sd3.clip_l and sd3.clip_g) and bool(options.model.pretrained_model_name_or_path)
    lacks_vae = "vae" in parts and not options.model.vae and bool(options.model.pretrained_model_name_or_path)
    return "denoiser" in parts or lacks_clip or lacks_vae


def read_text(
    options: Any, checkpoint: WeightsSource | None, problems: ProblemList, *, lacks_checkpoint: bool
) -> Sd3TextParts | None:
    """None where something is missing, which ``problems`` then says."""
    sd3, found = options.sd3, {}
    for name, place in (("clip_l", CLIP_L), ("clip_g", CLIP_G)):
        value = getattr(sd3, name)
        if value or not lacks_checkpoint:
            with problems.collect():
                found[name] = clip_encoder(place, value, checkpoint)
    t5 = None
    with problems.collect():
        t5 = t5_encoder(sd3.t5xxl, checkpoint)
        if t5 is None and not lacks_checkpoint and getattr(options, "trains_t5", False):
            raise CheckpointError(
                "--network_args train_t5xxl=true needs a T5, and there is none: give --t5xxl the file of the T5-XXL text encoder"
            )
    if set(found) != {"clip_l", "clip_g"}:
        return None
    text = Sd3TextParts(clip_l=found["clip_l"], clip_g=found["clip_g"], t5=t5)
    problems.add(*encoder_problems(text))
    return text


def read_vae(options: Any, checkpoint: WeightsSource | None) -> Part[VaeConfig]:
    """The VAE that --vae names, else the checkpoint's. Raises CheckpointError."""
    if options.model.vae:
        source = find_vae(options.model.vae, token=hub_token(options))
        if recognise_keys(source.shapes) == LUMINA:
            raise CheckpointError(
                f"{VAE_FLAG} {source.path} is {described(LUMINA)}, whose VAE makes latents that SD3 does not know: give the VAE "
                "of SD3"
            )
        return placed_vae(source, VAE_FLAG, channels=CHANNELS)
    if checkpoint is None:
        raise CheckpointError(f"{VAE_FLAG} is missing: give the file of SD3's VAE, or {MODEL_FLAG} a checkpoint with one")
    if find_vae_place(checkpoint.shapes) is None:
        raise CheckpointError(f"{MODEL_FLAG} {checkpoint.path} has no VAE: name one with {VAE_FLAG}")
    return placed_vae(checkpoint, MODEL_FLAG, channels=CHANNELS)


def fit_problems(layouts: Sd3Layouts) -> Iterator[str]:
    """Parts that are right in themselves but not made for each other."""
    denoiser = layouts.denoiser
    if denoiser is None:
        return
    if denoiser.config.in_channels != CHANNELS:
        given = denoiser.config.in_channels
        yield f"{MODEL_FLAG} {denoiser.source.path} takes latents of {given} channels, the VAE of SD3 makes {CHANNELS}"
    if layouts.text is not None:
        yield from width_problems(denoiser, layouts.text)


# ---------------------------------------------------------------- tokens


def uses_t5(options: Any) -> bool:
    return has_t5(options.sd3.t5xxl, options.model.pretrained_model_name_or_path)


def t5_alone(tokens: int) -> TokenCounter:
    t5 = T5Tokenizer(load_t5(), tokens)
    return lambda text: [t5.count(text)]


def t5_lengths(tokens: int) -> TokenLengths:
    t5 = T5Tokenizer(load_t5(), tokens)
    return lambda text: [(t5.length(text), tokens)]


SD3 = Sd3Architecture()
