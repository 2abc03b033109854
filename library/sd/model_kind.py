"""What kind of model a checkpoint is, and what it says about its training. Needs no torch, except for pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.errors import CheckpointError
from library.files.model_path import LORA, SD1, SD2, SD_VAE, SDXL, SDXL_REFINER, described, recognise_keys
from library.files.weights_source import WeightsSource
from library.sd.layout import EPSILON, VELOCITY, Marks
from library.sd.source import MODEL_FLAG, SCHEDULER_CONFIG, UNET, ModelSource

Shapes = Mapping[str, tuple[int, ...]]

FIRST_LAYERS = ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")
PROJECTIONS = (".proj_in.weight", ".proj_out.weight")  # of transformer blocks: matrices in SD 2, 1x1 convolutions in SD 1
REFINER_VECTOR = "add_embedding.linear_1.weight"
REFINER_VECTOR_WIDTH = 2560  # pooled text and five sizes, where SDXL has six
OTHER_CHANNELS = {9: "an inpainting model", 8: "a model that edits pictures"}  # of the first layer; 4 in others
VELOCITY_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # empty tensors beside the weights
METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTIONS = {"epsilon": EPSILON, "eps": EPSILON, "v": VELOCITY, "v_prediction": VELOCITY, "velocity": VELOCITY}
# In a folder without a U-Net of Stable Diffusion: what it is, for a message
OTHER_PARTS = ("transformer", "prior", "decoder")


def check_kind(model: ModelSource, *, wanted: str, v2: bool = False) -> None:
    """Raises CheckpointError where the model is not ``wanted`` (SDXL, else SD1), naming what it is and which script trains it.

    ``v2``: whether --v2 says that it is Stable Diffusion 2.x.
    """
    unet = _unet_shapes(model)
    kind = kind_of(unet)
    start = f"{MODEL_FLAG} {model.name}"
    _refuse_others(start, unet, kind, wanted)
    if channels := _other_channels(unet):
        other = OTHER_CHANNELS.get(channels, "a model of another kind")
        raise CheckpointError(
            f"{start} is {other}: its U-Net takes {channels} channels instead of 4; give a model that draws whole pictures"
        )
    if kind == SD2 and not v2 and wanted != SDXL:
        raise CheckpointError(f"{start} is a {SD2}: add --v2")
    if kind == SD1 and v2:
        raise CheckpointError(f"{start} is a {SD1}, but --v2 says 2.x: drop --v2")


def kind_of(shapes: Shapes) -> str | None:
    """One of the kinds of library/files/model_path.py; the names of U-Nets of SD 1 and 2, and of refiners, need shapes too."""
    kind = recognise_keys(shapes)
    if kind == SDXL and shapes.get(REFINER_VECTOR, (0, 0))[1] == REFINER_VECTOR_WIDTH:
        return SDXL_REFINER
    if kind == SD1 and not any(name.startswith("cond_stage_model.") for name in shapes):
        sides = {len(shape) for name, shape in shapes.items() if name.endswith(PROJECTIONS) and "attn" not in name}
        return SD2 if sides == {2} else SD1
    return kind


def _unet_shapes(model: ModelSource) -> Shapes:
    if model.file is not None:
        return model.file.shapes
    if not model.has_part(UNET):
        pipeline = model.settings("model_index.json").get("_class_name", "another model")
        whose = next((f", but {name}/" for name in OTHER_PARTS if model.has_part(name)), "")
        raise CheckpointError(f"{MODEL_FLAG} {model.name} is a folder of {pipeline}: it has no {UNET}/{whose}")
    return model.part(UNET).shapes


def _refuse_others(start: str, shapes: Shapes, kind: str | None, wanted: str) -> None:
    name = SDXL if wanted == SDXL else "Stable Diffusion 1.x or 2.x checkpoint"
    article = "an" if wanted == SDXL else "a"
    if kind is None:
        example = f", for example {next(iter(shapes))}" if shapes else ""
        raise CheckpointError(f"{start} is not {article} {name}: none of its {len(shapes):,} keys is known{example}")
    if kind == wanted or (kind == SD2 and wanted == SD1):
        return
    cure = {
        LORA: "; give the model that it is for, and a LoRA file to --network_weights",
        SD_VAE: "; give it a whole model, and a VAE to --vae",
        SDXL_REFINER: "; give it the SDXL base model",
    }.get(kind, "")
    raise CheckpointError(f"{start} is {described(kind)}, not {article} {name}{cure}")


def _other_channels(shapes: Shapes) -> int | None:
    """Of the U-Net's first layer, where there are not 4."""
    shape = next((shapes[name] for name in FIRST_LAYERS if name in shapes), ())
    return shape[1] if len(shape) == 4 and shape[1] != 4 else None


# ---------------------------------------------------------------- marks


def read_marks(model: ModelSource) -> Marks:
    """What the model says about what its U-Net predicts. Raises CheckpointError for a damaged scheduler_config.json."""
    return _marks_of_file(model.file) if model.file is not None else _marks_of_folder(model.settings(SCHEDULER_CONFIG))


def _marks_of_file(source: WeightsSource) -> Marks:
    has_velocity, has_zero = VELOCITY_KEY in source.shapes, ZERO_SNR_KEY in source.shapes
    if has_velocity or has_zero:
        keys = [key for key in (VELOCITY_KEY, ZERO_SNR_KEY) if key in source.shapes]
        where = f"its key{'s' * (len(keys) > 1)} {' and '.join(keys)}"
        return Marks(prediction=VELOCITY if has_velocity else None, zero_terminal_snr=has_zero or None, where=where)
    for key in METADATA_KEYS:
        if prediction := _prediction(source.metadata.get(key)):
            where = f"its metadata ({key} = {source.metadata[key]})"
            return Marks(prediction=prediction, where=where, is_certain=False)
    return Marks()


def _marks_of_folder(settings: Mapping[str, Any]) -> Marks:
    zero = settings.get("rescale_betas_zero_snr")
    return Marks(
        prediction=_prediction(settings.get("prediction_type")),
        zero_terminal_snr=zero if isinstance(zero, bool) else None,
        where=f"its {SCHEDULER_CONFIG}",
    )


def _prediction(text: object) -> str | None:
    return PREDICTIONS.get(text.strip().lower()) if isinstance(text, str) else None


def prediction_problem(marks: Marks, *, velocity: bool) -> str | None:
    """What is wrong where the model's marks and --v_parameterization (``velocity``) disagree; None where they agree."""
    if marks.prediction is None or (marks.prediction == VELOCITY) == velocity:
        return None
    if velocity:
        return f"predicts noise (epsilon) according to {marks.where}: drop --v_parameterization"
    return f"predicts velocity (v) according to {marks.where}: add --v_parameterization"


def unmarked_velocity_warning(marks: Marks, *, velocity: bool, v2: bool) -> str | None:
    """``velocity``: --v_parameterization. SD 2.x is left in peace: half of what is published predicts velocity, unmarked."""
    if not velocity or marks.prediction is not None or v2:
        return None
    return (
        "does not say that it predicts velocity (v), and models of its kind predict noise as a rule: with --v_parameterization "
        "such a model unlearns what it knows; drop it unless the model's maker says v-prediction"
    )


def zero_snr_warning(marks: Marks, *, zero_terminal_snr: bool) -> str | None:
    if not marks.zero_terminal_snr or zero_terminal_snr:
        return None
    return f"was trained with a last noise level of pure noise according to {marks.where}: add --zero_terminal_snr"
