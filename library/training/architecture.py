"""What an architecture says about itself before torch is imported: its files, steps and cache recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from library.dataset.latent_cache import LatentRecipe
    from library.dataset.text_cache import TextRecipe
    from library.dataset.token_use import TokenCounter


class Architecture(Protocol):
    """One frozen object per architecture, in ``library/<arch>/architecture.py``; nothing it imports imports torch."""

    name: ClassVar[str]  # in cache file names and messages
    bucket_step: ClassVar[int]  # bucket sides are multiples of it, in pixels
    prompt_settings: ClassVar[frozenset[str]]  # fields of SamplePrompt that its sampler uses

    def read_layouts(self, options: Any) -> Any:
        """Reads every model file's header and checks it against the architecture.

        Returns the architecture's own layouts object, which the trainer gets back. Raises CheckpointError with the problems
        of all files together.
        """

    def latent_recipe(self, layouts: Any, options: Any) -> LatentRecipe:
        """All that cached latents depend on besides the image."""

    def text_recipe(self, layouts: Any, options: Any) -> TextRecipe:
        """All that cached text conditioning depends on besides the caption."""

    def token_counter(self, options: Any) -> TokenCounter:
        """Counts the tokens of texts as this run's tokenizers would make them, without any model file.

        Loading the tokenizers takes most of a second. Raises CheckpointError for a tokenizer that cannot be read.
        """
