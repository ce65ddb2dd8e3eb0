"""What vLLM derives from weights after loading: refreshed, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import vllm.model_executor.layers.utils as kernels
from tiny_checkpoints import checkpoint
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from kimisys.adapters.vllm.layout import RankModel, build_model, offline_config
from kimisys.adapters.vllm.pack import Packer
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.errors import LayoutError

Dtype = Literal["float32", "bfloat16"]


def loaded(
    folder: Path, seed: int, parallel: str = "", rank: int = 0, dtype: Dtype = "float32"
) -> RankModel:
    """As an engine's worker has it: loaded, and processed by vLLM."""
    model = unprocessed(folder, seed, parallel, rank, dtype)
    process(model)
    return model


def process(model: RankModel) -> None:
    """What vLLM does after loading; experts ask for the configuration and for groups."""
    with model.as_rank(), set_current_vllm_config(model.config):
        process_weights_after_loading(model.module, model.config.model_config, torch.device("cpu"))


def unprocessed(
    folder: Path, seed: int, parallel: str = "", rank: int = 0, dtype: Dtype = "float32"
) -> RankModel:
    split = EngineParallel.parse(parallel)
    model = build_model(offline_config(folder, dtype), split, rank, device="cpu")
    model.load(checkpoint(folder, seed))
    return model


def fresh(model: RankModel) -> torch.nn.Module:
    return build_model(model.config, model.parallel, model.rank, device="cpu").module


def packer_of(model: RankModel, expected: torch.nn.Module | None = None) -> Packer:
    return Packer(model.module, fresh(model) if expected is None else expected, model.config)


def outputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each layer computes from its weights, [3, out]; and every parameter that is kept: packed
    experts, what MLA absorbed, biases, norms."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        found |= {f"{name}.{n}": p.detach().clone() for n, p in own.items() if p.numel()}
        if hasattr(module, "cpu_linear"):
            sizes = ("input_size_per_partition", "input_size", "embedding_dim")
            inputs: Any = next(getattr(module, size) for size in sizes if hasattr(module, size))
            x = torch.linspace(-1, 1, 3 * inputs, dtype=module.weight.dtype).reshape(3, inputs)  # type: ignore[arg-type]
            found[name] = module.quant_method.apply(module, x, own.get("bias"))  # type: ignore[union-attr,operator]
    return found


@pytest.mark.parametrize(
    ("model", "parallel", "rank"),
    [
        ("tied", "", 0),
        ("untied", "", 0),
        ("untied", "tp=2", 0),
        ("qwen2-tied", "", 0),
        ("qwen2-untied", "tp=2", 0),
        ("llama-tied", "", 0),
        ("llama-untied", "tp=2", 0),
        ("mixtral", "", 0),
        ("mixtral", "tp=2", 0),
        ("qwen3_moe", "", 0),
        ("qwen3_moe", "tp=2", 0),
        ("deepseek_v3", "", 0),
        ("deepseek_v3", "tp=2", 0),
        ("glm4_moe", "tp=2,ep=on", 0),
        ("deepseek_v3", "tp=2,pp=2,ep=on", 2),
        ("qwen2_5_vl", "", 0),
        ("qwen2_5_vl", "tp=2", 0),
    ],
)
def test_a_packed_model_computes_as_if_loaded_anew(
    folders: dict[str, Path], model: str, parallel: str, rank: int
) -> None:
    running = loaded(folders[model], 1, parallel, rank)
    before = outputs(running.module)
    new = dict(unprocessed(folders[model], 2, parallel, rank).module.named_parameters())
    packer = packer_of(running)
    assert packer.shapes.keys() == new.keys()
    packer.pack({name: parameter.detach().clone() for name, parameter in new.items()})

    expected = outputs(loaded(folders[model], 2, parallel, rank).module)
    after = outputs(running.module)
    assert after.keys() == expected.keys() and any("lm_head" in name for name in after)
    biased = any(name.endswith("layers.1.self_attn.qkv_proj.bias") for name in after)
    assert biased == model.startswith(("qwen2", "glm4"))
    for name, value in expected.items():
        assert torch.equal(after[name], value), name
        assert not torch.equal(before[name], value), f"{name} does not depend on the weights"


