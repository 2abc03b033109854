"""Reading the options of the inference scripts of SD3 and Lumina Image 2.0."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.options.command_line import read_options
from library.options.lumina_inference import LuminaInferenceOptions
from library.options.sd3_inference import Sd3InferenceOptions

MODEL_FLAGS = {Sd3InferenceOptions: "--ckpt_path", LuminaInferenceOptions: "--pretrained_model_name_or_path"}


def read(kind: type, *flags: object):
    return read_options(kind, [f"{MODEL_FLAGS[kind]}=m.safetensors", *map(str, flags)])


def problems(kind: type, *flags: object) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(kind, *flags)
    return caught.value.problems
