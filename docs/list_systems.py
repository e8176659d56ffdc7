"""Write the page of what there is from the cards: python docs/list_systems.py        writes docs/systems.md"""

from pathlib import Path

from attnlab import cards
from attnlab.arena.summary import number
from attnlab.models.flops import counted

PAGE = Path(__file__).with_name("systems.md")
TITLES = {
    cards.TOKENS: ("Mechanisms on tokens", "(B, N, C) → (B, N, C)"),
    cards.FEATURES: ("Mechanisms on maps", "(B, C, *spatial) → the same"),
    cards.BACKBONE: ("Image backbones", "images → logits, or maps at several scales with `features_only=True`"),
    cards.LM: ("Language models", "token ids → logits"),
    cards.DENOISER: ("Denoisers", "noisy input, time and condition → the noise"),
    cards.OPERATOR: ("Modules with shapes of their own", "see `attnlab show NAME`"),
    cards.RECIPE: ("Recipes", "training methods, conversions and generation"),
    cards.LENS: ("Looking inside and steering", "on any model whose attention can be seen; `attnlab.lens`"),
    cards.BENCHMARK: ("Benchmarks", "`attnlab bench`"),
}


def link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() else paper


def span(values: list[float]) -> str:
    return "–".join(dict.fromkeys(map(number, (min(values), max(values))))) if values else ""


def row(card: cards.Card) -> str:
    cells = [f"`{card.name}`", card.title, link(card.paper)]
    if card.kind is cards.BACKBONE:
        cells += [str(len(card.sizes) or ""), span([s.params / 1e6 for s in card.sizes.values()])]
        cells += [span([counted()[name].flops / 2e9 for name in card.sizes if name in counted()])]
    elif card.kind in (cards.LM, cards.DENOISER):
        cells += [str(len(card.sizes) or ""), span([s.params / 1e6 for s in card.sizes.values()])]
    else:
        cells += [card.cost, ", ".join(card.capabilities.names())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    lines = ["# What there is", "", "Written from the cards by `python docs/list_systems.py`; `attnlab show NAME` says"]
    lines += ["more of each. Every claim of a card is tested.", ""]
    for kind, (title, shapes) in TITLES.items():
        found = [entry.card for entry in cards.entries() if entry.card.kind is kind]
        if not found:
            continue
        columns = ["name", "title", "paper"]
        if kind is cards.BACKBONE:
            columns += ["sizes", "parameters, millions", "multiply-adds, billions"]
        else:
            columns += ["sizes", "parameters, millions"] if kind in (cards.LM, cards.DENOISER) else ["cost", "can"]
        lines += [f"## {title}", "", f"{shapes}.", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [*map(row, found), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
