"""Texts that a LoRA file carries about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataOptions:
    """Metadata: what LoRA files say about themselves. Anything not set is left out."""

    metadata_title: str | None = opt(None, "title of the model (not set = --output_name)")
    metadata_author: str | None = opt(None, "who made the model")
    metadata_description: str | None = opt(None, "what the model does")
    metadata_license: str | None = opt(None, "licence of the model")
    metadata_tags: str | None = opt(None, "tags of the model, separated by commas")
    metadata_usage_hint: str | None = opt(None, "how to use the model")
    metadata_thumbnail: str | None = opt(None, "preview picture: an image file or a data: URL", path=True)
    metadata_merged_from: str | None = opt(None, "names of the models that this one was merged from")
    metadata_trigger_phrase: str | None = opt(None, "words in a prompt that call up what was trained")
    metadata_preprocessor: str | None = opt(None, "name of the preprocessor that the model expects")
    metadata_is_negative_embedding: str | None = opt(None, "true if the model is meant for negative prompts")

    def problems(self) -> Iterator[str]:
        return iter(())
