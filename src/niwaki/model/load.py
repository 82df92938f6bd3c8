"""Where a model comes from: the hub, a folder, a Python package, an artifact of this project, or nowhere (random)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from niwaki.edits import Edit
from niwaki.errors import ConfigError, UserError
from niwaki.model.anatomy import Anatomy, adapt, family_of

if TYPE_CHECKING:
    from niwaki.data.source import Needs, Source
    from niwaki.task.task import Task

DECODER_START = "decoder_start"  # the setting of a tokenizer that names the token before the first of a target


@dataclass(frozen=True, kw_only=True)
class KeepBlocks(Edit):
    """Keep only these blocks of the backbone, in this order."""

    carried: ClassVar[bool] = False  # the config that is saved counts the blocks that were kept

    blocks: list[int]

    def apply(self, model: Any) -> None:
        Anatomy.of(model).keep_blocks(self.blocks)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model by `name`: a folder (Hugging Face's, an artifact of this project, or a run that holds one), else
    `package:NAME/FOLDER` for one that an installed Python package carries, else a hub name.

    `layers`: the blocks to keep; null keeps all. `dropout`: overrides every dropout of the config.
    `overrides`: other fields of the Hugging Face config.
    """

    name: str
    revision: str | None = None
    layers: Sequence[int] | None = None
    dropout: float | None = None
    overrides: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout}: needs null or a number in 0..1, below 1")
        if self.layers is not None and (not self.layers or any(layer < 0 for layer in self.layers)):
            raise ConfigError(f"model.layers={list(self.layers)}: needs null or some layer numbers from 0 up")

    @property
    def title(self) -> str:
        """The name in a few words: of the package, the hub model, or the folder."""
        package = self.name.removeprefix("package:")
        return package.partition("/")[0] if package != self.name else self.name.rstrip("/")

    @property
    def place(self) -> str:
        """The folder or hub name to load from.

        Raises:
            ConfigError: there is no such folder, or the package that should hold it is not installed.
        """
        return located(self.name, "model.name")

    def learn(self, source: Source, needs: Needs, seed: int) -> None:
        """What a model takes from the training rows before anything is read with it; most take nothing."""
        return None

    def tokenizer(self) -> Any:
        """The model's tokenizer; a padding token is chosen where it has none."""
        from transformers import AutoTokenizer

        tokenizer = self._try(lambda: AutoTokenizer.from_pretrained(self.place, revision=self.revision))
        if tokenizer.pad_token_id is None:
            pad = self.config().pad_token_id
            tokenizer.pad_token = tokenizer.eos_token if pad is None else tokenizer.convert_ids_to_tokens(pad)
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"model.name={self.name!r}: its tokenizer has neither a padding token nor an end token")
        return fitted(tokenizer, self.config())

    def config(self) -> Any:
        """The Hugging Face config, before the task is known."""
        from transformers import AutoConfig

        return self.changed(self._try(lambda: AutoConfig.from_pretrained(self.place, revision=self.revision)))

    def changed(self, config: Any) -> Any:
        """`config` with this spec's changes.

        Raises:
            ConfigError: an override names a field that the config does not have.
        """
        changes = dict(self.overrides or {})
        unknown = [name for name in changes if not hasattr(config, name)]
        if unknown:
            raise ConfigError(f"model.overrides.{unknown[0]}: a {config.model_type} config has no such field")
        if self.dropout is not None:
            changes |= {name: self.dropout for name in dropouts(config)}
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    def empty(self, task: Task, labels: Sequence[str]) -> Any:
        """The model with its head on the meta device: shapes without weights."""
        config = with_labels(self.config(), task.outputs(labels))
        with torch.device("meta"):
            model = auto_class(task, config).from_config(config)
            task.attach(model, labels)
        adapt(model)
        for edit in self.carried():
            edit.apply(model)
        self.cut(model)
        if Anatomy.of(model).reads_end and config.eos_token_id not in self.tokenizer()("a")["input_ids"]:
            raise ConfigError(
                f"model.name={self.name!r}: its tokenizer puts no end token (number {config.eos_token_id}) behind a "
                f"text, and the head of a {config.model_type} for {task.name} reads nothing else"
            )
        return model

    def load(self, task: Task, labels: Sequence[str], seed: int) -> Any:
        """The model with the task's head (random from `seed` where the source has none), whole, in fp32 on the CPU.

        Raises:
            ConfigError: it cannot be loaded, or lacks weights that no training would make up for.
        """
        from niwaki import artifact

        torch.manual_seed(seed)
        model: Any
        if artifact.is_artifact(self.place):
            model, gaps = artifact.load_dense(self.place, task, labels, self.config())
        else:
            config = with_labels(self.config(), task.outputs(labels))
            kind = auto_class(task, config)
            model, report = self._try(
                lambda: kind.from_pretrained(
                    self.place,
                    revision=self.revision,
                    config=config,
                    key_mapping=renamed(kind, config),
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            )
            gaps = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
            gaps |= attached(task, model, labels)
            adapt(model)
        model.head_is_new = self.refuse_gaps(model, gaps, task)
        return self.padded(model).eval()

    def refuse_gaps(self, model: Any, gaps: Iterable[str], task: Task) -> bool:
        """Raise ConfigError for parameters that the source lacks, or has in another shape, unless they are of a head
        that learns: any new one, of a tied one all but the table. Returns whether some of the head are new."""
        output = model.get_output_embeddings()
        table = output.weight if output is not None else None
        head = {n for n, p in Anatomy.of(model).head_parameters().items() if p is not table}
        new = set(gaps) & head if task.head_learns or task.head_may_be_new else set()
        lacking = [name for name, _ in model.named_parameters() if name in set(gaps) - new]
        if lacking:
            raise ConfigError(
                f"model.name={self.name!r}: has no weights that fit {lacking[0]}, which would stay random; needs "
                f"a model made for {task.name}, and no model.overrides of its shapes"
            )
        return bool(new)

    def padded(self, model: Any) -> Any:
        """The model with the tokenizer's padding token where its config has none: heads look for the last token that
        is no padding. Set after the embeddings are made, or they would give that token no gradient."""
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = self.tokenizer().pad_token_id
        return model

    def carried(self) -> list[Edit]:
        """The edits that a model loaded from here has behind it already, where its config does not tell of them."""
        from niwaki import artifact

        return artifact.carried(Path(self.place)) if artifact.is_artifact(self.place) else []

    def cut(self, model: Any) -> list[Edit]:
        """Keep the blocks that `layers` names; returns the edits that rebuild the model: those of its family, those
        that it came with, and this one."""
        edits = [*adapt(model), *self.carried()]
        if self.layers is not None:
            edits.append(KeepBlocks(blocks=list(self.layers)))
            edits[-1].apply(model)
        return edits

    def _try(self, load: Any) -> Any:
        try:
            return load()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"model.name={self.name!r}: cannot be loaded ({reason})") from error


