"""What a model is shown: a text, images or tensors, made into what it takes, with names for the tokens."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.lens.subject import Subject

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TENSORS = (".safetensors", ".npy", ".pt", ".pth")
TEXTS = (".txt", ".md", ".rst", ".py", ".json", ".csv")
MOST_TOKENS = 2048  # of a text, on one page
_SHOWN = 448  # pixels of the image on the page


@dataclass(eq=False)
class Shown:
    """Inputs of a model as keywords or as its one argument, and what a page says of them.

    tokens: labels of text tokens, one list for each length of sequence that has names. image: a data URL of the first
    image. labels: true classes. patches: where in a mixed sequence the image's tokens begin, and their grid.
    """

    inputs: Tensor | dict[str, Any]
    what: str
    tokens: list[tuple[str, ...]] = field(default_factory=list)
    image: str | None = None
    count: int = 1
    labels: Tensor | None = None
    patches: tuple[int, tuple[int, int]] | None = None
    notes: list[str] = field(default_factory=list)


def read(
    subject: Subject, given: str, *, prompt: str = "", most: int | None = None, labels: Sequence[int] = ()
) -> Shown:
    """What `given` is to the model: a text or a text file; an image file or a folder of them; a tensor file.

    Args:
        prompt: the text beside an image, for a model that reads both; for an encoder-decoder, how the answer begins.
        most: a text is cut after so many tokens (2,048 if not given). labels: true classes of the images.
    """
    kind, path = _kind(given)
    if kind == "tensor":
        shown = _tensors(subject, path)
    elif kind == "image":
        shown = _both(subject, path, prompt) if _is_multimodal(subject) else _images(subject, path)
    else:
        shown = _text(subject, given if kind == "text" else _text_of(path), prompt, most)
    if labels:
        shown.labels = torch.tensor(list(labels))
        if len(labels) != shown.count:
            raise ValueError(f"labels: {len(labels)} were given for {shown.count} inputs")
    return shown


def _kind(given: str) -> tuple[str, Path]:
    path = Path(given).expanduser() if len(given) < 1000 and "\n" not in given else Path()
    ending = path.suffix.lower()
    if path != Path() and path.is_dir():
        return "image", path
    if path != Path() and path.is_file():
        return ("image" if ending in IMAGES else "tensor" if ending in TENSORS else "text file"), path
    if ending in (*IMAGES, *TENSORS, *TEXTS) and " " not in given.strip():
        raise FileNotFoundError(f"input: there is no file {given}")
    if not given.strip():
        raise ValueError("input: the text is empty")
    return "text", path


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        endings = ", ".join((*IMAGES, *TENSORS))
        raise ValueError(f"input: {path} is neither text in UTF-8 nor a file that ends in {endings}") from None
    if not text.strip():
        raise ValueError(f"input: {path} is empty")
    return text


# Text


def _text(subject: Subject, text: str, prompt: str, most: int | None) -> Shown:
    if subject.takes == "image":
        raise ValueError(f"input: {subject.name} reads images, and this is a text: {text[:40]!r}")
    if subject.vocabulary is None:
        raise ValueError(f"input: {subject.name} does not say how many token ids it knows: give ids as a tensor file")
    ids, labels, notes = _ids(subject, text)
    limit = most or MOST_TOKENS
    if len(ids) > limit:
        notes.append(f"The text has {len(ids):,} tokens; the first {limit:,} are shown.")
        ids, labels = ids[:limit], labels[:limit]
    _check_ids(subject, torch.tensor(ids))
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    tokens = [tuple(labels)]
    if getattr(subject.config, "is_encoder_decoder", False):
        start = getattr(subject.config, "decoder_start_token_id", None) or 0
        more, names, _ = _ids(subject, prompt) if prompt else ([], [], [])
        inputs["decoder_input_ids"] = torch.tensor([[start, *more]])
        tokens.append(("[start]", *names))
    whole = inputs["input_ids"] if subject.home == "attnlab" else inputs
    return Shown(whole, f"text of {len(ids):,} tokens", tokens, notes=notes)


def _ids(subject: Subject, text: str) -> tuple[list[int], list[str], list[str]]:
    """Token ids, their labels, and what must be said of them."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        if subject.vocabulary is None or subject.vocabulary < 256:
            raise ValueError(
                f"input: {subject.name} knows {subject.vocabulary} token ids and has no tokenizer: "
                "give ids as a tensor file"
            )
        raw = text.encode()
        labels = [chr(b) if 32 <= b < 127 or b == 10 else f"\\x{b:02x}" for b in raw]
        return list(raw), labels, ["There is no tokenizer: the text is read as bytes."]
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("input: the tokenizer makes no tokens of this text")
    return ids, [_label(tokenizer, i) for i in ids], []


