"""Encodes the captions of a dataset once, and the texts of --sample_prompts, and keeps the result on disk for training:

    accelerate launch tools/cache_text_encoder_outputs.py --pretrained_model_name_or_path sd15.safetensors ...
    accelerate launch tools/cache_text_encoder_outputs.py --sdxl --pretrained_model_name_or_path sdxl.safetensors ...
    accelerate launch tools/cache_text_encoder_outputs.py --anima --dataset_config set.toml --qwen3 qwen3_06b.safetensors

Takes every option of the training script, so a training command can be pasted; what only training needs may be missing. Where
captions vary (shuffling, tag dropout, wildcards) the length of the training decides how many variants there are: give
--max_train_epochs or --max_train_steps as for training, or --caption_variants. See docs/caching.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cache_tool import run_tool

if __name__ == "__main__":
    run_tool("text")
