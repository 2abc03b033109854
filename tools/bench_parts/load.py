"""Peak memory while a checkpoint is loaded, beyond the size of its file and what the imports take."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench_parts.figures import Figure
from tools.bench_parts.processes import checked, run_measured
from tools.tiny_lumina import make_lumina
from tools.tiny_sd import make_sd
from tools.tiny_sd3 import make_sd3

MIB = 2**20
OVER_MIB = 300.0  # target
# Both about 400 MB in bfloat16, with the published widths and vocabularies but few blocks.
DIT_SIZES = {"width": 1024, "blocks": 4, "heads": 8, "mlp_hidden": 4096}
QWEN3_SIZES = {"blocks": 3}

Shapes = Mapping[str, tuple[int, ...]]


def measure(
    repeats: int,
    *,
    dit_sizes: Mapping[str, int] = DIT_SIZES,
    qwen3_sizes: Mapping[str, int] = QWEN3_SIZES,
    sdxl_size: str = "bench",
    sd3_size: str = "bench",
    lumina_size: str = "bench",
) -> list[Figure]:
    from library.anima import layout, text_layout

    shapes: dict[str, Shapes] = {
        "dit": layout.expected_shapes(layout.DenoiserConfig(**dit_sizes)),  # type: ignore[arg-type]  # sizes only
        "qwen3": text_layout.expected_shapes(text_layout.TextEncoderConfig(**qwen3_sizes)),
    }
    turns = max(repeats // 2, 1)  # memory hardly varies
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.safetensors" for kind in shapes}
        for kind, path in paths.items():
            write_bf16(path, shapes[kind])
        paths["sd3"] = make_sd3(Path(folder), size=sd3_size, dtype="bf16", files=["whole"])["whole"]
        paths["lumina"] = make_lumina(Path(folder), size=lumina_size, dtype="bf16", files=["whole"])["whole"]
        paths["sdxl"] = make_sd(Path(folder), "sdxl", size=sdxl_size, dtype="bf16")["file"]
        return [peak_of(kind, path, turns) for kind, path in paths.items()]


def peak_of(kind: str, path: Path, turns: int) -> Figure:
    size = path.stat().st_size / MIB
    over = [loading_peak(kind, path) - size for _ in range(turns)]
    how = f"a bf16 file of {size:.0f} MiB, loaded as bf16; {min(over):.0f} to {max(over):.0f} MiB in {turns} processes"
    return Figure(name=f"load: {kind}, peak over file and imports", value=median(over), unit="MiB", at_most=OVER_MIB, how=how)


def loading_peak(kind: str, path: Path) -> float:
    """MiB that a fresh process needs at most while it loads ``path``, without what its imports need."""
    usage = checked(run_measured([sys.executable, "-m", "tools.bench_parts.load", kind, str(path)]))
    return float(usage.output.strip().splitlines()[-1])


def write_bf16(path: Path, shapes: Shapes) -> None:
    """A safetensors file of zeros, written piece by piece: making it must not need memory itself."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode("ascii")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for done in range(0, end, MIB):
            file.write(bytes(min(MIB, end - done)))


# ---------------------------------------------------------------- in the measured process


def main(kind: str, path: Path) -> None:
    """Prints the MiB."""
    from tools.bench_parts.processes import peak_resident_bytes, resident_bytes

    load = LOADERS[kind]()
    baseline = resident_bytes()
    model = load(path)
    print((peak_resident_bytes() - baseline) / MIB)
    del model


def dit_loader() -> Any:
    import torch

    from library.anima.checkpoint import build_denoiser, load_denoiser
    from library.anima.layout import read_denoiser_layout

    def load(path: Path) -> Any:
        layout = read_denoiser_layout(path)
        denoiser = build_denoiser(layout.config)
        load_denoiser(denoiser, layout, device="cpu", dtype=torch.bfloat16)
        return denoiser

    return load


def qwen3_loader() -> Any:
    import torch

    from library.anima.text import build_qwen3, build_text_encoder, load_text_encoder
    from library.anima.text_layout import TextEncoderConfig, read_text_encoder_layout
    from library.anima.tokenizers import AnimaTokenizers

    # what is imported late
    build_qwen3(TextEncoderConfig(width=64, blocks=1, heads=2, key_heads=1, head_dim=32, mlp_hidden=64, vocabulary=8))

    def load(path: Path) -> Any:
        layout = read_text_encoder_layout(path)
        encoder = build_text_encoder(layout, AnimaTokenizers.bundled())
        load_text_encoder(encoder, layout, device="cpu", dtype=torch.bfloat16)
        return encoder

    return load


