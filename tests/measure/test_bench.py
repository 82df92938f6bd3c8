import json
import statistics
import time

import pytest
import torch

from niwaki.callbacks import Interruption
from niwaki.data.batches import Batches
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.measure import bench

WORDS = ("pine", "oak", "maple", "koi", "carp", "pond")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{WORDS[i % 6]} {i} " * (1 + i % 5), "label": "tree" if i % 6 < 3 else "fish"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def composed(file):
    def compose(*overrides):
        tiny = (
            "model=tiny-bert",
            "model.dropout=0.0",
            "callbacks=[checkpoint,learning_rate]",
            "data.batch_size=4",
        )
        return bench.composed("data=files", f"data.train='{file}'", *tiny, "trainer.precision=fp32", *overrides)

    return compose


def test_both_loops_make_the_same_steps(composed):
    _, learner, turns = bench.bench_step(
        *composed("optimizer.lr=0.01", "trainer.gradient_clip=0.05"), steps=3, blocks=2
    )
    turns.bare.step(turns.batches[-1])  # the fit made one more, to end its last block
    ours = learner.model.state_dict()
    for name, tensor in turns.bare.model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    start = bench.composed("model=tiny-bert", "model.dropout=0.0")[0].model
    fresh = start.load(learner.task, learner.labels, 0).state_dict()
    assert not torch.equal(fresh["classifier.weight"], ours["classifier.weight"])


def test_the_result_is_the_median_over_the_blocks_after_the_warm_up(composed):
    result, _, turns = bench.bench_step(*composed(), steps=2, blocks=3)
    assert len(turns.ours_seconds) == len(turns.bare_seconds) == 4
    ours, bare = zip(*result["blocks"], strict=True)
    assert len(ours) == 3
    assert result["ours_ms"] == pytest.approx(statistics.median(ours))
    assert result["bare_ms"] == pytest.approx(statistics.median(bare))
    assert result["ratio"] == pytest.approx(statistics.median(a / b for a, b in result["blocks"]))


def test_what_is_done_between_steps_counts_for_the_fit_alone(composed, monkeypatch):
    kept = Interruption.on_train_batch_end

    def slow(self, *arguments):
        time.sleep(0.1)
        kept(self, *arguments)

    monkeypatch.setattr(Interruption, "on_train_batch_end", slow)
    result, _, _ = bench.bench_step(*composed(), steps=2, blocks=3)
    assert result["ours_ms"] > 100
    assert result["ours_ms"] - result["bare_ms"] > 80


def test_a_slow_bare_loop_counts_for_itself_alone(composed, monkeypatch):
    kept = bench.BareLoop.step

    def slow(self, batch):
        time.sleep(0.1)
        kept(self, batch)

    monkeypatch.setattr(bench.BareLoop, "step", slow)
    result, _, _ = bench.bench_step(*composed(), steps=2, blocks=3)
    assert result["bare_ms"] - result["ours_ms"] > 80


def test_a_precision_that_the_bare_loop_lacks_is_refused(composed):
    with pytest.raises(ConfigError, match=r"trainer.precision='fp16': needs auto, fp32 or bf16"):
        bench.bench_step(*composed("trainer.precision=fp16"), steps=1, blocks=1)


def test_an_epoch_is_timed_on_the_same_rows_for_both(composed, monkeypatch):
    from transformers import Trainer

    served = {}
    kept_train, kept_iter = Trainer.train, Batches.__iter__

    def train(self):
        served["theirs"] = (
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.args.num_train_epochs,
        )
        time.sleep(0.3)
        return kept_train(self)

    def iterate(self):
        for batch in kept_iter(self):
            if self.batch_sampler.seed is not None:
                served["ours"] = served.get("ours", 0) + len(batch["input_ids"])
            yield batch

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Batches, "__iter__", iterate)
    result = bench.bench_epoch(*composed(), rounds=1)
    assert served == {"theirs": (48, 4, 1), "ours": 48}
    assert (result["precision"], result["hugging_face_precision"]) == ("32-true", "32-true")
    assert result["rows"] == 48
    assert result["hugging_face_seconds"] > 0.3
    assert result["ratio"] == pytest.approx(result["ours_seconds"] / result["hugging_face_seconds"])


def test_the_sides_take_turns_to_be_first(composed, monkeypatch):
    order = []
    times = iter((1.0, 4.0, 5.0, 2.0))

    def epoch(side, answer):
        return lambda *_: order.append(side) or answer(next(times))

    monkeypatch.setattr(bench, "our_epoch", epoch("ours", lambda seconds: seconds))
    monkeypatch.setattr(bench, "hugging_face_epoch", epoch("theirs", lambda seconds: (seconds, "32-true")))
    result = bench.bench_epoch(*composed(), rounds=2)
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert result["rounds"] == [[1.0, 4.0], [2.0, 5.0]]
    assert (result["ours_seconds"], result["hugging_face_seconds"]) == (1.5, 4.5)


def test_our_loader_is_in_our_time_alone(composed, monkeypatch):
    kept = Corpus._drawn

    def slow(self, rows, epoch):
        time.sleep(0.1)
        return kept(self, rows, epoch)

    monkeypatch.setattr(Corpus, "_drawn", slow)
    result, _, _ = bench.bench_step(*composed(), steps=2, blocks=2)
    assert result["ours_ms"] - result["bare_ms"] > 80


def test_more_steps_than_an_epoch_has(composed):
    _, learner, turns = bench.bench_step(*composed(), steps=8, blocks=2)  # 12 batches an epoch
    assert learner.trainer.global_step == len(turns.batches) == 25
    first, second = ({tuple(b["input_ids"].flatten().tolist()) for b in turns.batches[i : i + 12]} for i in (0, 12))
    assert first != second


def test_the_command_times_whole_files(file, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        bench, "bench_step", lambda *_, **__: ({"ours_ms": 1, "bare_ms": 1, "ratio": 1, "precision": "32-true"}, 0, 0)
    )
    monkeypatch.setattr(bench, "composed", lambda *overrides: asked.append(overrides) or ("recipe", {}))
    facts = {"rows": 60, "precision": "bf16-mixed", "hugging_face_precision": "32-true"}
    seconds = {"ours_seconds": 1, "hugging_face_seconds": 2, "ratio": 0.5}
    monkeypatch.setattr(bench, "bench_epoch", lambda *_, rounds: facts | seconds)
    bench.main(steps=1, blocks=1, batch_size=4, precision="auto", trainer=file, validation=file, test=file, rounds=1)
    assert asked[1] == ("data=files", *(f"data.{split}='{file}'" for split in ("train", "validation", "test")))
    said = capsys.readouterr().out
    assert "epoch of 60 rows" in said
    assert "1.0 s in bf16-mixed, Hugging Face's Trainer 2.0 s in 32-true" in said
    with pytest.raises(ConfigError, match="--test: belongs to an epoch"):
        bench.main(steps=1, blocks=1, batch_size=4, precision="auto", test=file)
