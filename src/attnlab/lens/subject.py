"""Whose attention is looked at: a model by its folder or name, with what must be known to feed it.

May import hub, timm and transformers, at first use.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from attnlab.torchvision_schemas import declare

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(eq=False)
class Subject:
    """A model, in evaluation mode, and what it reads.

    takes: "image", "text" or "both"; size (channels, height, width) of an image, which is then less `mean` over `std`;
    vocabulary: ids of a text; longest: tokens that it has positions for. random: its weights are.
    """

    model: nn.Module
    name: str
    home: str  # "transformers", "timm" or "attnlab"
    takes: str
    random: bool = True
    size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    vocabulary: int | None = None
    longest: int | None = None
    config: Any = None
    tokenizer: Any = None
    processor: Any = None
    notes: list[str] = field(default_factory=list)


def load(name: str, *, weights: Path | None = None, seed: int = 0) -> Subject:
    """The model that `name` says: a folder with a config.json (of transformers or timm), or a name of attnlab or timm.

    A folder without weights, or a name, gives random weights from `seed`; `weights` is a file to read them from
    (safetensors, or torch's without running pickled code). Nothing is downloaded. "timm:davit_tiny" and
    "attnlab:davit_tiny" say whose a name is that both have; without, timm's goes first.

    Raises:
        ValueError: there is no such model, or the file does not fit it; FileNotFoundError: there is no such folder.
    """
    path = Path(name).expanduser()
    torch.manual_seed(seed)
    if path.is_dir():
        subject = _of_folder(path, seed)
    elif path.is_file():
        raise ValueError(f"model: {name} is a file; give the model's name or folder, and weights with --weights {name}")
    else:
        subject = _of_name(name)
    if weights is not None:
        _fill(subject, Path(weights))
    if subject.random:
        subject.notes.append(f"The weights are random (seed {seed}): this is how the model attends before training.")
    subject.model.eval()
    return subject


def _of_folder(folder: Path, seed: int) -> Subject:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: {folder} has no config.json, which says what model it is")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model: {path} is corrupt: {error}") from None
    if isinstance(config, dict) and "model_type" in config:
        return _transformers(folder, config)
    if isinstance(config, dict) and "architecture" in config:
        arguments = {**config.get("model_args", {})}
        if "num_classes" in config:
            arguments["num_classes"] = config["num_classes"]
        subject = _timm(str(config["architecture"]), **arguments)
        found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if found:
            _fill(subject, found[0])
        return subject
    raise ValueError(f"model: {path} names neither a model_type (transformers) nor an architecture (timm)")


def _transformers(folder: Path, raw: Mapping[str, Any]) -> Subject:
    package = imported("transformers", "hf")
    _quiet(package)
    try:
        # Code that comes with a folder is not run.
        config = package.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = getattr(package, (raw.get("architectures") or [""])[0], None)
        kind: Any = named if isinstance(named, type) and issubclass(named, nn.Module) else package.AutoModel
        has_weights = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
        if has_weights:
            model = kind.from_pretrained(folder, local_files_only=True)
        elif kind is package.AutoModel:
            model = kind.from_config(config)
        else:
            model = kind._from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"model: transformers cannot build {folder}: {_first_line(error)}") from error
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    both = text is not config and vision is not config
    side = getattr(vision, "image_size", None)
    vocabulary = getattr(text, "vocab_size", None)
    takes = "both" if both else "image" if side is not None and vocabulary is None else "text"
    subject = Subject(model, folder.name, "transformers", takes, not has_weights, config=config, vocabulary=vocabulary)
    if side is not None:
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        subject.size = (getattr(vision, "num_channels", 3), int(height), int(width))
    longest = next((x for n in ("max_position_embeddings", "n_positions") if (x := getattr(text, n, None))), None)
    # A BERT-like table of positions may begin after the padding's.
    subject.longest = longest if isinstance(longest, int) else None
    seen = _json(folder / "preprocessor_config.json")
    subject.mean = tuple(seen.get("image_mean") or subject.mean)
    subject.std = tuple(seen.get("image_std") or subject.std)
    if any((folder / name).is_file() for name in _TOKENIZER):
        try:
            subject.tokenizer = package.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a tokenizer's own reader raises
            raise ValueError(f"model: the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
    if both and seen and subject.tokenizer is not None:
        try:
            subject.processor = package.AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            subject.notes.append(f"The folder's processor cannot be used ({_first_line(error)}).")
    return subject


def _of_name(name: str) -> Subject:
    from attnlab import cards

    if "/" in name or name.startswith((".", "~")):
        raise FileNotFoundError(f"model: there is no folder {name} (and nothing is downloaded)")
    home, _, short = name.partition(":")
    if home in ("timm", "attnlab") and short:
        return _timm(short) if home == "timm" else _attnlab(short)
    try:
        theirs = set(imported("timm", "vision").list_models())
    except ImportError:
        theirs = set()
    if name.split(".")[0] in theirs:
        return _timm(name.split(".")[0])
    kinds = (cards.BACKBONE, cards.LM)
    ours = {n for e in cards.entries() if e.card.kind in kinds for n in (e.card.name, *e.card.sizes)}
    if name in ours:
        return _attnlab(name)
    near = difflib.get_close_matches(name, ours | theirs, n=3)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"model: {name!r} is no folder, no network of attnlab (attnlab list) and no model of "
        f"{'timm' if theirs else 'timm, which is not installed'}{hint}"
    )


def _attnlab(name: str) -> Subject:
    from attnlab import cards

    card = cards.describe(name)
    if card.kind not in (cards.BACKBONE, cards.LM):
        raise ValueError(f"model: {name!r} is a {card.kind.value}, and a network is wanted: a backbone or an lm")
    model = cards.build(name, **({} if name in card.sizes else card.sample))
    if card.kind is cards.LM:
        vocabulary = getattr(model, "vocabulary", None)
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
        count = vocabulary if isinstance(vocabulary, int) else embedding.num_embeddings if embedding else None
        longest = getattr(model, "length", None)
        return Subject(
            model, name, "attnlab", "text", vocabulary=count, longest=longest if isinstance(longest, int) else None
        )
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    size = card.sizes.get(name)
    if size is None:
        height, width = card.probe if len(card.probe) == 2 else (224, 224)
    else:
        given = size.arguments.get("image", size.image or 224)
        height, width = (given, given) if isinstance(given, int) else given
    return Subject(model, name, "attnlab", "image", size=(channels, height, width))


def _timm(name: str, **arguments: Any) -> Subject:
    package = imported("timm", "vision")
    if not package.is_model(name):
        near = difflib.get_close_matches(name, package.list_models(), n=3)
        raise ValueError(f"model: timm has no {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    # timm has fused attention that it does not use by itself (of windows); attention by hand cannot be seen.
    package.layers.set_fused_attn(True, experimental=True)
    try:
        model = package.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"model: timm cannot build {name}: {_first_line(error)}") from error
    finally:
        package.layers.set_fused_attn(True)
    about = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(about.get("input_size") or (3, 224, 224))
    # A model built for another size says so in its patches.
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(side, (tuple, list)) and len(side) == 2:
        size = (size[0], int(side[0]), int(side[1]))
    return Subject(
        model, name, "timm", "image", size=size,
        mean=tuple(about.get("mean") or (0.5,)), std=tuple(about.get("std") or (0.5,)),
    )  # fmt: skip


def _fill(subject: Subject, path: Path) -> None:
    """Weights from a file, as the model itself saves them or, of attnlab's networks, as their authors did."""
    from attnlab.hub.checkpoints import load_official, read

    state = read(path)
    wanted = subject.model.state_dict()
    if state.keys() == wanted.keys() and all(state[n].shape == t.shape for n, t in wanted.items()):
        subject.model.load_state_dict(state)
    elif subject.home == "attnlab":
        load_official(subject.model, path)
    else:
        missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        other = [n for n in sorted(wanted.keys() & state.keys()) if wanted[n].shape != state[n].shape]
        lists = (("missing:", missing), ("left over:", unknown), ("of other shape:", other))
        parts = [f"{what} {', '.join(x[:3])}{' …' * (len(x) > 3)}" for what, x in lists if x]
        raise ValueError(f"weights: {path} does not fit {subject.name}; {'; '.join(parts)}")
    subject.random = False


def imported(name: str, extra: str) -> ModuleType:
    """The package, or ImportError with the extra that brings it."""
    declare()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs the package {name!r}: pip install 'attnlab[{extra}]'") from error


def _quiet(package: Any) -> None:
    """Progress bars and reports of loading are not for a page's reader."""
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
