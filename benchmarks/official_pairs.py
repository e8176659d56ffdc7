"""The pairs of `official.py`: the authors' module, ours with its weights, and what both are given."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import find
from attnlab.models.pointing.ptrnet import permutation
from attnlab.patterns import Causal
from attnlab.torchvision_schemas import declare

Call = Callable[..., Any]


@dataclass
class Pair:
    """Two calls of the same inputs that should give the same tensor, and the modules that are trained by them."""

    theirs: Call
    ours: Call
    inputs: tuple[Tensor, ...]
    training: tuple[Call, Call] | None = None  # in their place, where training is another computation


@dataclass
class Setting:
    """Where the checkouts are, and how long texts are."""

    folder: Path | None
    length: int

    def tokens(self, *shape: int) -> Tensor:
        return torch.randn(*shape)

    def borrow(self, repository: str, module: str, within: str = "") -> Any:
        """A module of a checkout; ImportError with the reason if it is not there."""
        if self.folder is None:
            raise ImportError(f"{repository} is not there: give its checkout's folder as --official")
        root = self.folder / repository.split("/")[1]
        if not root.exists():
            raise ImportError(f"{root} is not there")
        sys.path.insert(0, str(root / within if within else self.folder if module.count(".") else root))
        try:
            return lenient_import(module)
        finally:
            del sys.path[0]


class Silent(type):
    """A class whose every attribute is a call that does nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Absent(metaclass=Silent):
    """Stands for what a repository imports and does not use here; as a decorator it changes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, given: Any = None, *_: Any, **__: Any) -> Any:
        return given


class StandIn(types.ModuleType):
    """A package that is absent."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__, self.__spec__ = [], ModuleSpec(name, None)  # what others ask of every module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nn.Module if name == "Module" else Absent  # labml's `Module` is torch's


def lenient_import(name: str) -> Any:
    """Import a module, with stand-ins for packages and names that are absent."""
    for _ in range(50):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or name.startswith(error.name):
                raise
            sys.modules[error.name] = StandIn(error.name)
        except ImportError as error:
            missing = getattr(error, "name_from", None) or str(error).split("'")[1]
            if error.name not in sys.modules or error.name == name:
                raise
            setattr(sys.modules[error.name], missing, Absent)
    raise ImportError(f"{name} wants too much that is absent")


def transformers() -> Any:
    """transformers; torchvision's compiled operators, which it imports, need not load."""
    declare()
    return importlib.import_module("transformers")


def moved(module: nn.Module, by: float = 0.05) -> nn.Module:
    """With parameters off their special first values, which hide differences."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))
    return module


def adapted(repository: str, name: str, arguments: dict[str, Any], module: nn.Module) -> Any:
    """Our module with the weights of theirs."""
    return find(repository, name).build({"text": "", **arguments}, module.state_dict())


def rotary(length: int, width: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin `(1, N, D)` as transformers' layers take them."""
    angle = torch.arange(length)[:, None] / base ** (torch.arange(0, width, 2) / width)
    angle = torch.cat((angle, angle), -1)[None]
    return angle.cos(), angle.sin()


def causal_mask(length: int) -> Tensor:
    """As eager layers take it, added to scores `(1, 1, N, N)`."""
    return torch.full((length, length), -math.inf).triu(1)[None, None]


HF = "huggingface/transformers"


def gated(s: Setting) -> Pair:
    theirs = s.borrow("qiuzh20/gated_attention", "gated_attention.modeling_qwen3")
    theirs.Qwen3RotaryEmbedding = lambda *_, **__: nn.Identity()  # of an older transformers; cos and sin are given
    given = dict(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=8192,
        rope_theta=10000.0, attention_dropout=0.0, use_qk_norm=True, headwise_attn_output_gate=True,
        elementwise_attn_output_gate=False, qkv_bias=False, rms_norm_eps=1e-6, rope_scaling=None,
    )  # fmt: skip
    module = moved(theirs.Qwen3SdpaAttention(types.SimpleNamespace(**given), 0))
    ours, turns = adapted("qiuzh20/gated_attention", "Qwen3SdpaAttention", given, module), rotary(s.length, 64)
    return Pair(lambda x: module(x, position_embeddings=turns)[0], ours, (s.tokens(1, s.length, 512),))