def sdxl_loader() -> Any:
    """All of a single file: U-Net, both text encoders, VAE."""
    import torch

    import library.sd.unet
    import library.sd.vae  # noqa: F401  # with what is imported late
    from library.options.sd import SdxlTrainOptions
    from library.sd.denoiser import build_unet, load_unet
    from library.sd.text import load_text_encoder
    from library.sd.vae import load_vae
    from library.sdxl.architecture import SDXL
    from library.sdxl.text import build_text_encoder

    def load(path: Path) -> Any:
        options = SdxlTrainOptions()
        layouts = SDXL.read_layouts(replace(options, model=replace(options.model, pretrained_model_name_or_path=str(path))))
        assert layouts.denoiser is not None and layouts.vae is not None
        unet = build_unet(layouts.denoiser.config)
        load_unet(unet, layouts.denoiser, device="cpu", dtype=torch.bfloat16)
        text = build_text_encoder(layouts.text)
        load_text_encoder(text, layouts.text, device="cpu", dtype=torch.bfloat16)
        return unet, text, load_vae(layouts.vae, device="cpu", dtype=torch.bfloat16, scale=SDXL.scale_of(layouts))

    return load


def sd3_loader() -> Any:
    """All of a single file: MMDiT, CLIP-L, CLIP-G, T5, VAE."""
    import torch

    import library.sd.vae  # with what is imported late
    from library.options.sd3 import Sd3TrainOptions
    from library.sd3.architecture import SD3
    from library.sd3.checkpoint import build_denoiser, load_denoiser
    from library.sd3.text import build_text_encoder, load_text_encoder

    def load(path: Path) -> Any:
        options = Sd3TrainOptions()
        layouts = SD3.read_layouts(replace(options, model=replace(options.model, pretrained_model_name_or_path=str(path))))
        assert layouts.denoiser is not None and layouts.text is not None and layouts.vae is not None
        denoiser = build_denoiser(layouts.denoiser.config)
        load_denoiser(denoiser, layouts.denoiser, device="cpu", dtype=torch.bfloat16)
        text = build_text_encoder(layouts.text)
        load_text_encoder(text, layouts.text, device="cpu", dtype=torch.bfloat16)
        scale, shift = SD3.scale_and_shift(layouts)
        vae = library.sd.vae.load_vae(layouts.vae, device="cpu", dtype=torch.bfloat16, scale=scale, shift=shift)
        return denoiser, text, vae

    return load


def lumina_loader() -> Any:
    """All of a single file: Next-DiT, Gemma 2, VAE."""
    import torch

    import library.sd.vae  # with what is imported late
    from library.lumina.architecture import LUMINA
    from library.lumina.checkpoint import build_denoiser, load_denoiser
    from library.lumina.text import build_text_encoder, load_text_encoder
    from library.options.lumina import LuminaTrainOptions

    def load(path: Path) -> Any:
        options = LuminaTrainOptions()
        layouts = LUMINA.read_layouts(replace(options, model=replace(options.model, pretrained_model_name_or_path=str(path))))
        assert layouts.denoiser is not None and layouts.text is not None and layouts.tokenizer is not None
        assert layouts.vae is not None
        denoiser = build_denoiser(layouts.denoiser.config)
        load_denoiser(denoiser, layouts.denoiser, device="cpu", dtype=torch.bfloat16)
        text = build_text_encoder(layouts.text, layouts.tokenizer)
        load_text_encoder(text, layouts.text, device="cpu", dtype=torch.bfloat16)
        scale, shift = LUMINA.scale_and_shift(layouts)
        vae = library.sd.vae.load_vae(layouts.vae, device="cpu", dtype=torch.bfloat16, scale=scale, shift=shift)
        return denoiser, text, vae

    return load


LOADERS = {"dit": dit_loader, "qwen3": qwen3_loader, "sdxl": sdxl_loader, "sd3": sd3_loader, "lumina": lumina_loader}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
