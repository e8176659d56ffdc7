"""A few coloured shapes on a large grid of image tokens, and which colour a shape has: how far can a decoder look?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Grid(NamedTuple):
    """A batch of grids with questions."""

    kinds: Tensor  # (B, side²): 0 where nothing is, else 1 + the shape
    tints: Tensor  # (B, side²): the colour there
    asked: Tensor  # (B, questions): shapes
    answers: Tensor  # (B, questions): their colours
    cells: Tensor  # (B, questions): where they are


class Reader(nn.Module):
    """A Llama of transformers that reads a grid as image tokens, each the sum of a shape's and a colour's vector.

    After the image come the questions, one token each, and there it says the colours: `(B, questions, colours)`.
    """

    def __init__(self, task: GridRecall, language: Any) -> None:
        super().__init__()
        dim = language.config.hidden_size
        self.language = language
        self.shapes = nn.Embedding(1 + task.shapes, dim)
        self.colours = nn.Embedding(task.colours, dim)
        self.questions = nn.Embedding(task.shapes, dim)
        self.head = nn.Linear(dim, task.colours, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)

    def get_decoder(self) -> nn.Module:
        """The part that edits of a decoder are about."""
        decoder: nn.Module = self.language
        return decoder

    def forward(self, grid: Grid) -> Tensor:
        image = self.shapes(grid.kinds) + self.colours(grid.tints) * (grid.kinds > 0)[..., None]
        x = torch.cat((image, self.questions(grid.asked)), 1)
        states = self.language(inputs_embeds=x).last_hidden_state
        return self.head(states[:, image.shape[1] :])


@dataclass(frozen=True)
class GridRecall:
    """`shapes` shapes in random colours at random places of a grid of side² tokens, the rest of it empty."""

    side: int = 12
    shapes: int = 16
    colours: int = 6
    questions: int = 8

    def image(self) -> Tensor:
        """Which tokens are the image's, bool `(side² + questions)`."""
        return torch.arange(self.side**2 + self.questions) < self.side**2

    def draw(self, count: int, generator: torch.Generator) -> Grid:
        """`count` grids."""
        cells = torch.rand(count, self.side**2, generator=generator).argsort(-1)[:, : self.shapes]
        colours = torch.randint(self.colours, (count, self.shapes), generator=generator)
        empty = torch.zeros(count, self.side**2, dtype=torch.long)
        asked = torch.rand(count, self.shapes, generator=generator).argsort(-1)[:, : self.questions]
        return Grid(
            empty.scatter(1, cells, 1 + torch.arange(self.shapes).expand(count, -1)),
            empty.scatter(1, cells, colours),
            asked,
            colours.gather(1, asked),
            cells.gather(1, asked),
        )

    def reader(self, *, base: float = 100.0, dim: int = 64, heads: int = 4, depth: int = 1, seed: int = 0) -> Reader:
        """An untrained decoder with rotary positions of a base: 100 turns the slowest pair by 2.6 over 144 tokens."""
        import transformers

        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=depth,
            num_attention_heads=heads, num_key_value_heads=heads,
            rope_parameters={"rope_type": "default", "rope_theta": base},
        )  # fmt: skip
        return Reader(self, transformers.LlamaModel(config))

    def train(self, reader: Reader, *, steps: int = 120, batch: int = 32, lr: float = 3e-3, seed: int = 0) -> Reader:
        """Teach the reader; steer it meanwhile to teach it under other positions. Returned in eval mode."""
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(reader.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
        reader.train()
        for _ in range(steps):
            grid = self.draw(batch, generator)
            loss = cross_entropy(reader(grid).flatten(0, 1), grid.answers.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        return reader.eval()

    @torch.no_grad()
    def right(self, reader: Reader, *, bands: int = 3, count: int = 300, seed: int = 1) -> list[float]:
        """The share of right answers by where the shape is: `bands` bands of rows, the top first."""
        grid = self.draw(count, torch.Generator().manual_seed(seed))
        hits = reader(grid).argmax(-1) == grid.answers
        band = grid.cells // self.side * bands // self.side
        return [float(hits[band == b].float().mean()) for b in range(bands)]
