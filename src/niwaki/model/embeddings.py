"""The table of embeddings of a model, and the output layer that may be tied to it: cut, factorised, tied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.edits import Edit
from niwaki.weights import replace_everywhere


class FactorizedEmbedding(nn.Module):
    """E(id) = B a_id: a `table` with rows a of size rank, and a `projection` B (width, rank)."""

    def __init__(self, table: nn.Embedding, projection: nn.Linear) -> None:
        super().__init__()
        self.table = table
        self.projection = projection

    @property
    def weight(self) -> Tensor:
        """The whole table that the factors make, (tokens, width)."""
        return self.table.weight @ self.projection.weight.T

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.projection.out_features

    @property
    def padding_idx(self) -> int | None:
        return self.table.padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        return self.projection(self.table(tokens))


class FactorizedOutput(nn.Module):
    """The output layer that is tied to factorised embeddings: logits = A (B^T h) + bias, with their A and B. Where A is
    stored otherwise than as a plain table, `table` is what multiplies with it."""

    def __init__(self, table: nn.Module, projection: nn.Linear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.table = table
        self.projection = projection
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The weight of the linear that it stands for, (tokens, width)."""
        table: Any = self.table
        weight: Tensor = table.weight @ self.projection.weight.T
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        narrow = functional.linear(hidden, self.projection.weight.T)
        if isinstance(self.table, nn.Embedding):
            return functional.linear(narrow, self.table.weight, self.bias)
        logits: Tensor = self.table(narrow)
        return logits if self.bias is None else logits + self.bias


def table_of(model: Any) -> nn.Embedding:
    """The table of the input embeddings."""
    found = model.get_input_embeddings()
    return found.table if isinstance(found, FactorizedEmbedding) else found


def tables(model: nn.Module) -> list[nn.Embedding]:
    """Every module that looks tokens up: more than one where an encoder and a decoder have their own around the same
    parameter."""
    weight = table_of(model).weight
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]


