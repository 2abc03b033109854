"""The way of an inference script, the same for every architecture: prompts -> text -> latents -> pictures -> files.

An architecture subclasses ``PictureMaker`` and answers its hooks; order, devices, merging, saving and messages are here.
"""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from library.errors import EXIT_CTRL_C, OptionError, UserError, error_block, user_errors_end_the_script
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.nn.devices import best_device, existing_device
from library.options.declare import groups_of, options_of
from library.sampling.inference_checks import LATENT, CheckedPictures, picture_shape
from library.sampling.picture_plan import FLOW_SETTINGS, Picture, asked_prompt, line_help, pictures_of, plan_warnings
from library.sampling.pictures import dated_stem, free_stem, picture_parameters, save_picture
from library.training.models.precision import WEIGHT_DTYPES

logger = logging.getLogger(__name__)

PICTURE_END, LATENT_END = ".png", "_latent.safetensors"
QUIT, HELP = ("quit", "exit"), ("help", "--help", "-h", "?")  # lines that are no prompts
MEMORY_FLAGS = ("--offload", "--fp8_scaled", "--blocks_to_swap", "--vae_chunk_size 64", "--text_encoder_cpu", "--batch_size 1")
GIB = 2**30
Tick = Callable[[], None]  # one step of the sampler is under way


