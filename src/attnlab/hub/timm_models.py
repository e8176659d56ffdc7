"""Every backbone of attnlab under its name in timm: `timm.create_model("attnlab/focalnet_tiny_srf", …)`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from attnlab import cards
from attnlab.models.skeletons.features import Features

__all__ = ["TimmFeatures", "TimmNetwork", "register_timm"]

# Filled by `register_timm`; timm looks for it in the module of each registered function.
default_cfgs: dict[str, Any] = {}

PREFIX = "attnlab/"
# timm's words for what our networks call otherwise.
_WORDS = {"in_chans": "in_channels", "drop_path_rate": "drop_path", "drop_rate": "dropout", "img_size": "image"}
# Names that people say without the receptive field: the smaller one, as in the paper's tables.
_SHORT = {f"focalnet_{size}": f"focalnet_{size}_srf" for size in ("tiny", "small", "base")}


def register_timm() -> list[str]:
    """Make every named size of every backbone known to timm; returns the names.

        attnlab.hub.register_timm()
        model = timm.create_model("attnlab/focalnet_tiny_srf", num_classes=10, drop_path_rate=0.1)
        maps = timm.create_model("attnlab/focalnet_tiny_srf", features_only=True, out_indices=(1, 2, 3))

    timm takes what has a slash for an address of a model hub. So each name is registered with an underscore too
    ("attnlab_focalnet_tiny_srf", which `timm.list_models("attnlab_*")` shows), and timm's parser of names is told
    that what begins with "attnlab/" is a name. There are no weights to download: `pretrained=True` raises, and
    `attnlab.hub.load_official(model.network, path)` reads the authors' checkpoints. Calling this again does no harm.
    """
    try:
        import timm
        from timm.models import _factory, generate_default_cfgs, register_model
    except ImportError as error:
        raise ImportError("register_timm needs timm: pip install 'attnlab[vision]'") from error
    sizes = {size: entry for entry in cards.entries() if entry.card.kind is cards.BACKBONE for size in entry.card.sizes}
    sizes |= {short: sizes[name] for short, name in _SHORT.items() if name in sizes and short not in sizes}
    found = []
    for name, entry in sorted(sizes.items()):
        for registered in (PREFIX + name, PREFIX.replace("/", "_") + name):
            found.append(registered)
            if not timm.is_model(registered):
                default_cfgs.update(generate_default_cfgs({registered: _facts(_SHORT.get(name, name), entry)}))
                register_model(_entry_point(registered, _SHORT.get(name, name)))
    _let_slashes_pass(_factory)
    return found


def _let_slashes_pass(factory: Any) -> None:
    parse = factory.parse_model_name
    if getattr(parse, "knows_attnlab", False):
        return

    def parse_model_name(model_name: str) -> Any:
        return (None, model_name) if model_name.startswith(PREFIX) else parse(model_name)

    parse_model_name.knows_attnlab = True  # type: ignore[attr-defined]
    factory.parse_model_name = parse_model_name


def _facts(name: str, entry: cards.Entry) -> dict[str, Any]:
    """What timm keeps of a network beside its weights."""
    from attnlab.models.flops import counted

    arguments, known = entry.card.sizes[name].arguments, counted().get(name)
    height, width = known.size if known else (224, 224)
    return dict(
        input_size=(arguments.get("in_channels", 3), height, width),
        fixed_input_size="image" in inspect.signature(entry.target).parameters,
        num_classes=arguments.get("num_classes", 1000),
        classifier="network.head",
        paper_name=entry.card.title,
        paper_ids=f"arXiv:{entry.card.paper}",
    )


def _entry_point(registered: str, name: str) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        **keywords: Any,
    ) -> nn.Module:
        from timm.models._builder import resolve_pretrained_cfg

        if pretrained:
            raise ValueError(
                f"pretrained must be False: no weights of {registered} are hosted; build it, then "
                "attnlab.hub.load_official(model.network, path) reads the authors' checkpoint"
            )
        facts = resolve_pretrained_cfg(registered, pretrained_cfg, pretrained_cfg_overlay).to_dict()
        if not features_only and out_indices is not None:
            raise ValueError("out_indices goes with features_only=True")
        if isinstance(out_indices, int):  # timm: the last so many
            out_indices = range(-out_indices, 0)
        options = {"features_only": True, "out_indices": out_indices} if features_only else {}
        network = _built(name, keywords, options)
        return (
            TimmFeatures(network, facts) if features_only else TimmNetwork(network, facts, keywords.get("num_classes"))
        )

    create.__name__ = create.__qualname__ = registered
    create.__doc__ = f"attnlab's {name}."
    return create


def _built(name: str, keywords: dict[str, Any], options: dict[str, Any]) -> Any:
    theirs = {ours: word for word, ours in _WORDS.items()}
    try:
        return cards.build(name, **options, **{_WORDS.get(word, word): value for word, value in keywords.items()})
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None:
            raise
        raise ValueError(f"{name} takes no {theirs.get(refused[1], refused[1])}, got {keywords}") from error


def _feature_info(channels: Sequence[int], reductions: Sequence[int], modules: Sequence[str]) -> list[dict[str, Any]]:
    return [
        dict(num_chs=channel, reduction=reduction, module=module)
        for channel, reduction, module in zip(channels, reductions, modules, strict=True)
    ]


def _modules(network: nn.Module, count: int) -> list[str]:
    """The modules that give the maps, where they are stages; the network itself where not."""
    stages = getattr(network, "stages", None)
    if isinstance(stages, nn.ModuleList) and len(stages) == count:
        return [f"network.stages.{i}" for i in range(count)]
    return ["network"] * count


class TimmNetwork(nn.Module):
    """One of our backbones as timm's scripts expect a model: images to logits, its maps, its head, its facts.

    `network` is the backbone itself, with its own state_dict. `feature_info` lists the maps that
    `forward_features` of the backbone gives, of which the method here gives the last.
    """

    def __init__(self, network: nn.Module, facts: dict[str, Any], num_classes: int | None = None) -> None:
        super().__init__()
        self.network = network
        ours: Any = network
        channels: Sequence[int] = getattr(ours, "channels", ())
        reductions: Sequence[int] = getattr(ours, "reductions", ())
        modules = _modules(network, len(channels))
        self.feature_info = _feature_info(channels, reductions, modules) if len(channels) == len(reductions) else []
        head = getattr(network, "head", None)
        known = facts["num_classes"] if num_classes is None else num_classes
        self.num_classes: int = head.out_features if isinstance(head, nn.Linear) else known
        self.num_features = head.in_features if isinstance(head, nn.Linear) else channels[-1] if channels else 0
        self.head_hidden_size = self.num_features
        self.pretrained_cfg = self.default_cfg = {**facts, "num_classes": self.num_classes}

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, `(B, C, h, w)`."""
        return self.network.forward_features(x)[-1]  # type: ignore[operator]

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits from the last map."""
        if not hasattr(self.network, "forward_head"):
            raise ValueError(f"{type(self.network).__name__} has no head apart: call the model")
        return self.network.forward_head(x)  # type: ignore[operator]

    def get_classifier(self) -> nn.Module:
        head = getattr(self.network, "head", None)
        if not isinstance(head, (nn.Linear, nn.Identity)):
            raise ValueError(f"{type(self.network).__name__} has no linear classifier")
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for so many classes (0: none, the pooled features)."""
        old = self.get_classifier()
        where = next(self.network.parameters())
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.network.head = fresh.to(where.device, where.dtype).train(old.training)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        return set()


class TimmFeatures(nn.Module):
    """The maps of a backbone: images → `[(B, C, h, w), …]`, as timm's `features_only=True` gives them."""

    def __init__(self, features: Features, facts: dict[str, Any]) -> None:
        super().__init__()
        from timm.models._features import FeatureInfo

        self.network, self.out_indices = features.network, features.out_indices
        ours: Any = self.network
        info = _feature_info(ours.channels, ours.reductions, _modules(ours, len(ours.channels)))
        self.feature_info = FeatureInfo(info, self.out_indices)
        self.pretrained_cfg = self.default_cfg = facts

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.forward_features(x)  # type: ignore[operator]
        return [maps[i] for i in self.out_indices]