def _label(tokenizer: Any, token: int) -> str:
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return piece.replace("▁", " ") if "▁" in piece else tokenizer.decode([token]) or piece


def _check_ids(subject: Subject, ids: Tensor) -> None:
    if (
        subject.vocabulary is not None
        and ids.numel()
        and not 0 <= int(ids.min()) <= int(ids.max()) < subject.vocabulary
    ):
        raise ValueError(
            f"input: token ids must be from 0 to {subject.vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    if subject.longest is not None and ids.shape[-1] > subject.longest:
        raise ValueError(
            f"input: {ids.shape[-1]:,} tokens, but {subject.name} has positions for {subject.longest:,}: "
            f"cut it with --tokens {subject.longest}"
        )


# Images


def _is_multimodal(subject: Subject) -> bool:
    tokens = (getattr(subject.config, name, None) for name in ("image_token_id", "image_token_index"))
    return subject.takes == "both" and any(token is not None for token in tokens)


def _images(subject: Subject, path: Path) -> Shown:
    if subject.takes == "text" or subject.size is None:
        raise ValueError(f"input: {subject.name} reads text, and {path} is an image")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        if not files:
            raise ValueError(f"input: there are no images in {path} ({', '.join(IMAGES)})")
    stacked = torch.stack([_pixels(_open(file, subject.size), subject) for file in files])
    inputs = {"pixel_values": stacked} if subject.home == "transformers" else stacked
    what = path.name if len(files) == 1 else f"{len(files)} images of {path.name}"
    notes = [f"{files[0].name} is shown; importance, distance and patterns are of all {len(files)}."] * (len(files) > 1)
    return Shown(inputs, what, image=_displayed(files[0], subject.size), count=len(files), notes=notes)


def _open(path: Path, size: tuple[int, int, int]) -> Any:
    """The middle of an image, at the model's size."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("L" if size[0] == 1 else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"input: {path} is no readable image: {error}") from None
    return ImageOps.fit(image, (size[2], size[1]), Image.Resampling.BICUBIC)


def _displayed(path: Path, size: tuple[int, int, int]) -> str:
    """The same part of it for the page, finer than a small model sees it."""
    finer = max(1.0, _SHOWN / max(size[1:]))
    return data_url(_open(path, (size[0], round(size[1] * finer), round(size[2] * finer))))


def _pixels(image: Any, subject: Subject) -> Tensor:
    values = torch.from_numpy(np.asarray(image, np.float32) / 255)
    values = values[None] if values.ndim == 2 else values.movedim(-1, 0)
    channels = subject.size[0] if subject.size else len(values)
    if len(values) != channels:
        raise ValueError(f"input: {subject.name} wants {channels} channels: give images as a tensor file")
    mean, std = (torch.tensor(x)[:, None, None] for x in (subject.mean, subject.std))
    if len(mean) not in (1, channels):
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return (values - mean) / std


def data_url(image: Any) -> str:
    """A PIL image as a JPEG of modest size."""
    image = image.copy()
    if max(image.size) > _SHOWN:
        image.thumbnail((_SHOWN, _SHOWN))
    kept = io.BytesIO()
    image.convert("RGB").save(kept, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(kept.getvalue()).decode()


def _both(subject: Subject, path: Path, prompt: str) -> Shown:
    """An image with a prompt, for a model whose text holds image tokens."""
    from attnlab.lens.multimodal import ask, image_columns, image_grid

    if path.is_dir():
        raise ValueError(f"input: {subject.name} takes one image with a prompt, and {path} is a folder")
    size = subject.size or (3, 224, 224)
    image = _open(path, size)
    question = prompt or "What is in the image?"
    notes = [] if prompt else [f"No --prompt was given: it was asked “{question}”"]
    if subject.processor is not None:
        inputs = ask(subject.model, subject.processor, [image], question)
        labels = [_label(subject.tokenizer, i) for i in inputs["input_ids"][0].tolist()]
    else:
        said, names, more = _ids(subject, question)
        config = subject.config
        token = next(t for n in ("image_token_id", "image_token_index") if (t := getattr(config, n, None)) is not None)
        count = _image_tokens(subject)
        inputs = {
            "input_ids": torch.tensor([[*[token] * count, *said]]),
            "pixel_values": _pixels(image, subject)[None],
        }
        labels, notes = ["[image]"] * count + names, notes + more
        notes.append("There is no processor: the image tokens come first, then the prompt.")
    columns = image_columns(subject.model, inputs["input_ids"])
    start, grid = int(columns[0]), image_grid(subject.model, inputs, len(columns))
    for i, column in enumerate(columns.tolist()):
        labels[column] = f"row {i // grid[1]}, column {i % grid[1]}"
    whole = int(columns[-1]) - start + 1 == len(columns) == grid[0] * grid[1]
    return Shown(
        inputs, f"{path.name} with “{question}”", [tuple(labels)], _displayed(path, size), notes=notes,
        patches=(start, grid) if whole else None,
    )  # fmt: skip


def _image_tokens(subject: Subject) -> int:
    """How many tokens the text has for an image, where nobody but the model's parts say."""
    config, size = subject.config, subject.size
    patch = getattr(config.vision_config, "patch_size", None)
    if size is None or not isinstance(patch, int) or getattr(config, "model_type", "") != "llava":
        raise ValueError(f"input: the folder of {subject.name} has no processor, which says how it reads images")
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return (size[1] // patch) * (size[2] // patch) + whole


# Tensors


def _tensors(subject: Subject, path: Path) -> Shown:
    found, labels = _load(path)
    if not found.is_floating_point():
        if subject.takes == "image":
            raise ValueError(f"input: {subject.name} reads images, and {path} holds token ids ({found.dtype})")
        if found.dim() not in (1, 2):
            raise ValueError(f"input: token ids must be (N,) or (B, N), got {tuple(found.shape)}")
        ids = (found if found.dim() == 2 else found[None]).long()
        _check_ids(subject, ids)
        if ids.shape[1] > MOST_TOKENS:
            raise ValueError(f"input: a page shows {MOST_TOKENS:,} tokens, and {path} holds {ids.shape[1]:,}")
        inputs = ids if subject.home == "attnlab" else {"input_ids": ids}
        return Shown(
            inputs, f"{path.name}, {ids.shape[1]:,} tokens", [tuple(f" {i}" for i in ids[0].tolist())], count=len(ids)
        )
    if subject.takes == "text":
        raise ValueError(f"input: {subject.name} reads text, and {path} holds no integers ({found.dtype})")
    images = (found if found.dim() == 4 else found[None]).float()
    if images.dim() != 4 or (subject.size is not None and images.shape[1] != subject.size[0]):
        channels = subject.size[0] if subject.size else "C"
        raise ValueError(f"input: images must be (B, {channels}, H, W) or without B, got {tuple(found.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError(f"input: {path} holds numbers that are not finite")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"input: labels in {path} must be ({len(images)},), got {tuple(labels.shape)}")
    size = f"{images.shape[2]}×{images.shape[3]}"
    return Shown(
        {"pixel_values": images} if subject.home == "transformers" else images,
        f"{path.name}, {len(images)} image{'s' * (len(images) > 1)} of {size}", image=data_url(_picture(images[0])),
        count=len(images), labels=labels, notes=["The image is shown with its numbers stretched from black to white."],
    )  # fmt: skip


def _picture(values: Tensor) -> Any:
    from PIL import Image

    low, high = values.amin(), values.amax()
    values = ((values - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8)
    values = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
    image = Image.fromarray(values.movedim(0, -1).contiguous().numpy())
    return image.resize((image.width * 8, image.height * 8), Image.Resampling.NEAREST) if image.width < 64 else image


def _load(path: Path) -> tuple[Tensor, Tensor | None]:
    """The tensor in a file, and the labels beside it if there are some."""
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False)), None
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise ValueError(f"input: {path} is no readable array: {error}") from None
    if path.suffix == ".safetensors":
        from attnlab.hub.checkpoints import read as read_tensors

        content: Any = read_tensors(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"input: {path} is corrupt, or holds more than tensors: {str(error)[:160]}") from None
    if isinstance(content, Tensor):
        return content, None
    tensors = {n: x for n, x in content.items() if isinstance(x, Tensor)} if isinstance(content, dict) else {}
    labels = tensors.pop("labels", None)
    known = [n for n in ("images", "pixel_values", "input_ids", "x") if n in tensors]
    if len(tensors) != 1 and not known:
        raise ValueError(
            f"input: {path} must hold one tensor, or one called images or input_ids; got {sorted(tensors)}"
        )
    return tensors[known[0] if known else next(iter(tensors))], labels