def is_tied(model: Any) -> bool:
    """Whether the output layer is made of the table of the input embeddings."""
    weight, output = table_of(model).weight, model.get_output_embeddings()
    return output is not None and any(parameter is weight for parameter in output.parameters())


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` wherever `old` stands."""
    new.requires_grad_(old.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new


def configs(model: nn.Module) -> Iterator[Any]:
    """The config of the model, and the copies that parts of it may have (T5's stacks)."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    yield from found.values()


@dataclass(frozen=True, kw_only=True)
class KeepTokens(Edit):
    """Keep only these tokens, numbered anew in their order: in the embeddings, the output layer and the config.
    `tokens`: their old numbers in ascending order, as runs: "0-2,7,9-10"."""

    carried: ClassVar[bool] = False  # the config that is saved counts the tokens that were kept

    tokens: str

    @classmethod
    def of(cls, tokens: Sequence[int]) -> KeepTokens:
        """The edit that keeps these."""
        starts = [token for i, token in enumerate(tokens) if not i or tokens[i - 1] != token - 1]
        ends = [token for i, token in enumerate(tokens) if i + 1 == len(tokens) or tokens[i + 1] != token + 1]
        runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        return cls(tokens=",".join(runs))

    @property
    def numbers(self) -> list[int]:
        """The old number of each token, by its new one."""
        runs = [run.partition("-") for run in self.tokens.split(",")]
        return [token for first, _, last in runs for token in range(int(first), int(last or first) + 1)]

    def apply(self, model: Any) -> None:
        rows = torch.tensor(self.numbers)
        numbers = {old: new for new, old in enumerate(self.numbers)}
        looking, size = tables(model), table_of(model).num_embeddings
        if rows[-1] >= size:
            raise ValueError(f"token {int(rows[-1])}: the model has embeddings for {size}")
        for parameter in vocabulary_parameters(model):
            replace_parameter(model, parameter, nn.Parameter(parameter.detach()[rows.to(parameter.device)]))
        for embedding in looking:
            embedding.num_embeddings = len(rows)
            if embedding.padding_idx is not None:
                embedding.padding_idx = numbers[embedding.padding_idx]
        cut_output(model, rows)
        renumber(model, numbers, size)


def vocabulary_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters with a row for each token: the table, and weight and bias of the output layer."""
    table = table_of(model)
    found: dict[int, nn.Parameter] = {id(table.weight): table.weight}  # type: ignore[dict-item]
    output = model.get_output_embeddings()
    if output is not None:
        own = output.parameters(recurse=False)
        found |= {id(parameter): parameter for parameter in own if len(parameter) == table.num_embeddings}
    return list(found.values())


def cut_output(model: Any, rows: Tensor) -> None:
    """What the output layer has beside its parameters."""
    output = model.get_output_embeddings()
    if isinstance(output, nn.Linear):
        output.out_features = len(rows)
    bias = getattr(model, "final_logits_bias", None)  # BART's, a buffer
    if bias is not None:
        model.final_logits_bias = bias[:, rows.to(bias.device)]


def renumber(model: Any, numbers: Mapping[int, int], size: int) -> None:
    """The counts of tokens, and the numbers of special ones, in modules, configs and the settings for generation."""
    for module in model.modules():
        if getattr(module, "vocab_size", None) == size:
            module.vocab_size = len(numbers)
        table = isinstance(module, nn.Embedding | FactorizedEmbedding)
        if not table and isinstance(getattr(module, "padding_idx", None), int):
            module.padding_idx = numbers.get(module.padding_idx, module.padding_idx)
    for config in configs(model):
        config.vocab_size = len(numbers)
        renumber_fields(config, numbers, size)
    if getattr(model, "generation_config", None) is not None:
        renumber_fields(model.generation_config, numbers, size)


def renumber_fields(settings: Any, numbers: Mapping[int, int], size: int) -> None:
    """Every `..._token_id` of a config, one number or a list; those beyond the vocabulary mean nothing, and stay."""
    for name, value in token_fields(settings):
        if isinstance(value, list):
            setattr(settings, name, [numbers[one] for one in value if one in numbers] or None)
        elif value < size:
            setattr(settings, name, numbers.get(value))


def token_fields(settings: Any) -> list[tuple[str, Any]]:
    """(name, value) of each field of a config that names tokens by number."""
    named = [(name, value) for name, value in settings.to_dict().items() if name.endswith("_token_id")]
    return [(name, value) for name, value in named if isinstance(value, int | list) and not isinstance(value, bool)]


class InOldNumbers(nn.Module):
    """A model whose tokens were not cut, on tokens as they are numbered where they were."""

    def __init__(self, model: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("old", torch.tensor(list(tokens)), persistent=False)

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Any:
        return self.model(input_ids=self.get_buffer("old")[input_ids], **inputs)


@dataclass(frozen=True, kw_only=True)
class FactorizeEmbeddings(Edit):
    """The table of embeddings, and an output layer that is tied to it, become two factors of this rank."""

    rank: int

    def apply(self, model: Any) -> None:
        table, output = model.get_input_embeddings(), model.get_output_embeddings()
        tied, looking, device = is_tied(model), tables(model), table.weight.device
        projection = nn.Linear(self.rank, table.embedding_dim, bias=False, device=device)
        narrow = nn.Parameter(torch.zeros(table.num_embeddings, self.rank, device=device))
        replace_parameter(model, table.weight, narrow)
        for embedding in looking:
            embedding.embedding_dim = self.rank
            replace_everywhere(model, embedding, FactorizedEmbedding(embedding, projection))
        if tied:
            model.set_output_embeddings(FactorizedOutput(table, projection, output.bias))


@dataclass(frozen=True, kw_only=True)
class TieEmbeddings(Edit):
    """The output layer takes the table of the input embeddings as its weight."""

    carried: ClassVar[bool] = False  # the config that is saved says so

    def apply(self, model: Any) -> None:
        output = model.get_output_embeddings()
        output.weight = table_of(model).weight
        for config in configs(model):
            config.tie_word_embeddings = True
