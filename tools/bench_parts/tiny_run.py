"""A run on the tiny model: checkpoints, pictures and flags in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASET = """[general]
resolution = {resolution}
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 1024
bucket_reso_steps = 64
caption_extension = ".txt"

[[datasets]]
batch_size = {batch_size}

[[datasets.subsets]]
image_dir = "{images}"
"""
CACHED_ON_DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


SD_KINDS = ("sd1", "sdxl")


@dataclass(frozen=True, slots=True)
class TinyRun:
    """``flags``: a complete command line but for the number of steps and the caches. ``kind``: anima, sd1, sdxl, sd3 or
    lumina."""

    folder: Path
    pictures: int
    flags: tuple[str, ...]
    kind: str = "anima"

    def checked(self, *flags: str) -> Any:
        """The checked run of these and further flags, as the training script makes it."""
        from library.options.command_line import read_options
        from library.training.preflight import check_run

        options, architecture = option_set_and_architecture(self.kind)
        return check_run(read_options(options, [*self.flags, *flags]), architecture)


def option_set_and_architecture(kind: str) -> tuple[Any, Any]:
    from library.anima.architecture import ANIMA
    from library.lumina.architecture import LUMINA
    from library.options.anima import AnimaTrainOptions
    from library.options.lumina import LuminaTrainOptions
    from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
    from library.options.sd3 import Sd3TrainOptions
    from library.sd.architecture import STABLE_DIFFUSION
    from library.sd3.architecture import SD3
    from library.sdxl.architecture import SDXL

    known = {
        "anima": (AnimaTrainOptions, ANIMA),
        "sd1": (StableDiffusionTrainOptions, STABLE_DIFFUSION),
        "sdxl": (SdxlTrainOptions, SDXL),
        "sd3": (Sd3TrainOptions, SD3),
        "lumina": (LuminaTrainOptions, LUMINA),
    }
    return known[kind]


def make_tiny_run(  # noqa: PLR0913  # what a dataset has
    folder: Path, *, kind: str = "anima", pictures: int = 12, resolution: int = 256, batch_size: int = 1, scale: float = 0.5
) -> TinyRun:
    """Writes the tiny model, ``pictures`` pictures of mixed sizes with captions, and a dataset file."""
    from tools.make_sample_pictures import make_pictures

    make_pictures(folder / "pictures", pictures, scale=scale)
    images = (folder / "pictures").as_posix()
    dataset = folder / "dataset.toml"
    dataset.write_text(DATASET.format(resolution=resolution, batch_size=batch_size, images=images), encoding="utf-8")
    flags = (
        *model_flags(folder / "models", kind),
        f"--dataset_config={dataset}",
        f"--output_dir={folder / 'out'}",
        "--output_name=bench",
        "--network_dim=8",
        "--learning_rate=1e-4",
        "--seed=1",
        "--console_log_simple",
    )
    return TinyRun(folder, pictures, flags, kind)


def model_flags(folder: Path, kind: str) -> list[str]:
    """Those of a tiny model that is made in ``folder``, and of the network for it."""
    from tools.make_tiny_models import make_anima
    from tools.tiny_lumina import make_lumina
    from tools.tiny_sd import make_sd
    from tools.tiny_sd3 import make_sd3

    if kind == "sd3":
        whole = make_sd3(folder, files=["whole"])["whole"]
        denoiser_alone = "--network_train_unet_only"  # else the CLIPs are trained although what they give is cached
        return [f"--pretrained_model_name_or_path={whole}", "--network_module=networks.lora_sd3", denoiser_alone]
    if kind == "lumina":
        whole = make_lumina(folder, files=["whole"])["whole"]
        return [f"--pretrained_model_name_or_path={whole}", "--network_module=networks.lora_lumina"]
    if kind in SD_KINDS:
        return [f"--pretrained_model_name_or_path={make_sd(folder, kind)['file']}", "--network_module=networks.lora"]
    models = make_anima(folder)
    paths = {"pretrained_model_name_or_path": models["dit"], "qwen3": models["qwen3"], "vae": models["vae"]}
    return [*(f"--{name}={path}" for name, path in paths.items()), "--network_module=networks.lora_anima"]
