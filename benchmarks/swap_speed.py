"""What a swapped pattern gains in models people use: python benchmarks/swap_speed.py [vit] [llama] [--threads 2]

vit: timm's ViT at 1024 × 1024 (4,097 tokens), neighborhood attention in its first layers, beside itself as it was.
llama: a transformers Llama that reads 16,384 tokens with PowerAttention, beside its own sdpa; then it generates.
Each run in turn, before and after, the fastest of each; a ratio above 1 is what the swap gains. Weights are random.
On a machine that others use, `--threads 1 --clock cpu` counts the processor's time in place of the wall clock's.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnlab.hub import register_transformers, swap
from attnlab.patterns import Neighborhood, PowersOfTwo
from attnlab.torchvision_schemas import declare

CLOCK = time.perf_counter
Best = dict[str, dict[str, float]]  # what is timed → whose it is → seconds


@contextmanager
def timed(modules: dict[str, nn.Module], best: Best, whose: str) -> Iterator[None]:
    """The fastest forward of each module while the block runs."""
    started: dict[str, float] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            started[name] = CLOCK()

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            took = CLOCK() - started[name]
            best[name][whose] = min(best[name].get(whose, float("inf")), took)

        return hook

    hooks = [m.register_forward_pre_hook(begin(n)) for n, m in modules.items()]
    hooks += [m.register_forward_hook(end(n)) for n, m in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def report(best: Best, wanted: dict[str, float]) -> None:
    for name, seconds in best.items():
        before, after = seconds["before"], seconds["after"]
        aim = f"   (≥ {wanted[name]:g}×)" if name in wanted else ""
        print(f"  {name:<34} {before * 1e3:9.1f} ms → {after * 1e3:8.1f} ms   {before / after:6.2f}×{aim}", flush=True)


@torch.no_grad()
def vision(model: str, image: int, kernel: int, rounds: int) -> None:
    declare()
    import timm

    net = timm.create_model(model, img_size=image, depth=2).eval()
    x = torch.randn(1, 3, image, image)
    modules = {"block": net.blocks[0], "attention layer": net.blocks[0].attn}
    best: Best = defaultdict(dict)
    print(f"{model} at {image} × {image}, {Neighborhood.__name__} of {kernel} × {kernel} in layer 0:")
    for _ in range(rounds):
        with timed(modules, best, "before"):
            net(x)
        with swap(net, Neighborhood, kernel=kernel, layers=[0]), timed(modules, best, "after"):
            net(x)
    report(best, {"attention layer": 3.0})
    with swap(net, Neighborhood, kernel=kernel, layers=[0]) as swapped:
        print(f"  {swapped.explain(x)}")


@torch.no_grad()
def language(tokens: int, block: int, window: int, rounds: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    register_transformers()
    pattern = PowersOfTwo(block=block, window=window)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2 * tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    config.attnlab_pattern = str(pattern)
    after = AutoModelForCausalLM.from_config(config, attn_implementation="attnlab").eval()
    after.load_state_dict(before.state_dict())
    ids = torch.randint(1, 512, (1, tokens))
    best: Best = defaultdict(dict)
    print(f"Llama reading {tokens} tokens, {pattern}:")
    for _ in range(rounds):
        for whose, model in (("before", before), ("after", after)):
            with calls(best, whose), timed({"attention layer": model.model.layers[0].self_attn}, best, whose):
                model(ids, logits_to_keep=1)
    report(best, {"attention": 5.0})
    with swap(before, pattern) as swapped, calls(best, "after"):
        best.pop("attention")
        out = before.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(out, after.generate(ids, max_new_tokens=8, do_sample=False))
    print(f"  generates {out[0, tokens:].tolist()}, swapped in ({', '.join(swapped.layers)}) or by its config alike")


@contextmanager
def calls(best: Best, whose: str) -> Iterator[None]:
    """The fastest call of transformers' attention interface while the block runs: heads in, heads out."""
    from transformers import AttentionInterface

    def watched(call: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
        def run(*arguments: object, **keywords: object) -> tuple[Tensor, None]:
            start = CLOCK()
            out = call(*arguments, **keywords)
            took = CLOCK() - start
            best["attention"][whose] = min(best["attention"].get(whose, float("inf")), took)
            return out

        return run

    table = AttentionInterface._global_mapping
    old = {name: table[name] for name in ("sdpa", "attnlab")}
    table.update({name: watched(call) for name, call in old.items()})
    try:
        yield
    finally:
        table.update(old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["vit", "llama"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread, if others work")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--image", type=int, default=1024)
    parser.add_argument("--kernel", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--window", type=int, default=4)
    options = parser.parse_args()
    global CLOCK
    CLOCK = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if "vit" in options.rows:
        vision(options.model, options.image, options.kernel, options.rounds)
    if "llama" in options.rows:
        language(options.tokens, options.block, options.window, options.rounds)


if __name__ == "__main__":
    main()
