"""Encodes the images of a dataset once and keeps their latents on disk, so that training starts at once:

    accelerate launch tools/cache_latents.py --dataset_config set.toml --pretrained_model_name_or_path sd15.safetensors
    accelerate launch tools/cache_latents.py --sdxl --dataset_config set.toml --pretrained_model_name_or_path sdxl.safetensors
    accelerate launch tools/cache_latents.py --lumina --dataset_config set.toml --ae ae.safetensors
    accelerate launch tools/cache_latents.py --anima --dataset_config set.toml --vae qwen_image_vae.safetensors

Takes every option of the training script, so a training command can be pasted; what only training needs may be missing.
See docs/caching.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cache_tool import run_tool

if __name__ == "__main__":
    run_tool("vae")