@pytest.mark.parametrize("tied", [True, False])
def test_what_two_modules_derive_from_one_parameter_is_derived_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    running = loaded(folders["tied" if tied else "untied"], 1)
    module: Any = running.module
    packer = packer_of(running)
    packed: list[torch.nn.Module] = []
    derive = UnquantizedEmbeddingMethod.process_weights_after_loading

    def noted(method: UnquantizedEmbeddingMethod, layer: torch.nn.Module) -> None:
        packed.append(layer)
        derive(method, layer)

    monkeypatch.setattr(UnquantizedEmbeddingMethod, "process_weights_after_loading", noted)
    old = module.lm_head.cpu_linear
    packer.pack({n: torch.ones_like(m, device="cpu") for n, m in packer.shapes.items()})
    assert len(packed) == (1 if tied else 2)
    assert (module.lm_head.cpu_linear is module.model.embed_tokens.cpu_linear) == tied
    assert module.lm_head.cpu_linear is not old


def test_a_bias_that_vllm_widens_is_written_too(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on machines with AMX: kernels for bfloat16 weights that want their biases in float32.
    They run here as well, slowly, but vLLM would not choose them."""
    monkeypatch.setattr(kernels, "check_cpu_sgl_kernel", lambda *shape_and_dtype: True)
    folder, name = folders["qwen2-untied"], "model.layers.1.self_attn.qkv_proj.bias"
    running = loaded(folder, 1, dtype="bfloat16")
    bias = dict(running.module.named_parameters())[name]
    packer = packer_of(running)
    assert (bias.dtype, packer.shapes[name].dtype) == (torch.float32, torch.bfloat16)

    new = unprocessed(folder, 2, dtype="bfloat16").module
    packer.pack({n: parameter.detach().clone() for n, parameter in new.named_parameters()})
    expected = outputs(loaded(folder, 2, dtype="bfloat16").module)
    for key, value in outputs(running.module).items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


@pytest.mark.parametrize("model", ["tied", "qwen3_moe", "deepseek_v3"])
def test_the_shadow_is_not_kept(folders: dict[str, Path], model: str) -> None:
    """The next pull overwrites the shadow: what is being served must not be a view of it."""
    running = loaded(folders[model], 1)
    shadow = {n: p.detach() for n, p in unprocessed(folders[model], 2).module.named_parameters()}
    packer_of(running).pack(shadow)
    before = outputs(running.module)
    for tensor in shadow.values():
        tensor.fill_(float("nan"))
    for name, value in outputs(running.module).items():
        assert torch.equal(value, before[name]), name


class Unknown(UnquantizedLinearMethod):
    """A way to derive weights that kimisys does not know."""


class Absorbing:
    """An attention kernel with weights of its own."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        raise NotImplementedError


def test_embeddings_tied_or_untied_while_loading_are_refused(folders: dict[str, Path]) -> None:
    """vLLM does both, by what it finds in a checkpoint; dummy weights, all alike, it ties."""
    tied, untied = (loaded(folders[name], 1) for name in ("tied", "untied"))
    with pytest.raises(LayoutError, match=r"'lm_head\.weight' \(was tied to"):
        packer_of(untied, fresh(tied))
    untied.module.lm_head.weight = untied.module.model.embed_tokens.weight  # type: ignore[union-attr]
    with pytest.raises(LayoutError, match=r"'lm_head\.weight' \(now tied to"):
        packer_of(untied)


class Derives(torch.nn.Module):
    """Doubles its weight after loading, into a place that its constructor made."""

    def __init__(self, kind: str, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), weight), requires_grad=False)
        doubled = self.weight.detach() * 2
        if kind == "buffer":
            self.register_buffer("doubled", doubled)
        elif kind == "attribute":
            self.doubled = doubled
        elif kind == "list":
            self.doubled = [doubled]
        elif kind == "dictionary":
            self.doubled = {"w": (doubled,)}


