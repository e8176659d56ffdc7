"""Scenes of coloured shapes and questions about them: a tiny LLaVA that trains in seconds, and has its habits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PAD, BEGIN, IMAGE, ASK, END = 0, 1, 2, 3, 4


class Scene(NamedTuple):
    """A batch of scenes, each with one question."""

    pixels: Tensor  # (B, 3, height, width)
    ids: Tensor  # (B, T): begin, image tokens, ask, the shape in question
    answers: Tensor  # (B): the token of the colour that the shape has in this image
    habits: Tensor  # (B): the token of the colour that this shape mostly has
    cells: Tensor  # (B): where the shape is, row-major

    def inputs(self) -> dict[str, Tensor]:
        """What a LLaVA takes."""
        return {"input_ids": self.ids, "pixel_values": self.pixels}

    def where(self, mask: Tensor) -> Scene:
        """The scenes that `mask (B)` marks."""
        return Scene(*(x[mask] for x in self))


@dataclass(frozen=True)
class Scenes:
    """Images of a grid whose cells hold one shape each, in a colour: which colour has this shape?

    Each shape has a usual colour, which it has in a share `habit` of the scenes; so the question alone answers most,
    and where the image says otherwise, saying the usual colour is a hallucination. A cell is a patch of pixels: the
    shape as a pattern of light, the colour as its tint, both under noise; a cell that is covered is black.

    Args:
        grid: rows and columns of cells.
        colours: how many colours there are.
        patch: the side of a cell in pixels.
        habit: how often a shape has its usual colour in training.
        tint, noise: of the colour and of the pixels, against a light of 1.
        dark: the least light that falls on a cell, the most being 1.
        covered: the share of cells of which nothing is seen, not even noise.
    """

    grid: tuple[int, int] = (4, 4)
    colours: int = 6
    patch: int = 4
    habit: float = 0.8
    tint: float = 0.5
    noise: float = 0.25
    dark: float = 1.0
    covered: float = 0.0

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def vocabulary(self) -> int:
        return END + 1 + self.cells + self.colours

    def shape_token(self, shape: int | Tensor) -> Any:
        return END + 1 + shape

    def colour_token(self, colour: int | Tensor) -> Any:
        return END + 1 + self.cells + colour

    def usual(self) -> Tensor:
        """The usual colour of each shape."""
        return torch.arange(self.cells) % self.colours

    def glyphs(self) -> Tensor:
        """The pattern of light of each shape `(cells, patch, patch)`: half of the pixels, chosen by chance."""
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(self.cells, self.patch**2, generator=generator).argsort(-1)
        return (order < self.patch**2 // 2).float().view(-1, self.patch, self.patch)

    def tints(self) -> Tensor:
        """The colours `(colours, 3)`: as far apart as they go, with a mean of 0."""
        generator = torch.Generator().manual_seed(1)
        points = torch.nn.functional.normalize(torch.randn(self.colours, 3, generator=generator), dim=-1)
        for _ in range(200):
            away = points[:, None] - points
            away = away / away.square().sum(-1, keepdim=True).add(1e-3)
            points = torch.nn.functional.normalize(points + 0.05 * away.sum(1), dim=-1)
        return points

    def draw(self, count: int, generator: torch.Generator, *, habit: float | None = None, questions: int = 1) -> Scene:
        """`count` scenes; `habit=0` gives none but those against the habit.

        Of several `questions` about a scene, all but the last are answered in its ids.
        """
        habit, cells = self.habit if habit is None else habit, self.cells
        if not 0 <= habit <= 1 or not 1 <= questions <= cells:
            raise ValueError(f"habit must lie in 0 to 1, questions in 1 to {cells}, got {habit} and {questions}")
        shapes = torch.rand(count, cells, generator=generator).argsort(-1)  # the shape in each cell
        usual = self.usual()[shapes]
        other = (usual + torch.randint(1, self.colours, (count, cells), generator=generator)) % self.colours
        colours = torch.where(torch.rand(count, cells, generator=generator) < habit, usual, other)
        patches = self.glyphs()[shapes][:, :, None] * (1 + self.tint * self.tints()[colours][..., None, None])
        light = self.dark + (1 - self.dark) * torch.rand(count, cells, 1, 1, 1, generator=generator)
        patches = light * patches + self.noise * torch.randn(patches.shape, generator=generator)
        patches = patches * (torch.rand(count, cells, 1, 1, 1, generator=generator) >= self.covered)
        rows, columns = self.grid
        pixels = patches.view(count, rows, columns, 3, self.patch, self.patch)
        pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, rows * self.patch, columns * self.patch)
        asked = torch.rand(count, cells, generator=generator).argsort(-1)[:, :questions]
        shape, colour = shapes.gather(1, asked), colours.gather(1, asked)
        turns = torch.stack((torch.full_like(shape, ASK), self.shape_token(shape), self.colour_token(colour)), -1)
        ids = torch.full((count, 1 + cells), IMAGE)
        ids[:, 0] = BEGIN
        ids = torch.cat((ids, turns.flatten(1)[:, :-1]), 1)
        return Scene(
            pixels, ids, turns[:, -1, -1], self.colour_token(self.usual()[shape[:, -1]]), asked[:, -1]
        )  # fmt: skip

    def llava(self, *, dim: int = 64, depth: int = 3, heads: int = 4, seed: int = 0, **text: Any) -> Any:
        """An untrained LLaVA of transformers for these scenes, from a config; keywords go to its `LlamaConfig`."""
        import transformers

        rows, columns = self.grid
        if rows != columns:
            raise ValueError(f"a LLaVA's images are square, got a grid of {rows} × {columns}")
        torch.manual_seed(seed)
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                image_size=rows * self.patch, patch_size=self.patch,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=self.vocabulary, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=depth,
                num_attention_heads=heads, num_key_value_heads=heads, pad_token_id=PAD, bos_token_id=BEGIN,
                eos_token_id=END, **text,
            ),
            image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip
        model = transformers.LlavaForConditionalGeneration(config)
        for p in model.parameters():
            if p.dim() > 1:  # the usual 0.02 leaves attention near uniform for hundreds of steps at this width
                torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        return model

    def train(
        self, model: Any, *, steps: int = 300, batch: int = 48, questions: int = 6, lr: float = 3e-3, seed: int = 0
    ) -> Any:
        """Teach `model`, a LLaVA, on clear images, then on these, then with the habit: it is returned in eval mode."""
        clear = replace(self, noise=self.noise / 4, dark=1.0, covered=0.0)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
        model.train()
        for step in range(steps):
            habit = 1 / self.colours if step < 0.7 * steps else self.habit
            scene = (clear if step < 0.4 * steps else self).draw(batch, generator, habit=habit, questions=questions)
            asking = (scene.ids > END) & (scene.ids <= END + self.cells)
            answers = torch.cat((scene.ids[:, 1:], scene.answers[:, None]), 1)[asking]
            loss = cross_entropy(model(**scene.inputs()).logits[asking], answers)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        return model.eval()