def located(name: str, field: str) -> str:
    """The folder that `name` stands for, else `name` itself, for the hub.

    Raises:
        ConfigError: it is written like a folder, and there is none; or its package is not installed.
    """
    package, _, inner = name.removeprefix("package:").partition("/")
    if name.startswith("package:"):
        # Looking for a module inside of a package would run the package.
        if not package.isidentifier():
            raise ConfigError(f"{field}={name!r}: needs package:NAME/FOLDER, with the plain name of a package")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            pip = package.replace("_", "-")
            raise ConfigError(f"{field}={name!r}: the package is not installed; pip install {pip}")
        return str(Path(found.submodule_search_locations[0]) / inner)
    folder = Path(name).expanduser()
    if folder.is_dir():
        inside = folder / "model"  # of a run
        return str(inside if not (folder / "config.json").is_file() and inside.is_dir() else folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{field}={name!r}: there is no such folder")
    return name


def auto_class(task: Task, config: Any) -> Any:
    """The transformers class that makes a model with this task's head.

    Raises:
        ConfigError: there is no such model of this family.
    """
    import transformers

    task.check_config(config)
    if not has_head(task, config):
        raise ConfigError(
            f"task={task.name}: transformers has no {config.model_type} model for this task; choose a model of another "
            "family, or another task"
        )
    return getattr(transformers, task.auto_class_of(config))


def has_head(task: Task, config: Any) -> bool:
    """Whether transformers has a model with this task's head for the family of this config."""
    import transformers

    return type(config) in getattr(transformers, task.auto_class_of(config))._model_mapping


def attached(task: Task, model: Any, labels: Sequence[str]) -> set[str]:
    """Put the task's own head on a model that was just loaded; the names of the parameters that came with it."""
    stored = set(dict(model.named_parameters()))
    task.attach(model, labels)
    return set(dict(model.named_parameters())) - stored


def renamed(auto: Any, config: Any) -> dict[str, str] | None:
    """The weights that another model of the family stores under another name, for `from_pretrained`."""
    return dict(family_of(config).renamed.get(auto._model_mapping[type(config)].__name__, {})) or None


def fitted(tokenizer: Any, config: Any) -> Any:
    """The tokenizer, giving what a model of this config takes; its own files keep that."""
    if not has_segments(config):
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    if family_of(config).reads_end:  # in every row as often: an end token that is spelled in a text is none
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    start = getattr(config, "decoder_start_token_id", None)
    tokenizer.init_kwargs.pop(DECODER_START, None)  # of a model that it came with
    if start is not None and config.is_encoder_decoder:
        tokenizer.init_kwargs[DECODER_START] = tokenizer.convert_ids_to_tokens(start)
    return tokenizer


def has_segments(config: Any) -> bool:
    """Whether the model tells the two texts of a pair apart by `token_type_ids`; others would not take them, or
    would take them for something else."""
    return int(getattr(config, "type_vocab_size", 0)) > 1


def with_labels(config: Any, labels: Sequence[str]) -> Any:
    """The config with as many outputs as there are labels, and their names."""
    if labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    return config


def dropouts(config: Any) -> list[str]:
    """The fields of a config that hold a dropout probability; `layerdrop` leaves out whole blocks, and is none."""
    fields = config.to_dict().items()
    return [n for n, value in fields if "drop" in n and "layerdrop" not in n and isinstance(value, int | float)]
