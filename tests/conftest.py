"""What all tests share: one thread, fixed seeds, a cache folder of their own, tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from niwaki.quiet import quiet_libraries, quiet_progress

quiet_libraries()

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402

from niwaki.model.anatomy import Anatomy  # noqa: E402
from niwaki.model.tiny import FAMILIES, Tiny  # noqa: E402
from niwaki.module import Learner  # noqa: E402
from niwaki.optimizer import SGD, OptimizerSettings  # noqa: E402
from niwaki.schedule import Constant  # noqa: E402
from niwaki.stage import Context, Effects  # noqa: E402
from niwaki.task.causal_lm import CausalLM  # noqa: E402
from niwaki.task.classification import Classification  # noqa: E402
from niwaki.task.masked_lm import MaskedLM  # noqa: E402
from niwaki.task.multi_label import MultiLabel  # noqa: E402
from niwaki.task.multiple_choice import MultipleChoice  # noqa: E402
from niwaki.task.ner import NER  # noqa: E402
from niwaki.task.question_answering import QuestionAnswering  # noqa: E402
from niwaki.task.regression import Regression  # noqa: E402
from niwaki.task.relation import Relation  # noqa: E402
from niwaki.task.translation import Translation  # noqa: E402

TASKS: dict[str, tuple[Any, tuple[str, ...], dict[str, list[Any]]]] = {
    "classification": (
        Classification(),
        ("maybe", "no", "yes"),
        {
            "text": ["a pine", "no", "the old garden tree", "cut it", "yes, of course", "x", "wire", "wall"],
            "label": ["yes", "no", "maybe", "no", "yes", "no", "maybe", "yes"],
        },
    ),
    "ner": (
        NER(),
        ("B-PER", "I-PER", "O"),
        {
            "tokens": [["ada", "met", "alan", "turing"], ["nobody", "came"], ["eve"], ["so", "said", "bob"]],
            "tags": [["B-PER", "O", "B-PER", "I-PER"], ["O", "O"], ["B-PER"], ["O", "O", "B-PER"]],
        },
    ),
    "causal_lm": (CausalLM(max_length=16), (), {"text": ["a tree in the garden", "cut with care, and wait"]}),
    "translation": (
        Translation(max_length=32, max_target_length=16), (),
        {"source": ["one", "twenty two", "three hundred"], "target": ["1", "22", "300"]},
    ),
    "masked_lm": (MaskedLM(max_length=16), (), {"text": ["a tree in the garden", "cut with care, and wait"]}),
    "multi_label": (
        MultiLabel(), ("cold", "loud", "new"),
        {"text": ["a pine", "wire", "the wall"], "labels": [["loud", "cold"], [], ["new"]]},
    ),
    "regression": (
        Regression(), (),
        {"text": ["a pine", "wire", "no"], "text_pair": ["the pine", "a wall", "no"], "label": [4.0, 0.5, 5.0]},
    ),
    "relation": (
        Relation(), ("Other", "Part(e1,e2)", "Part(e2,e1)"),
        {
            "text": ["<e1>bark</e1> of a <e2>pine</e2>", "a <e2>pot</e2> of <e1>soil</e1>.", "<e1>x</e1> <e2>y</e2>"],
            "label": ["Part(e1,e2)", "Part(e2,e1)", "Other"],
        },
    ),
    "multiple_choice": (
        MultipleChoice(), (),
        {
            "question": ["what is cut?", "where?"], "choices": [["a pine", "a song", "rain"], ["here", "at night"]],
            "label": [0, 0],
        },
    ),
    "question_answering": (
        QuestionAnswering(max_length=32, stride=8, max_answer_length=12, best=5), (),
        {
            "context": ["ada cut the old pine in may. bob held it.", "eve ran."],
            "question": ["who cut?", "who sang?"],
            "answers": [{"text": ["ada"], "answer_start": [0]}, {"text": [], "answer_start": []}],
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    quiet_progress()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIWAKI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    pl.seed_everything(0, verbose=False)


@dataclass
class Setting:
    """A tiny model with its task, and some rows."""

    task: Any
    labels: tuple[str, ...]
    rows: dict[str, list[Any]]
    tokenizer: Any
    model: Any

    def features(self, rows: dict[str, list[Any]] | None = None) -> list[dict[str, Any]]:
        columns = self.task.encode(rows or self.rows, self.tokenizer, self.labels)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def batch(self, rows: dict[str, list[Any]] | None = None) -> dict[str, torch.Tensor]:
        return self.task.collate(self.features(rows), self.tokenizer)

    def numbered(self) -> dict[str, torch.Tensor]:
        """All rows, as the training split gives them."""
        batch = self.batch()
        return {**batch, "row": torch.arange(len(batch["input_ids"]))}

    def context(self, steps: int = 10, load_teacher: Any = None) -> Context:
        anatomy = Anatomy.of(self.model)
        return Context(
            anatomy=anatomy, targets=anatomy.linears(), steps=steps, seed=0,
            head_learns=self.task.head_learns, predictions=self.task.predictions, owners=self.task.owners,
            load_teacher=load_teacher,
            token_ids=lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            calibration=lambda count: [self.batch()], training=lambda: [self.numbered()],
            training_key=lambda: repr(self.rows), read_by=lambda _: lambda numbers: self.batch(),
            inputs=self.task.inputs,
            loss=lambda model, batch: self.task.loss(model(**self.task.inputs(batch)), batch),
            write=self.task.write, retold=self.task.retold,
        )  # fmt: skip

    def logits(self, model: Any = None) -> torch.Tensor:
        """Of all rows, in eval mode."""
        model = (model or self.model).eval()
        with torch.no_grad():
            return model(**self.task.inputs(self.batch())).logits

    def learner(
        self, optimizer: OptimizerSettings | None = None, effects: Sequence[Effects] = (), steps: int = 4
    ) -> Learner:
        return Learner(
            self.model, task=self.task, labels=self.labels, optimizer=optimizer or SGD(lr=0.05),
            schedule=Constant(warmup=0.0), steps=steps, task_weight=1.0,
            terms={n: t for e in effects for n, t in e.terms.items()},
            modules={n: m for e in effects for n, m in e.modules.items()},
        )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    return {family: Tiny(name=family).tokenizer() for family in FAMILIES}


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, Any]) -> Any:
    """The one of the tiny BERT."""
    return tokenizers["bert"]


@pytest.fixture
def setting(tokenizers: dict[str, Any]) -> Callable[..., Setting]:
    """`setting(family, task, seed, **fields of Tiny)`."""

    def make(family: str = "bert", task: str = "classification", seed: int = 0, **fields: Any) -> Setting:
        kind, labels, rows = TASKS[task]
        model = Tiny(name=family, dropout=0.0, **fields).load(kind, labels, seed)
        return Setting(kind, labels, rows, tokenizers[family], model)

    return make


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """`train(learner, batches, **settings of Lightning's Trainer)`: a fit without decoration."""

    def run(learner: Learner, batches: Sequence[Any], validation: Sequence[Any] | None = None, **settings: Any) -> Any:
        ckpt_path = settings.pop("ckpt_path", None)
        # A generator of its own: the global one is the model's dropout's.
        loader = [
            torch.utils.data.DataLoader(list(rows), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type, var-annotated]
            for rows in (batches, validation)
            if rows
        ]
        plain: dict[str, Any] = {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }  # fmt: skip
        trainer = pl.Trainer(**(plain | settings))
        learner.model.train()
        trainer.fit(learner, *loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return trainer

    return run