class DerivesByHook(Derives):
    """As vLLM's MLA does, and says so."""

    def process_weights_after_loading(self) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def config(folders: dict[str, Path]) -> VllmConfig:
    return offline_config(folders["tied"], "float32")


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list", "dictionary"])
def test_derived_state_of_unchanged_shape_is_refused_by_name(kind: str, config: VllmConfig) -> None:
    """Without a hook that would derive it again, what has not the constructor's bits is refused."""

    def pack(weight: float, expected: torch.nn.Module) -> Packer:
        return Packer(torch.nn.Sequential(Derives(kind, weight)), expected, config)

    assert pack(0.0, torch.nn.Sequential(Derives(kind))).derived == []
    with pytest.raises(LayoutError, match=r"\[.0\.doubled"):
        pack(0.5, torch.nn.Sequential(Derives(kind)))
    with torch.device("meta"):  # where constants have no bits, nothing shows that they are
        expected = torch.nn.Sequential(Derives(kind))
    with pytest.raises(LayoutError, match=r"\[.0\.doubled"):
        pack(0.0, expected)


def test_a_hook_of_a_module_s_own_is_refused_by_name(config: VllmConfig) -> None:
    assert Packer(Derives("nothing"), Derives("nothing"), config).shapes.keys() == {"weight"}
    with pytest.raises(LayoutError, match=r"\"'' \(derived by DerivesByHook\)\""):
        Packer(DerivesByHook("nothing"), DerivesByHook("nothing"), config)
    running = Derives("nothing")
    running.process_weights_after_loading = print  # type: ignore[assignment]
    with pytest.raises(LayoutError, match="derived by Derives"):
        Packer(running, Derives("nothing"), config)


def test_rotary_angles_of_another_length_are_refused(folders: dict[str, Path]) -> None:
    running = loaded(folders["tied"], 1)
    rope: Any = running.module.get_submodule("model.layers.0.self_attn.rotary_emb")
    expected = fresh(running)
    rope.cos_sin_cache = rope.cos_sin_cache[:5]
    with pytest.raises(
        LayoutError, match=r"model\.layers\.0\.self_attn\.rotary_emb\.cos_sin_cache"
    ):
        packer_of(running, expected)


def test_what_cannot_be_derived_again_is_refused_by_name(folders: dict[str, Path]) -> None:
    def refused(change: Any, match: str) -> None:
        running = loaded(folders["tied"], 1)
        expected = fresh(running)
        layer: Any = running.module.get_submodule("model.layers.1")
        change(layer)
        with pytest.raises(LayoutError, match=match):
            packer_of(running, expected)

    def kernel(layer: Any) -> None:
        layer.self_attn.attn.impl = Absorbing()

    def filled(layer: Any) -> None:
        layer.mlp.down_proj.bias = None  # as it was
        layer.mlp.down_proj.__dict__["quant_config"] = torch.zeros(1)

    def transposed_kernel(layer: Any) -> None:
        layer.self_attn.W_UV = torch.zeros(3)

    def other_method(layer: Any) -> None:
        layer.mlp.down_proj.quant_method.__class__ = Unknown

    def scale(layer: Any) -> None:
        layer.mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))

    def moved(layer: Any) -> None:
        layer.input_layernorm.weight = torch.nn.Parameter(torch.zeros(0))

    def replaced(layer: Any) -> None:
        layer.mlp.act_fn = torch.nn.Identity()

    refused(kernel, r"'model\.layers\.1\.self_attn\.attn' \(derived by Absorbing\)")
    refused(filled, r"model\.layers\.1\.mlp\.down_proj\.quant_config")
    refused(transposed_kernel, r"model\.layers\.1\.self_attn\.W_UV")
    refused(other_method, r"'model\.layers\.1\.mlp\.down_proj' \(derived by Unknown\)")
    refused(scale, r"model\.layers\.1\.mlp\.scale")
    refused(moved, r"'model\.layers\.1\.input_layernorm\.weight'")
    refused(replaced, r"'model\.layers\.1\.mlp\.act_fn'")
