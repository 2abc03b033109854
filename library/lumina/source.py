"""Where the models of Lumina Image 2.0 are: in files of their own, or all in one. Needs no torch, except for pickles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.errors import CheckpointError, OptionError
from library.files.model_path import SD3, described, find_model_file, recognise_keys
from library.files.open_weights import open_weights
from library.files.weights_source import Part, WeightsSource
from library.lumina.gemma_layout import GemmaConfig, find_gemma, gemma_part
from library.lumina.layout import LuminaLayouts, NextDitConfig, find_nextdit, nextdit_part
from library.lumina.system_prompt import MARKER
from library.lumina.tokenizer import GemmaTokenizerFile, find_gemma_tokenizer
from library.sd.architecture import hub_token, placed_vae
from library.sd.source import MODEL_FLAG
from library.sd.vae_layout import VaeConfig
from library.sd.vae_layout import find_vae as find_vae_place

GEMMA_FLAG, AE_FLAG = "--gemma2", "--ae"
LATENT_CHANNELS = 16
SCALE, SHIFT = 0.3611, 0.1159  # latents = (z - shift) * scale: FLUX' VAE, as published
TOKENS = 256  # of a text, where --gemma2_max_token_length says nothing
OTHER_WIDTHS = {3584: "Gemma 2 9B", 4608: "Gemma 2 27B"}


def find_checkpoint(options: Any) -> WeightsSource:
    """The file of --pretrained_model_name_or_path. Raises CheckpointError."""
    path = find_model_file(MODEL_FLAG, options.model.pretrained_model_name_or_path, "Lumina Image 2.0 model")
    return open_weights(path, flag=MODEL_FLAG)


def needs_checkpoint(options: Any, part: str) -> bool:
    """Whether a part ("denoiser", "text", "vae") is to be taken from the model's own file."""
    named = {"text": getattr(options.lumina, "gemma2", None), "vae": getattr(options.lumina, "ae", None)}
    return not named.get(part)


def denoiser_part(checkpoint: WeightsSource) -> Part[NextDitConfig]:
    """Raises CheckpointError, also for another model."""
    try:
        return nextdit_part(checkpoint, prefix=find_nextdit(checkpoint.shapes) or "")
    except CheckpointError as error:
        raise CheckpointError(*(f"{MODEL_FLAG} {problem}" for problem in error.problems)) from error


def text_part(options: Any, checkpoint: WeightsSource | None) -> Part[GemmaConfig]:
    """Gemma 2, of --gemma2 or else inside ``checkpoint``. Raises CheckpointError."""
    source = gemma_source(options, checkpoint)
    flag = MODEL_FLAG if source is checkpoint else GEMMA_FLAG
    try:
        return gemma_part(source)
    except CheckpointError as error:
        raise CheckpointError(*(f"{flag} {problem}" for problem in error.problems)) from error


def gemma_source(options: Any, checkpoint: WeightsSource | None) -> WeightsSource:
    value = getattr(options.lumina, "gemma2", None)
    if value:
        path = find_model_file(GEMMA_FLAG, value, "Gemma 2 text encoder", allow_folder=True)
        return open_weights(path, flag=GEMMA_FLAG)
    if checkpoint is None or find_gemma(checkpoint.shapes) is None:
        where = "" if checkpoint is None else f", and {MODEL_FLAG} {checkpoint.path} holds none"
        raise CheckpointError(f"{GEMMA_FLAG} is missing{where}: give the file or folder of the text encoder Gemma 2 2B")
    return checkpoint


def vae_part(options: Any, checkpoint: WeightsSource | None) -> Part[VaeConfig]:
    """The VAE, of --ae or else inside ``checkpoint``. Raises CheckpointError, also for a VAE of another model."""
    value = getattr(options.lumina, "ae", None)
    if value:
        source = open_weights(find_model_file(AE_FLAG, value, "VAE of FLUX", allow_folder=True), flag=AE_FLAG)
        if recognise_keys(source.shapes) == SD3:
            raise CheckpointError(
                f"{AE_FLAG} {source.path} is {described(SD3)}, whose VAE makes latents that Lumina does not know: give the VAE "
                "of FLUX (ae.safetensors)"
            )
        return placed_vae(source, AE_FLAG, channels=LATENT_CHANNELS)
    if checkpoint is None or find_vae_place(checkpoint.shapes) is None:
        where = "" if checkpoint is None else f", and {MODEL_FLAG} {checkpoint.path} holds none"
        raise CheckpointError(f"{AE_FLAG} is missing{where}: give the file of FLUX' VAE (ae.safetensors)")
    return placed_vae(checkpoint, MODEL_FLAG, channels=LATENT_CHANNELS)


# ---------------------------------------------------------------- the tokenizer


def token_limit(options: Any) -> int:
    """Of a text with its system prompt, <bos> included."""
    given = getattr(options.lumina, "gemma2_max_token_length", None)
    return TOKENS if given is None else given


def tokenizer_file(options: Any, weights: WeightsSource | None) -> GemmaTokenizerFile:
    """``weights``: Gemma's, where they are there. Raises CheckpointError."""
    given = getattr(options.lumina, "gemma2_tokenizer", None)
    return find_gemma_tokenizer(given, weights, max_tokens=token_limit(options), token=hub_token(options))


def tokenizer_without_model(options: Any) -> GemmaTokenizerFile:
    """The tokenizer for counting: model files that are missing or damaged are told elsewhere. Raises CheckpointError."""
    weights: WeightsSource | None = None
    values = (getattr(options.lumina, "gemma2", None), getattr(options.model, "pretrained_model_name_or_path", None))
    value = next((value for value in values if value and Path(value).exists()), None)
    if value is not None and not getattr(options.lumina, "gemma2_tokenizer", None):
        weights = open_weights(Path(value), flag=GEMMA_FLAG if value == values[0] else MODEL_FLAG)
    return tokenizer_file(options, weights)


def check_system_prompt(options: Any, file: GemmaTokenizerFile) -> None:
    """Raises OptionError where the system prompt leaves no token for a caption."""
    prompt, limit = getattr(options.lumina, "system_prompt", ""), token_limit(options)
    if len((prompt + MARKER).encode("utf-8", "replace")) < limit:  # a token is one byte at least; one more is <bos>
        return
    if prompt and (tokens := file.load().length(prompt + MARKER).tokens) >= limit:
        raise OptionError(
            f"--system_prompt has {tokens:,} tokens with the marker behind it, and the text encoder takes {limit} of a text, so "
            "nothing of any caption would be left: shorten it, or raise --gemma2_max_token_length"
        )


# ---------------------------------------------------------------- parts together


def fit_problems(layouts: LuminaLayouts) -> Iterator[str]:
    """Parts that are right in themselves but not made for each other."""
    denoiser, text = layouts.denoiser, layouts.text
    if denoiser is None:
        return
    if text is not None and text.config.width != denoiser.config.context_width:
        name = OTHER_WIDTHS.get(text.config.width)
        yield (
            f"{GEMMA_FLAG} {text.source.path} gives states of width {text.config.width}{f' ({name})' if name else ''}, the model "
            f"{denoiser.source.path} takes {denoiser.config.context_width}: give the text encoder that belongs to it (Gemma 2 2B)"
        )
    if denoiser.config.in_channels != LATENT_CHANNELS:
        yield (
            f"{MODEL_FLAG} {denoiser.source.path} takes latents of {denoiser.config.in_channels} channels; the VAE of FLUX, "
            f"which Lumina Image 2.0 goes with, makes {LATENT_CHANNELS}"
        )