def gaussian(s: Setting) -> Pair:
    theirs = s.borrow("gioannides/Gaussian-Adaptive-Attention", "GaussianBlock", "gaussian_adaptive_attention")
    given = dict(norm_axis=1, num_heads=4, num_gaussians=4)
    module = moved(theirs.MultiHeadGaussianAdaptiveAttention(**given))
    ours = adapted("gioannides/Gaussian-Adaptive-Attention", "MultiHeadGaussianAdaptiveAttention", given, module)
    return Pair(module, ours, (s.tokens(8, s.length, 512),))


def sigmoid(s: Setting, alibi: bool = False) -> Pair:
    home = "attention_simulator/src"
    theirs = s.borrow("apple/ml-sigmoid-attention", "attention_simulator.layers.attention", home)
    given: dict[str, Any] = dict(dim=512, num_heads=8, attn_bias=-math.log(s.length))
    if alibi:
        masking = lambda attn, mask: attn.masked_fill(~mask, -math.inf)  # noqa: E731
        given |= dict(masking_fn=masking, attn_logits_transform=theirs.alibi)
    module = moved(theirs.Attention(attn_activ_fn=torch.sigmoid, **given))
    names = dict(attn_activ_fn="sigmoid", attn_logits_transform="alibi", masking_fn="mask") if alibi else {}
    ours = adapted("apple/ml-sigmoid-attention", "Attention", {**given, **names}, module)
    seen = torch.ones(s.length, s.length, dtype=torch.bool).tril() if alibi else None
    return Pair(lambda x: module(x, seen)["attn_proj"], ours, (s.tokens(1, s.length, 512),))


