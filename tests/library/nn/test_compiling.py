"""Compiled blocks: few graphs, equal numbers, clear errors."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.errors import OptionError, TrainingError
from library.nn.checkpointing import run_checkpointed
from library.nn.compiling import (
    GRAPHS,
    CompiledForward,
    available_backends,
    check_backend,
    compile_blocks,
    compile_errors_are_told,
)
from library.nn.fp8 import use_fp8
from library.nn.loading import load_into
from networks import lora_anima
from tests.library.anima.tiny_dit import TINY, AnimaDenoiser, batch, tiny_denoiser, tiny_weights

BLOCKS = replace(TINY, adapter=None)
TOKEN_GRIDS = [(8, 6), (8, 8), (6, 6), (10, 12), (4, 20), (16, 10)]
BLOCK_LINEARS = r"blocks\.\d+\.(?:self_attn|cross_attn|mlp)\..*(?<!norm)"
DROPOUTS = {"dropout": "0.1", "rank_dropout": "0.2", "module_dropout": "0.1"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    with torch._dynamo.config.patch(cache_size_limit=8, accumulated_cache_size_limit=256):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


class Counting:
    """A backend that runs what it gets as it is."""

    graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


@dataclass
class Model:
    denoiser: AnimaDenoiser
    network: Any

    def step(self, seed: int = 0, rows: int = 12, used: int | None = None, **size: int) -> list[Tensor]:
        """The velocity and the gradients of every LoRA."""
        latents, sigmas, context = batch(rows=rows, **size)
        context[:, used:] = 0 if used else context[:, used:]
        torch.manual_seed(seed)
        velocity = self.denoiser(latents, sigmas, context, used_rows=used)
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        return [velocity.detach(), *torch.autograd.grad(velocity.square().mean(), weights)]

    @torch.no_grad()
    def look(self, **size: int) -> Tensor:
        return self.denoiser(*batch(**size))


def model_with_lora(denoiser: AnimaDenoiser | None = None, **arguments: str) -> Model:
    denoiser = (denoiser or tiny_denoiser(BLOCKS)).requires_grad_(False)
    torch.manual_seed(7)
    network = lora_anima.create_network(1.0, 4, 2.0, None, None, denoiser, **arguments)
    network.apply_to(None, denoiser, False, True)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2)
    network.prepare_optimizer_params(None, 1e-3)
    return Model(denoiser, network)


def close(ours: list[Tensor], plain: list[Tensor]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


# ---------------------------------------------------------------- how many graphs


def test_one_graph_serves_all_blocks_and_sizes():
    model, backend = model_with_lora(), Counting()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    for size in (2, 3):
        for height, width in TOKEN_GRIDS:
            model.step(size=size, height=height, width=width)
    assert backend.graphs == 1
    for height, width in TOKEN_GRIDS:
        model.step(size=1, height=height, width=width)
    assert backend.graphs == 2


@pytest.mark.slow  # several graphs
def test_one_graph_serves_all_lengths_of_cut_contexts():
    model, backend = model_with_lora(), Counting()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    for used in (20, 100, 140, 200):
        model.step(rows=512, used=used)
    assert backend.graphs == 1
    model.step(rows=512, used=300)  # too long to be cut
    assert backend.graphs == 2


@pytest.mark.slow
def test_strengths_share_a_graph_and_none_has_its_own():
    model, plain, backend = model_with_lora(), model_with_lora(), Counting()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    for strength in (1.0, 0.5, -0.7, 1.0):
        for one in (model, plain):
            one.network.set_multiplier(strength)
        close(model.step(), plain.step())
    assert backend.graphs == 1
    without = tiny_denoiser(BLOCKS)
    for switch in (lambda: model.network.set_multiplier(0.0), lambda: model.network.set_enabled(False)):
        switch()
        close([model.look()], [without(*batch()).detach()])
        model.network.set_multiplier(1.0)
    assert backend.graphs == 3  # the second switch is another flag
    model.network.set_enabled(True)
    close(model.step(), plain.step())
    assert backend.graphs == 3


@pytest.mark.slow  # several graphs
def test_evaluation_has_no_dropout_and_its_own_graphs():
    model, plain, backend = model_with_lora(**DROPOUTS), model_with_lora(), Counting()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    trained = model.step()
    model.network.eval()
    close([model.look()], [plain.look()])
    with torch.inference_mode():
        model.network.set_multiplier(0.5)
        model.network.set_multiplier(1.0)  # numbers made now must serve the backward pass, too
        model.denoiser(*batch())
    model.network.train()
    assert all(torch.equal(one, other) for one, other in zip(model.step(), trained, strict=True))
    assert backend.graphs == 3


def test_limit_of_graphs_is_raised_for_networks_whose_layers_are_not_alike():
    model = Model(tiny_denoiser(BLOCKS).requires_grad_(False), None)
    backend = Counting()
    shift = nn.Parameter(torch.tensor(0.25))
    for block in model.denoiser.blocks:
        patch(block.mlp.layer1, shift)
    expected = model.look()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    close([model.look()], [expected])
    assert torch._dynamo.config.cache_size_limit == GRAPHS
    assert 1 <= backend.graphs <= BLOCKS.blocks


def patch(layer: nn.Linear, shift: Tensor) -> None:
    frozen = layer.forward
    layer.forward = lambda x: frozen(x) + shift


# ---------------------------------------------------------------- which numbers


def test_checkpointed_steps_with_dropout_equal_plain_ones():
    model = model_with_lora(**DROPOUTS)
    plain = model.step(seed=3)
    compile_blocks(model.denoiser, "aot_eager", fullgraph=True)
    close(model.step(seed=3), plain)
    model.denoiser.run_block = run_checkpointed
    close(model.step(seed=3), plain)
    assert (model.step(seed=4)[0] - plain[0]).norm() > 1e-3 * plain[0].norm()


@pytest.mark.slow
def test_frozen_weights_in_8_bits():
    with torch.device("meta"):
        denoiser = AnimaDenoiser(BLOCKS)
    assert len(use_fp8(denoiser, BLOCK_LINEARS)) == 10 * BLOCKS.blocks
    load_into(denoiser, tiny_weights(BLOCKS).items(), device="cpu", dtype=torch.float32)
    model, backend = model_with_lora(denoiser), Counting()
    plain = model.step()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    close(model.step(), plain)
    assert backend.graphs == 1


def kept_mib(model: Model) -> float:
    """What forward keeps for backward, besides the weights."""
    weights = {weight.untyped_storage().data_ptr() for part in (model.denoiser, model.network) for weight in part.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = model.denoiser(*batch(size=1))
    assert velocity.requires_grad
    return sum(kept.values()) / 2**20


@pytest.mark.slow
def test_weights_in_8_bits_are_not_kept_in_more():
    wide = replace(BLOCKS, width=128, mlp_hidden=512)
    with torch.device("meta"):
        denoiser = AnimaDenoiser(wide)
    use_fp8(denoiser, BLOCK_LINEARS)
    load_into(denoiser, tiny_weights(wide).items(), device="cpu", dtype=torch.float32)
    model = model_with_lora(denoiser)
    plain = kept_mib(model)
    compile_blocks(model.denoiser, "aot_eager_decomp_partition", fullgraph=True)  # divides graphs as inductor does
    assert kept_mib(model) <= plain


@pytest.mark.slow
def test_autocast_and_bf16_weights():
    model, backend = model_with_lora(tiny_denoiser(BLOCKS, dtype=torch.bfloat16)), Counting()
    exact = model_with_lora().step()
    compile_blocks(model.denoiser, backend, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model.step()
    assert backend.graphs == 1
    assert max(float((one - other).norm() / other.norm()) for one, other in zip(ours, exact, strict=True)) < 0.1


def test_names_modules_and_copies_stay():
    denoiser = tiny_denoiser(BLOCKS)
    names, modules = list(denoiser.state_dict()), [(name, type(module)) for name, module in denoiser.named_modules()]
    expected = denoiser(*batch()).detach()
    backend = Counting()
    compile_blocks(denoiser, backend, fullgraph=True)
    assert list(denoiser.state_dict()) == names
    assert [(name, type(module)) for name, module in denoiser.named_modules()] == modules
    other = copy.deepcopy(denoiser)
    other.blocks[0].mlp.layer2.weight.data.zero_()
    close([denoiser(*batch()).detach()], [expected])
    assert not torch.allclose(other(*batch()), expected, rtol=0.01)
    assert all(isinstance(vars(block)["forward"], CompiledForward) for block in denoiser.blocks)


def test_weights_that_move_to_another_place_in_memory_are_seen():
    denoiser, backend = tiny_denoiser(BLOCKS).requires_grad_(False), Counting()
    compile_blocks(denoiser, backend, fullgraph=True)
    before = denoiser(*batch())
    for weight in denoiser.blocks.parameters():
        weight.data = torch.cat((weight.data.flatten(), torch.zeros(3)))[:-3].view(weight.shape) * 1.5
    assert not torch.allclose(denoiser(*batch()), before)
    assert backend.graphs == 1


@pytest.mark.slow  # generates and builds C++
def test_generated_code_gives_equal_files_and_equal_numbers_to_rounding():
    plain = model_with_lora().step()
    digests = []
    for _ in range(2):
        torch._dynamo.reset()
        model = model_with_lora(**DROPOUTS)
        compile_blocks(model.denoiser, "inductor", fullgraph=True)
        model.network.eval()
        close(model.step(), plain)
        model.network.train()
        whole = model.step(seed=5)
        model.denoiser.run_block = run_checkpointed
        again = model.step(seed=5)  # the recomputation draws the same dropout
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
        assert (whole[0] - plain[0]).norm() > 1e-3 * plain[0].norm()
        digests.append(trained(model))
    assert digests[0] == digests[1]


def trained(model: Model) -> str:
    """What the LoRA is after three steps at changing sizes."""
    optimizer = torch.optim.AdamW([weight for weight in model.network.parameters() if weight.requires_grad], lr=1e-2)
    for number, (height, width) in enumerate(TOKEN_GRIDS[:3]):
        torch.manual_seed(number)
        model.denoiser(*batch(height=height, width=width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = model.network.state_dict().values()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generated_code_on_a_gpu():
    model = model_with_lora()
    plain = model.step()
    model.denoiser.cuda()
    model.network.cuda()
    compile_blocks(model.denoiser, "inductor", fullgraph=True)
    velocity = model.denoiser(*(tensor.cuda() for tensor in batch()))
    velocity.square().mean().backward()
    ours = [velocity.detach(), *(weight.grad for weight in model.network.parameters() if weight.requires_grad)]
    for one, other in zip(ours, plain, strict=True):
        assert (one.cpu() - other).norm() <= 0.02 * other.norm()  # TF32 at worst


# ---------------------------------------------------------------- what goes wrong


def test_unknown_backends_are_refused_with_those_that_there_are():
    with pytest.raises(
        OptionError, match=r"--dynamo_backend inducter: .* \(did you mean inductor\?\); it has .*aot_eager"
    ) as found:
        check_backend("inducter")
    assert "TESTING" not in str(found.value)
    for name in available_backends():
        check_backend(name)


def test_backends_without_their_package_are_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="--dynamo_backend tvm: PyTorch .* does not have it here"):
        check_backend("tvm")


def test_backends_of_another_device_are_refused():
    check_backend("cudagraphs", torch.device("cuda"))
    with pytest.raises(
        OptionError, match="--dynamo_backend cudagraphs needs an NVIDIA GPU, but this run is on cpu: drop it, or "
    ):
        check_backend("cudagraphs", torch.device("cpu"))


def test_missing_compilers_are_found_before_the_first_step(monkeypatch):
    import torch._inductor.config as config

    check_backend("aot_eager", torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="triton is not installed.*pip install triton.*or drop --torch_compile"):
        check_backend("inductor", torch.device("cuda"))
    monkeypatch.delenv("CXX", raising=False)
    refused = pytest.raises(OptionError, match=r"no C\+\+ compiler works here .*or drop --torch_compile")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), refused:
        check_backend("inductor", torch.device("cpu"))


def test_unsupported_pythons_are_refused(monkeypatch):
    def refuse():
        raise RuntimeError("Python 3.99+ not yet supported for torch.compile")

    monkeypatch.setattr("torch._dynamo.eval_frame.check_if_dynamo_supported", refuse)
    with pytest.raises(OptionError, match="--torch_compile cannot work here: Python 3.99.*; drop --torch_compile"):
        check_backend("inductor")


def test_an_error_of_the_backend_is_told_in_one_sentence():
    def broken(module: Any, inputs: Any) -> Any:
        raise ValueError("the disk of generated code is full\nand more")

    denoiser = tiny_denoiser(BLOCKS)
    compile_blocks(denoiser, broken)
    with told("--torch_compile failed: ValueError (the disk of generated code is full); drop"):
        denoiser(*batch())


@pytest.mark.slow  # generates C++, and cannot build it
def test_a_compiler_that_is_missing_is_told():
    import torch._inductor.config as config

    denoiser = tiny_denoiser(BLOCKS)
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        compile_blocks(denoiser, "inductor")
        with told("no C++ compiler works here (No working C++ compiler found"):
            denoiser(*batch())


@contextmanager
def told(text: str):
    with pytest.raises(TrainingError) as found, compile_errors_are_told():
        yield
    assert text in str(found.value) and "drop --torch_compile" in str(found.value)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("TritonMissing", "Cannot find a working triton installation.", "pip install triton"),
        ("InvalidCxxCompiler", "No working C++ compiler found in cpp.cxx: (None, 'g++')", "Linux: g++"),
        ("GPUTooOldForTriton", "Found Tesla P100 which is too old", "cannot compile for this GPU (Found Tesla P100"),
        ("CppCompileError", "Python.h: No such file", "--torch_compile failed: CppCompileError (Python.h: No such file)"),
    ],
)
def test_errors_of_generated_code(name, text, wanted):
    error = type(name, (RuntimeError,), {"__module__": "torch._inductor.exc"})
    with told(wanted):
        raise error(text)


def test_other_errors_pass():
    for error in (ValueError("ours"), torch.OutOfMemoryError("CUDA out of memory"), OptionError("a flag")):
        with pytest.raises(type(error)) as found, compile_errors_are_told():
            raise error
        assert found.value is error


def test_out_of_memory_inside_the_compiler_is_out_of_memory():
    def greedy(module: Any, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    denoiser = tiny_denoiser(BLOCKS)
    compile_blocks(denoiser, greedy)
    with pytest.raises(torch.OutOfMemoryError), compile_errors_are_told():
        denoiser(*batch())
