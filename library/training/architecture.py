"""What an architecture says about itself before torch is imported: its files, steps and cache recipes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from library.dataset.caches.latent_cache import LatentRecipe
    from library.dataset.caches.reference_caches import ReferenceFormat
    from library.dataset.caches.text_cache import TextRecipe
    from library.dataset.items import TrainingSet
    from library.dataset.token_use import TokenCounter, TokenUse


class Architecture(Protocol):
    """One frozen object per architecture, in ``library/<arch>/architecture.py``; nothing it imports imports torch."""

    name: ClassVar[str]  # in cache file names and messages
    bucket_step: ClassVar[int]  # bucket sides are multiples of it, in pixels
    prompt_settings: ClassVar[frozenset[str]]  # fields of SamplePrompt that its sampler uses, or field=value
    knows_all_samplers: ClassVar[bool]  # so that another name in a prompt is a slip, not one for another model
    prompts_apart: ClassVar[bool]  # whether sample prompts are encoded otherwise than captions

    def read_layouts(self, options: Any, parts: Collection[str] = ("denoiser", "text", "vae")) -> Any:
        """Reads the headers of the model files of ``parts`` and checks them against the architecture.

        Returns the architecture's own layouts object, which the trainer gets back; what was not asked for is None in it, and its
        flags may be missing. Raises CheckpointError with the problems of all files together.
        """

    def model_lines(self, layouts: Any, options: Any) -> Iterable[str]:
        """For the plan: which model ``layouts`` shows, the file of each part, and what is read beside captions."""

    def warnings_of(self, layouts: Any, options: Any) -> Iterable[str]:
        """What is allowed but probably not meant, as the model files show."""

    def size_problems(self, layouts: Any, sizes_wh: Iterable[tuple[int, int]], options: Any) -> Iterable[str]:
        """What stands against pictures of these sizes in pixels, of training and of samples."""

    def latent_recipe(self, layouts: Any, options: Any) -> LatentRecipe:
        """All that cached latents depend on besides the image. ``layouts`` has at least the VAE's."""

    def text_recipe(self, layouts: Any, options: Any) -> TextRecipe:
        """All that cached text conditioning depends on besides the caption. ``layouts`` has at least the text encoder's."""

    def token_counter(self, options: Any) -> TokenCounter:
        """Counts the tokens of texts as this run's tokenizers would make them, without any model file.

        Loading the tokenizers takes most of a second. Raises CheckpointError for a tokenizer that cannot be read.
        """

    def positive_prompt(self, prompt: str, options: Any) -> str:
        """The text that is encoded for the prompt of a picture: itself, or with what the model wants before it. Negative prompts
        are encoded as they are."""

    def cut_prompts(self, texts: Sequence[str], options: Any) -> Iterable[tuple[str, TokenUse]]:
        """The prompts for pictures that are longer than the text encoder takes: ``cut_texts`` of library/dataset/token_use.py."""

    def caption_warnings(self, training_set: TrainingSet, options: Any) -> Iterable[str]:
        """What a text encoder will not make of the captions, though they probably mean it: library/dataset/token_use.py."""

    def reference_format(self, layouts: Any, options: Any) -> ReferenceFormat:
        """What the caches of kohya-ss/sd-scripts for this architecture mean (--import_reference_caches)."""