class PictureMaker(ABC):
    """Draws the pictures of one command. ``device`` and ``dtype`` are those of the denoiser."""

    SIDE_STEP_PX: int
    SAMPLERS: Sequence[str]
    SETTINGS: Collection[str] = FLOW_SETTINGS  # the keys of a prompt that the model draws by

    def __init__(self, run: CheckedPictures):
        self.run, self.options = run, run.options
        compute = self.options.compute
        self.device = best_device() if compute.device is None else existing_device(compute.device, flag="--device")
        self.dtype = WEIGHT_DTYPES[compute.precision or ("no" if self.device.type == "cpu" else "bf16")]
        self.text_dtype = self.dtype
        self.vae_dtype = torch.float32 if self.options.files.no_half_vae else self.dtype
        self.text_device = torch.device("cpu") if compute.text_encoder_cpu else self.device
        self.folder = Path(self.options.output.folder)
        self.texts: dict[Hashable, Any] = {}
        self.loading_s = 0.0
        self.drawn = 0
        self.vae: Any = None

    # ------------------------------------------------------------------ what an architecture answers

    @abstractmethod
    def build(self) -> None:
        """Makes ``text_encoder`` and ``denoiser`` without weights and tries the LoRA files on them. Raises UserError."""

    @property
    @abstractmethod
    def text_model(self) -> nn.Module:
        """The text encoder as a module that can be moved."""

    @property
    @abstractmethod
    def denoiser_model(self) -> nn.Module: ...

    @abstractmethod
    def load_text_encoder(self) -> None:
        """Loads the weights to ``text_device`` and merges the LoRA files' share."""

    def texts_of(self, picture: Picture) -> Sequence[Hashable]:
        """What ``encode`` is given for it: the prompt, and the negative one where it acts."""
        return [picture.prompt, *([picture.negative_prompt] if picture.is_guided else [])]

    @abstractmethod
    def encode(self, text: Any) -> Any:
        """The conditioning of one text, on the CPU."""

    @abstractmethod
    def load_denoiser(self) -> None:
        """Loads the weights to ``device``, merges the LoRA files' share, and arranges memory and attention."""

    @abstractmethod
    def draw(self, pictures: Sequence[Picture], positive: Any, negative: Any | None, tick: Tick) -> Tensor:
        """Latents (B, C, h, w) of pictures that differ in their seeds alone. ``tick`` is called at each step of the sampler."""

    @abstractmethod
    def load_vae(self) -> nn.Module: ...

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(1, C, h, w) -> pixels (1, 3, H, W) in [-1, 1]."""

    def name_of(self, picture: Picture) -> str:
        """The name of its files, without ending; where it is taken, a number is added."""
        return dated_stem(picture.seed, time.time())

    def passes(self, picture: Picture) -> int:
        """How many times ``draw`` ticks for it."""
        return picture.steps

    def problems_of(self, picture: Picture) -> Iterable[str]:
        """Why a picture that is asked for on the console cannot be drawn; the others have been checked."""
        return ()

    @abstractmethod
    def about(self, picture: Picture) -> dict[str, str]:
        """What made the picture, as label -> name, for its metadata."""

    # ------------------------------------------------------------------ the way

    @torch.no_grad()
    def make(self) -> None:
        started = time.perf_counter()
        for warning in self.run.warnings:
            logger.warning("warning: %s", warning)
        if self.run.latents:
            self.decode_files()
        elif self.options.prompts.interactive:
            self.prepare(keep_text_encoder=True)
            self.rest(self.denoiser_model, self.device)
            self.ask()
        else:
            self.draw_given()
        self.tell_end(time.perf_counter() - started)

    def draw_given(self) -> None:
        """All prompts. Every text is encoded first, so that the text encoder is gone when the denoiser comes."""
        plan = [pictures_of(prompt, self.options.prompts, side_step=self.SIDE_STEP_PX) for prompt in self.run.prompts]
        self.prepare(texts=[text for pictures in plan for text in self.texts_of(pictures[0])])
        with self.progress(plan) as tick:
            for pictures in plan:
                self.draw_prompt(pictures, tick)

    def prepare(self, *, texts: Sequence[Hashable] = (), keep_text_encoder: bool = False) -> None:
        """Loads what draws."""
        self.build()
        self.timed(self.load_text_encoder)
        self.encode_texts(texts)
        if keep_text_encoder:
            self.rest(self.text_model, self.text_device)
        else:
            self.text_model.to("meta")
            self.free()
        self.timed(self.load_denoiser)

    def timed(self, load: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        loaded = load()
        self.loading_s += time.perf_counter() - started
        return loaded

    def encode_texts(self, texts: Sequence[Hashable]) -> None:
        for text in texts:
            if text not in self.texts:
                self.texts[text] = self.encode(text)

    def draw_prompt(self, pictures: Sequence[Picture], tick: Tick) -> None:
        """The pictures of one prompt, saved batch by batch; their texts are encoded."""
        size = self.options.prompts.batch_size
        for start in range(0, len(pictures), size):
            batch = pictures[start : start + size]
            latents = self.draw_batch(batch, tick)
            with self.working_vae():
                for picture, latent in zip(batch, latents.split(1), strict=True):
                    self.save(picture, latent)

    def draw_batch(self, batch: Sequence[Picture], tick: Tick) -> Tensor:
        positive, *negative = [self.texts[text].to(self.device) for text in self.texts_of(batch[0])]
        with self.working(self.denoiser_model, self.device), self.autocast():
            return self.draw(batch, positive, negative[0] if negative else None, tick)

    def autocast(self) -> Any:
        """As while training, so that its samples come out again."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    # ------------------------------------------------------------------ prompts from the console

    def ask(self) -> None:
        """Draws a prompt for each line of standard input. A line that is wrong is one message. Ends at the input's end, or at a
        line of QUIT."""
        if sys.stdin.isatty():
            print("one prompt per line, with flags behind it (--w 832 --h 1216 --d 42); help lists them, quit or Ctrl-D ends")
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        while (line := self.next_line()) is not None:
            word = line.strip().lower()
            if word in QUIT:
                return
            if word in HELP:
                print(self.help(), flush=True)
            if not word or word in HELP or line.startswith("#"):
                continue
            try:
                self.draw_line(line)
            except UserError as error:
                print(error_block(error), file=sys.stderr, flush=True)
            except torch.OutOfMemoryError as error:
                print(error_block(out_of_memory(error, self.options)), file=sys.stderr, flush=True)
                self.free()

    def help(self) -> str:
        loras = self.options.loras
        strengths = [] if loras.merged else [strength for _, strength in loras.files]
        return line_help(self.options.prompts, self.SAMPLERS, two_prompts="prompt2" in self.SETTINGS, strengths=strengths)

    def next_line(self) -> str | None:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def draw_line(self, line: str) -> None:
        if "\ufffd" in line:
            raise OptionError(f"the line is no {sys.stdin.encoding} text: {line.strip()!r}; write it again")
        prompt = asked_prompt(line, self.SAMPLERS, self.options.loras)
        for warning in plan_warnings([prompt], self.options.prompts, self.SIDE_STEP_PX, self.SETTINGS):
            logger.warning("warning: %s", warning)
        pictures = pictures_of(prompt, self.options.prompts, side_step=self.SIDE_STEP_PX)
        if problems := list(self.problems_of(pictures[0])):
            raise OptionError(*problems)
        self.texts.clear()
        with self.working(self.text_model, self.text_device):
            self.encode_texts(self.texts_of(pictures[0]))
        with self.progress([pictures]) as tick:
            self.draw_prompt(pictures, tick)

    # ------------------------------------------------------------------ latents and pictures

    def save(self, picture: Picture, latent: Tensor) -> None:
        """latent (1, C, h, w). A picture and its latents have one name."""
        output = self.options.output
        endings = [*([PICTURE_END] if output.wants_pictures else []), *([LATENT_END] if output.wants_latents else [])]
        stem = free_stem(self.folder, self.name_of(picture), endings)
        text = None if output.no_metadata else picture_parameters(picture, self.about(picture))
        if output.wants_latents:
            about = {"parameters": text, "seed": str(picture.seed)} if text else None
            save_safetensors(self.folder / f"{stem}{LATENT_END}", {LATENT: latent[0]}, about)
        if output.wants_pictures:
            save_picture(self.decode(latent)[0], self.folder / f"{stem}{PICTURE_END}", text)
        self.drawn += 1
        logger.info("%s (seed %d)", self.folder / f"{stem}{endings[0]}", picture.seed)

    def decode_files(self) -> None:
        """--latent_path: a picture of each file."""
        with self.working_vae():
            for path in self.run.latents:
                header = read_header(path)
                latent = dict(read_tensors(header, [LATENT]))[LATENT].float()
                shape = picture_shape(header.tensors[LATENT].shape)
                assert shape is not None  # checked
                pixels = self.decode(latent.reshape(1, *shape).to(self.device))
                seed = header.metadata.get("seed", "")  # of a file from anywhere: no seed may lead into another folder
                name = seed if seed.isdecimal() and len(seed) < 20 else path.name.removesuffix(".safetensors")
                stem = free_stem(self.folder, dated_stem(name, time.time()), [PICTURE_END])
                text = None if self.options.output.no_metadata else header.metadata.get("parameters")
                save_picture(pixels[0], self.folder / f"{stem}{PICTURE_END}", text)
                self.drawn += 1
                logger.info("%s (of %s)", self.folder / f"{stem}{PICTURE_END}", path)

    # ------------------------------------------------------------------ memory

    @contextmanager
    def working(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """``model`` on ``device``; with --offload only meanwhile."""
        if self.options.compute.offload:
            model.to(device)
        try:
            yield
        finally:
            self.rest(model, device)

    def rest(self, model: nn.Module, device: torch.device) -> None:
        if self.options.compute.offload and device.type != "cpu":
            model.to("cpu")
            self.free()

    @contextmanager
    def working_vae(self) -> Iterator[None]:
        """The VAE, loaded when the first picture comes; not at all where only latents are saved."""
        if not self.options.output.wants_pictures:
            yield
            return
        if self.vae is None:
            self.vae = self.timed(self.load_vae)
        with self.working(self.vae, self.device):
            yield

    def free(self) -> None:
        """Gives memory that is no longer used back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ messages

    @contextmanager
    def progress(self, plan: Sequence[Sequence[Picture]]) -> Iterator[Tick]:
        from tqdm import tqdm

        size = self.options.prompts.batch_size
        steps = sum(self.passes(pictures[0]) * -(-len(pictures) // size) for pictures in plan)
        with tqdm(desc="drawing", unit="step", total=steps, leave=False) as bar:

            def tick() -> None:
                bar.update()

            yield tick

    def tell_loras(self, model: str, modules: int) -> None:
        if modules:
            files = ", ".join(f"{Path(file).name} x {strength:g}" for file, strength in self.options.loras.files)
            how = "merged %d LoRA modules into" if self.options.loras.merged else "%d LoRA modules act on"
            logger.info(f"{how} the %s (%s)", modules, model, files)

    def strengths_of(self, picture: Picture) -> tuple[float, ...]:
        """Of each LoRA file."""
        own = picture.lora_multipliers
        return (*own, *(strength for _, strength in self.options.loras.files[len(own) :]))

    def about_loras(self, picture: Picture) -> dict[str, str]:
        """The LoRA files and their strengths, as ``about`` tells them."""
        loras = self.options.loras
        files = [Path(file).name for file, _ in loras.files]
        named = [f"{file} ({strength:g})" for file, strength in zip(files, self.strengths_of(picture), strict=True)]
        patterns = {"LoRA modules": loras.include_patterns, "LoRA modules left out": loras.exclude_patterns}
        about = {"LoRA": named, **patterns}
        return {label: "; ".join(parts) for label, parts in about.items() if parts}

    def tell_end(self, seconds: float) -> None:
        """One line: pictures, time, memory."""
        plural = "" if self.drawn == 1 else "s"
        what = "latents of " if not self.options.output.wants_pictures else ""
        parts = [f"{what}{self.drawn} picture{plural} in {seconds:.1f} s ({self.loading_s:.1f} s of it loading models)"]
        logger.info("%s", "; ".join([*parts, *peak_memory(self.device)]))


def peak_memory(device: torch.device) -> Iterator[str]:
    """The most memory that this process has held, in words; nothing where the system does not tell."""
    if device.type == "cuda":
        yield f"peak GPU memory {torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB"
        return
    try:
        import resource
    except ImportError:  # Windows
        return
    unit = 1 if sys.platform == "darwin" else 1024
    yield f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB"


def out_of_memory(error: BaseException, options: Any) -> OptionError:
    """Names the flags that ``options`` has."""
    known = {option.flag for group in groups_of(type(options)).values() for option in options_of(group)}
    flags = ", ".join(flag for flag in MEMORY_FLAGS if flag.split()[0] in known)
    return OptionError(f"the GPU is out of memory ({str(error).splitlines()[0]}). What saves memory: {flags}, smaller pictures")


def run_inference(maker_class: Callable[[CheckedPictures], PictureMaker], run: CheckedPictures) -> None:
    """Draws, and ends the script with one message for what a user can mend; 130 after Ctrl-C."""
    with user_errors_end_the_script():
        try:
            maker_class(run).make()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, run.options) from error
        except KeyboardInterrupt:
            end_by_ctrl_c()


def end_by_ctrl_c() -> NoReturn:
    print("\nstopped; the pictures done so far are saved", file=sys.stderr, flush=True)
    sys.exit(EXIT_CTRL_C)