def rcmha(s: Setting) -> Pair:
    theirs = s.borrow("hermansh-id/rcmha", "rcmha.attention", ".")
    module = moved(theirs.RelativeMultiHeadAttention(8, 512, 0.0))
    ours = adapted("hermansh-id/rcmha", "rcmha/attention.py::RelativeMultiHeadAttention", {"dropout_prob": 0.0}, module)
    seen = torch.ones(s.length, s.length).tril()[..., None]

    def run(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return module(query=x, key=x, value=x, mask=seen).transpose(0, 1)

    return Pair(run, lambda x: ours(x, pattern=Causal()), (s.tokens(1, s.length, 512),))


def mixture_of_heads(s: Setting) -> Pair:
    theirs = s.borrow("SkyworkAI/MoH", "models", "MoH-DiT")
    given = dict(dim=512, num_heads=8, qkv_bias=True, shared_head=2, routed_head=4)
    module = moved(theirs.MoHAttention(**given))
    return Pair(module, adapted("SkyworkAI/MoH", "MoHAttention", given, module), (s.tokens(1, s.length, 512),))


def axial(s: Setting) -> Pair:
    theirs = s.borrow("lucidrains/axial-attention", "axial_attention.axial_attention", ".")
    given, side = dict(dim=256, num_dimensions=2, heads=8, dim_index=-1), math.isqrt(4 * s.length)
    module = moved(theirs.AxialAttention(**given))
    ours = adapted("lucidrains/axial-attention", "AxialAttention", given, module)
    return Pair(module, ours, (s.tokens(1, side, side, 256),))


def routing(s: Setting) -> Pair:
    theirs = s.borrow("lucidrains/routing-transformer", "routing_transformer.routing_transformer", ".")
    given = dict(num_clusters=s.length // 64, window_size=64, num_heads=8, head_dim=64, causal=True)
    module = theirs.KmeansAttention(**given).eval()  # the means are learned by both only while training
    module.kmeans.means.data = nn.functional.normalize(torch.randn_like(module.kmeans.means), dim=-1)
    module.kmeans.initted = torch.tensor(True)
    ours = adapted("lucidrains/routing-transformer", "KmeansAttention", given, module)
    qkv = tuple(s.tokens(1, 8, s.length, 64) for _ in range(3))
    return Pair(lambda *x: module(*x)[0], lambda *x: ours(*x)[0], qkv)


def shifted_groups(s: Setting) -> Pair:
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    theirs = s.borrow("Dexter-GT-86/SinkLoRA", "llama_attn_replace")
    given = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
    module = moved(llama.LlamaAttention(llama.LlamaConfig(**given), 0))
    ours = adapted("Dexter-GT-86/SinkLoRA", "LlamaAttention", given, module)
    turns = rotary(s.length, 64)
    module.num_heads = module.num_key_value_heads = 8
    module.hidden_size, module.config.pretraining_tp = 512, 1
    module.rotary_emb = lambda v, seq_len: turns
    theirs.apply_rotary_pos_emb = lambda q, k, cos, sin, _: llama.apply_rotary_pos_emb(q, k, cos, sin)
    mask = causal_mask(s.length)
    return Pair(lambda x: theirs.forward_noflashattn(module, x, mask)[0], ours, (s.tokens(1, s.length, 512),))


def pointer(s: Setting) -> Pair:
    theirs = s.borrow("shirgur/PointerNet", "PointerNet", ".")
    module = theirs.PointerNet(128, 256, 1, 0.0)
    ours = adapted("shirgur/PointerNet", "PointerNet", dict(bidir=False), module)
    answers = torch.stack([torch.randperm(32) for _ in range(16)])
    return Pair(
        lambda x: module(x)[1].float(),
        lambda x: ours.decode(x, allowed=permutation).positions.float(),
        (torch.rand(16, 32, 2),),
        # Theirs feeds its own choice back while training; ours, the true answer.
        training=(lambda x: module(x)[0], lambda x: ours(x, answers, allowed=permutation).exp()),
    )


def memory(s: Setting, chunk: int) -> Pair:
    theirs = lenient_import("titans_pytorch.neural_memory")
    given = dict(
        dim=128, chunk_size=chunk, heads=4, dim_head=32, default_step_transform_max_lr=0.1,
        default_model_kwargs=dict(depth=2, expansion_factor=2.0),
    )  # fmt: skip
    module = theirs.NeuralMemory(**given)
    ours = adapted("lucidrains/titans-pytorch", "NeuralMemory", given, module)
    return Pair(lambda x: module(x)[0], ours, (s.tokens(1, s.length, 128),))


def union(s: Setting) -> Pair:
    home = "language_modeling"
    theirs = s.borrow("YujiaoYang-work/UoE", "model.attention.SMHA_v3", home)
    given = dict(capacity=1, epsilon=1e-8)
    torch.cuda.current_device = lambda: "cpu"  # where it makes its parameters  # type: ignore[assignment]
    config = dict(given, init_method=nn.init.xavier_normal_, output_layer_init_method=nn.init.xavier_normal_)
    module = moved(theirs.SparseSelfAttention(8, 512, 64, 0.0, config, max_position_embeddings=s.length))
    ours = adapted("YujiaoYang-work/UoE", "SparseSelfAttention", given, module)
    turn, hidden = theirs.apply_rotary_pos_emb, torch.ones(s.length, s.length, dtype=torch.bool).triu(1)[..., None]
    # Positions are those among a head's own tokens, of which only the layer knows how many there are.
    theirs.apply_rotary_pos_emb = lambda q, *given: turn(q, *given[:-1], torch.arange(q.shape[2])[None])
    return Pair(lambda x: module(x, attn_mask=hidden), ours, (s.tokens(4, s.length // 4, 512),))


def layer(name: str, module: nn.Module, given: dict[str, Any], run: Call, x: Tensor) -> Pair:
    """A layer of transformers."""
    return Pair(run, adapted(HF, name, given, module), (x,))


def mamba(s: Setting, version: int) -> Pair:
    hf, given = transformers(), dict(hidden_size=256, num_hidden_layers=1)
    if version == 1:
        home = importlib.import_module("transformers.models.mamba.modeling_mamba")
        module = moved(home.MambaMixer(hf.MambaConfig(**given), 0))
        return layer("MambaMixer", module, given, module, s.tokens(1, s.length // 4, 256))
    home = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    given |= dict(state_size=128, num_heads=8, head_dim=64, n_groups=1)
    module = moved(home.Mamba2Mixer(hf.Mamba2Config(**given), 0))
    with torch.no_grad():
        module.dt_bias.fill_(-3.0)
    return layer("Mamba2Mixer", module, given, module, s.tokens(1, s.length, 256))


def doge(s: Setting) -> Pair:
    hf, home = transformers(), importlib.import_module("transformers.models.doge.modeling_doge")
    given = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=4, keep_window_size=128)
    config = hf.DogeConfig(**given)
    config._attn_implementation = "eager"
    module, mask = moved(home.DogeAttention(config, 0)), causal_mask(s.length)
    turns = rotary(s.length, 64)
    return layer("DogeAttention", module, given, lambda x: module(x, turns, mask)[0], s.tokens(1, s.length, 512))


def kimi_delta(s: Setting) -> Pair:
    hf, home = transformers(), importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    given = dict(hidden_size=256, linear_head_dim=64, linear_num_heads=4, linear_conv_kernel_dim=4)
    module = home.KimiLinearDeltaAttention(hf.KimiLinearConfig(**given, pad_token_id=0), 0)
    for parameter in (module.forget_gate.A_log, module.forget_gate.dt_bias):  # which the layer alone leaves unset
        nn.init.uniform_(parameter, -1.0, 1.0)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    run = lambda x: first(module(x))  # noqa: E731
    return layer("KimiLinearDeltaAttention", module, given, run, s.tokens(1, s.length, 256))


def network(s: Setting, name: str, config: Any, given: dict[str, Any], tokens: int) -> Pair:
    """A language model of transformers: ids to logits."""
    hf = transformers()
    module = moved(getattr(hf, name)(config), 0.02).eval()
    ours = adapted(HF, name, given, module).eval()
    ids = torch.randint(3, config.vocab_size, (1, tokens))
    return Pair(lambda ids: module(ids).logits, ours, (ids,))


def llama(s: Setting) -> Pair:
    given = dict(
        vocab_size=1024, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=1024,
    )  # fmt: skip
    return network(s, "LlamaForCausalLM", transformers().LlamaConfig(**given), given, s.length)


def doge_network(s: Setting) -> Pair:
    given = dict(
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, keep_window_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    return network(s, "DogeForCausalLM", transformers().DogeConfig(**given), given, s.length)


def zamba(s: Setting) -> Pair:
    given = dict(
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, intermediate_size=512, mamba_d_state=64,
        layers_block_type=["linear_attention", "hybrid"] * 2, n_mamba_heads=8, num_attention_heads=8,
        num_mem_blocks=2, use_mem_rope=True, adapter_rank=16,
    )  # fmt: skip
    return network(s, "Zamba2ForCausalLM", transformers().Zamba2Config(**given), given, s.length)


def kimi_network(s: Setting) -> Pair:
    kda, mla = "linear_attention", "full_attention"
    config = transformers().KimiLinearConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=16,
        v_head_dim=64, num_experts=8, num_experts_per_token=2, linear_head_dim=64, linear_num_heads=4,
        layer_types=[kda, kda, kda, mla], attn_implementation="sdpa", pad_token_id=0,
    )  # fmt: skip
    return network(s, "KimiLinearForCausalLM", config, config.to_dict(), s.length)


def roberta(s: Setting) -> Pair:
    given = dict(
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=s.length + 2, pad_token_id=1, type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return network(s, "RobertaForMaskedLM", transformers().RobertaConfig(**given), given, s.length)


PAIRS: dict[str, Callable[[Setting], Pair]] = {
    "gated": gated,
    "gaam": gaussian,
    "sigmoid": sigmoid,
    "sigmoid, alibi, causal": lambda s: sigmoid(s, alibi=True),
    "rcmha": rcmha,
    "mixture_of_heads": mixture_of_heads,
    "axial": axial,
    "cluster_routing": routing,
    "shifted_groups": shifted_groups,
    "pointer_network": pointer,
    "chunk_memory, 64": lambda s: memory(s, 64),
    "chunk_memory, 16": lambda s: memory(s, 16),
    "union_attention": union,
    "mamba": lambda s: mamba(s, 1),
    "mamba2": lambda s: mamba(s, 2),
    "dynamic_mask": doge,
    "kda": kimi_delta,
    "llama": llama,
    "doge": doge_network,
    "zamba2": zamba,
    "kimi_linear": kimi_network,
    "selformer": roberta,
}
