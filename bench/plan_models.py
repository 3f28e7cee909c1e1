"""The model that is planned for: a transformer of a size, or whatever a function of the user makes."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from gradwire.bench.errors import UsageError
from gradwire.bench.model import VOCABULARY, ByteTransformer, nats_per_byte
from gradwire.comm.planner_rehearsal import Shapes

_HEAD = 64  # width of an attention head
_CONTEXT = 256
_WHOLE = 20_000_000  # parameters up to which all layers are measured


@final
@dataclass(frozen=True)
class Model:
    """What is planned for.

    Args:
        name: In words.
        shapes: Of the trained parameters.
        tokens: Of a step on one rank; None where a user's module does not say.
        parts: What is to be measured: functions that make a module and the loss of a step, and how often their time
            counts.
    """

    name: str
    shapes: Shapes
    tokens: int | None
    parts: tuple[tuple[Callable[[], tuple[nn.Module, Callable[[], Tensor]]], float], ...]

    @property
    def parameters(self) -> int:
        """Entries of all trained tensors."""
        return sum(torch.Size(shape).numel() for _, shape in self.shapes)


def transformer(parameters: int, tokens: int, device: torch.device, layers: int = 0, width: int = 0) -> Model:
    """A decoder-only transformer of about this size, 64 times as wide as deep; its layers all take the same time.

    Args:
        parameters: >= 1.
        tokens: Of a step on one rank, >= 1.
        device: Where it is trained.
        layers: Set both this and `width` to choose the shape, too.
        width: A multiple of 64, or below it a power of two >= 8.
    """
    if not (layers and width):
        width = max(_HEAD, round((parameters * _HEAD / 12) ** (1 / 3) / _HEAD) * _HEAD)
        layers = max(1, round((parameters - VOCABULARY * width) / (12 * width**2)))
    heads = max(1, width // _HEAD) if width >= 2 * _HEAD else 4
    with torch.device("meta"):
        whole = ByteTransformer(layers, width, heads)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in whole.named_parameters()]
    context = min(_CONTEXT, tokens)

    def of_layers(count: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = ByteTransformer(count, width, heads).to(device)
        text = torch.randint(VOCABULARY, (max(1, tokens // context), context), device=device)
        return model, lambda: nats_per_byte(model(text), text)

    measured = layers if sum(torch.Size(shape).numel() for _, shape in shapes) <= _WHOLE else min(layers, 2)
    parts: tuple[tuple[Callable[[], tuple[nn.Module, Callable[[], Tensor]]], float], ...]
    parts = ((lambda: of_layers(measured), 1.0),)
    if measured < layers:  # the time of two, and that of the second as often as it is missing
        parts = ((lambda: of_layers(2), 1.0 + (layers - 2)), (lambda: of_layers(1), -float(layers - 2)))
    model = Model("", shapes, tokens, parts)
    name = f"transformer of {model.parameters / 1e6:.3g} M parameters ({layers} layers, width {width})"
    return Model(name, shapes, tokens, parts)


def of_factory(text: str, tokens: int | None) -> Model:
    """What `package.module:factory` makes: a module and a function without arguments that returns a loss, or a module.

    Raises:
        UsageError: There is no such module or function, or it returns something else.
    """
    name, colon, attribute = text.partition(":")
    if not colon or not name or not attribute:
        raise UsageError(f"--model: expected package.module:function, got {text!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # what the user works on, behind everything that is installed
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except ImportError as error:
        raise UsageError(f"--model: expected a module that can be imported, got {name!r}: {error}.") from None
    except AttributeError:
        raise UsageError(
            f"--model: expected a function of {name}, got {attribute!r}, which it does not have."
        ) from None
    made = factory()
    module: Any = made[0] if isinstance(made, tuple) and len(made) == 2 else made
    if not isinstance(module, nn.Module) or (isinstance(made, tuple) and not callable(made[1])):
        raise UsageError(
            f"--model: expected {text} to return a module, or a module and a function that returns its loss, "
            f"got {type(made).__name__}."
        )
    shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters() if p.requires_grad]
    if not shapes:
        raise UsageError(f"--model: expected {text} to return a module with parameters to train, got none.")
    parts = ((lambda: made, 1.0),) if isinstance(made, tuple) else ()
    return Model(
        f"{text}, {sum(torch.Size(s).numel() for _, s in shapes) / 1e6:.3g} M parameters", shapes, tokens, parts
    )
