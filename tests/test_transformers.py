"""The callback of transformers.Trainer: a real Trainer, on real ranks, with and without interruption."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from safetensors.torch import load_file
from test_state import averages, joined
from torch import nn

from phema_dist import PostHocEMA, synthesize

pytestmark = [
    # dcp says so whenever there is no process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning"),
]

STEPS, SAVED = 9, 5  # no snapshot is at either
SETTINGS: dict[str, Any] = {"sigma_rels": (0.05, 0.28), "update_every": 3, "checkpoint_every": 4}
LENGTH = 0.28  # evaluated
State = dict[str, torch.Tensor]


class KilledError(Exception):
    """What ends a job too early."""


@contextmanager
def launched(kind: str) -> Iterator[None]:
    """What Accelerate looks for where torchrun has started a process, on a rank of tests/ranks.py, or alone."""
    from accelerate import PartialState  # noqa: PLC0415  slow
    from accelerate.state import AcceleratorState  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    environment = {"ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    if dist.is_initialized():
        rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
        environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    # Accelerate takes no FSDP plugin on a CPU; but its code for one, and torch's, run there.
    backend = mock.Mock(return_value=("gloo", DistributedType.MULTI_GPU))
    patch = mock.patch.object(PartialState, "_prepare_backend", backend) if kind == "fsdp2" else mock.MagicMock()
    with mock.patch.dict(os.environ, environment), patch:
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)


def make_model() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # an evaluation changes its noise
    config = BertConfig(vocab_size=30, max_position_embeddings=8, **sizes, **dropout)
    return BertForSequenceClassification(config)


def make_data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(30, (6,), generator=generator), "labels": i % 2} for i in range(16)]


def loss_of(state: State) -> float:
    """The mean loss of the bare model with these parameters."""
    model = make_model()
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=each["input_ids"][None], labels=torch.tensor([each["labels"]])) for each in make_data()
        ]
    return float(torch.stack([each.loss for each in losses]).mean())


def make_trainer(kind: str, folder: Path, callbacks: list[Any], **arguments: Any) -> Any:
    """A Trainer that evaluates the average, once one is stored."""
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415

    from phema_dist.integrations.transformers import PostHocEMACallback  # noqa: PLC0415

    class AveragedTrainer(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            ema = next(each for each in callbacks if isinstance(each, PostHocEMACallback)).ema
            with ema.model(self.model, sigma_rel=LENGTH, exchange=True):
                return super().evaluate(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any) -> None:
            ema = next(each for each in callbacks if isinstance(each, PostHocEMACallback)).ema
            super().log(logs | {"ema/updates": ema.status()["updates"]}, *args)

    if kind == "fsdp2":
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}
    settings = {
        "output_dir": str(folder / "trainer"), "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": SAVED, "save_total_limit": 1, "eval_steps": 4,
        "average_tokens_across_devices": False,  # with it, evaluations report the loss times the number of ranks
    }  # fmt: skip
    training = TrainingArguments(**(settings | arguments))
    return AveragedTrainer(
        make_model(), training, train_dataset=make_data(), eval_dataset=make_data(), callbacks=callbacks
    )


def make_callback(folder: Path, **settings: Any) -> Any:
    from phema_dist.integrations.transformers import PostHocEMACallback  # noqa: PLC0415

    return PostHocEMACallback(folder / "run", **(SETTINGS | settings))


def recorder(last: int = STEPS) -> Any:
    """A callback that keeps the parameters after each step, whole, and gives up before the last one is looked at."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.states: dict[int, State] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            found = get_model_state_dict(model, options=options)
            self.states[state.global_step] = {name: tensor.clone() for name, tensor in found.items()}
            if state.global_step > last:
                raise KilledError

    return Recorder()


def job(kind: str, folder: Path) -> dict[str, Any]:
    """Train without interruption, and with one; on each rank."""
    with launched(kind):
        whole = recorder()
        callback = make_callback(folder / "whole")
        trainer = make_trainer(kind, folder / "whole", [whole, callback], eval_strategy="steps")
        trainer.train()
        found = averages_of(callback)
        log = next(each for each in trainer.state.log_history if "eval_loss" in each)
        during, updates = log["eval_loss"], trainer.state.log_history[-1]["ema/updates"]
        with callback.ema.model(trainer.model, sigma_rel=LENGTH, exchange=True):
            metrics = trainer.evaluate()
            trainer.save_model(str(folder / "saved"))

        killed = make_callback(folder / "parts")
        error = outcome(make_trainer(kind, folder / "parts", [recorder(SAVED), killed]).train)
        resumed = recorder()
        callback = make_callback(folder / "parts")
        trainer = make_trainer(kind, folder / "parts", [resumed, callback])
        trainer.train(resume_from_checkpoint=True)
        dist.barrier()
        return {
            "states": whole.states, "resumed": resumed.states, "error": error, "averages": found,
            "resumed averages": averages_of(callback), "eval": [during, metrics["eval_loss"]], "updates": updates,
            "wrapper": [each.__name__ for each in type(trainer.model_wrapped).__mro__],
        }  # fmt: skip


def by_hand(states: dict[int, State], folder: Path) -> tuple[list[State], list[float]]:
    """The averages that a plain loop over these parameters makes, and the loss of one after step 4, and at the end."""
    model = make_model()
    with PostHocEMA.from_model(model, folder, **SETTINGS) as ema:
        for step in range(1, STEPS + 1):
            model.load_state_dict(states[step])
            ema.update_(model)
            if step == 4:
                losses = [loss_of(joined([averages(ema)])[1])]
        found = joined([averages(ema)])
    (average,) = synthesize(folder, [LENGTH])
    return found, [*losses, loss_of(average.state_dict)]


def averages_of(callback: Any) -> list[State]:
    return averages(callback.ema)


def assert_same(mine: State, theirs: State) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize(("kind", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPModule")])
def test_a_trainer_averages_evaluates_saves_and_resumes(kind: str, wrapper: str, tmp_path: Path) -> None:
    ranks = run(2, job, kind, tmp_path, timeout=150)
    found = ranks[0]
    assert wrapper in found["wrapper"]

    # by hand, in a plain loop: the same bits
    ((plain, losses),) = run(1, by_hand, found["states"], tmp_path / "plain")
    for mine, theirs in zip(joined([each["averages"] for each in ranks]), plain, strict=True):
        assert_same(mine, theirs)
    (average,) = synthesize(tmp_path / "plain", [LENGTH])
    (trained,) = synthesize(tmp_path / "whole/run", [LENGTH])
    assert_same(trained.state_dict, average.state_dict)  # from the same snapshots, the last one included

    assert [each["updates"] for each in ranks] == [5, 5]

    # in two jobs
    assert "KilledError" in found["error"]
    assert list(found["resumed"]) == list(range(SAVED + 1, STEPS + 1))
    for step, state in found["resumed"].items():
        assert_same(state, found["states"][step])
    for mine, theirs in zip(joined([each["resumed averages"] for each in ranks]), plain, strict=True):
        assert_same(mine, theirs)

    # evaluated, and saved as a model
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert_same(saved, {name: average.state_dict[name] for name in saved})
    assert found["eval"] == pytest.approx(losses, rel=1e-5)
    (folder,) = (tmp_path / "whole/trainer").iterdir()
    assert folder.name == f"checkpoint-{STEPS}"  # the older ones are gone, and ours with them
    assert len([path for path in folder.iterdir() if path.name.startswith("phema_dist")]) == 1


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("phema_dist")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def resume(folder: Path, checkpoint: Path, **arguments: Any) -> tuple[list[State], list[str]]:
    callback = make_callback(folder)
    with warnings_of_ours() as told:
        make_trainer("plain", folder, [callback], **arguments).train(resume_from_checkpoint=str(checkpoint))
    return averages_of(callback), [text for text in told if "has no phema_dist-" in text]


def go_on_from_anywhere(folder: Path) -> dict[str, Any]:
    """A run, and what becomes of its averages from one of its checkpoints on, here and elsewhere."""
    with launched("plain"):
        callback = make_callback(folder)
        begun_too_early = outcome(lambda: callback.ema)
        make_trainer("plain", folder, [callback], save_total_limit=None).train()
        kept = folder / f"trainer/checkpoint-{SAVED}"
        shutil.copytree(kept, folder / "moved/best")
        found = {"early": begun_too_early, "whole": (averages_of(callback), [])}
        found["in place"] = resume(folder, kept)
        found["named"] = resume(folder, folder / "moved/best", resume_from_checkpoint=str(folder / "moved/best"))
        other = {"output_dir": str(folder / "other")}
        found["named elsewhere"] = resume(
            folder, folder / "moved/best", resume_from_checkpoint=str(folder / "moved/best"), **other
        )
        found["not named elsewhere"] = resume(folder, folder / "moved/best", **other)
        # there is a checkpoint of that name, which is not the one that is loaded
        make_trainer("plain", folder / "third", [make_callback(folder / "third")], save_total_limit=None).train()
        found["another"] = resume(folder, folder / "moved/best", output_dir=str(folder / "third/trainer"))
        return found


def test_it_goes_on_from_the_checkpoint_that_was_loaded_or_says_so(tmp_path: Path) -> None:
    (found,) = run(1, go_on_from_anywhere, tmp_path)
    assert found.pop("early").startswith("SettingsError: there are no averages before Trainer.train")
    whole, _ = found["whole"]
    for kind, (averages_then, told) in found.items():
        exact = all(
            torch.equal(mine[name], theirs[name])
            for mine, theirs in zip(averages_then, whole, strict=True)
            for name in theirs
        )
        assert (exact, len(told)) == ((False, 1) if kind in {"not named elsewhere", "another"} else (True, 0)), kind


def two_runs(folder: Path) -> list[list[State]]:
    """The averages of two callbacks of one Trainer: at the end, and at that of one that went on."""
    with launched("plain"):

        def make() -> list[Any]:
            return [make_callback(folder / "a"), make_callback(folder / "b", update_every=1)]

        whole, resumed = make(), make()
        make_trainer("plain", folder, whole, save_total_limit=None).train()
        checkpoint = str(folder / f"trainer/checkpoint-{SAVED}")
        make_trainer("plain", folder, resumed).train(resume_from_checkpoint=checkpoint)
        return [averages_of(each) for each in (*whole, *resumed)]


def test_two_runs_of_one_trainer_are_each_gone_on_with(tmp_path: Path) -> None:
    (found,) = run(1, two_runs, tmp_path)
    for whole, resumed in ((found[0], found[2]), (found[1], found[3])):
        for mine, theirs in zip(resumed, whole, strict=True):
            assert_same(mine, theirs)
    assert any(not torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


def corners(folder: Path) -> dict[str, Any]:
    from transformers import TrainerState  # noqa: PLC0415

    with launched("plain"):
        whole, callback = recorder(), make_callback(folder)
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
        best |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that it is not the last one
        trainer = make_trainer("plain", folder, [whole, callback], save_only_model=True, **best)
        trainer.train()
        found = {
            "averages": averages_of(callback), "states": whole.states, "best": trainer.state.best_global_step,
            "model": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        }  # fmt: skip
        found["again"] = outcome(make_trainer("plain", folder, [make_callback(folder)]).train)
        taken = make_callback(folder, resume=True)
        make_trainer("plain", folder, [taken], save_strategy="no").train()
        found["taken over"] = averages_of(taken)

        def begin(callback: Any, **arguments: Any) -> str:
            args = SimpleNamespace(**arguments)
            return outcome(lambda: callback.on_train_begin(args, TrainerState(), None, model=make_model()))

        found["deepspeed"] = begin(make_callback(folder), deepspeed_plugin=object())
        found["skip"] = begin(make_callback(folder, on_busy="skip"), deepspeed_plugin=None, load_best_model_at_end=True)
        return found


def test_the_best_model_is_loaded_a_run_is_not_overwritten_and_what_cannot_work_is_refused(tmp_path: Path) -> None:
    (found,) = run(1, corners, tmp_path)
    ((plain, _),) = run(1, by_hand, found["states"], tmp_path / "plain")
    assert found["best"] < STEPS
    assert_same(found["model"], found["states"][found["best"]])
    for mine, theirs, taken in zip(found["averages"], plain, found["taken over"], strict=True):
        assert_same(mine, theirs)
        assert_same(taken, theirs)
    assert not list(tmp_path.glob("trainer/*/phema_dist-*"))  # save_only_model
    assert found["again"].startswith("RunError")
    assert "resume" in found["again"]
    assert found["deepspeed"].startswith("SettingsError: DeepSpeed keeps the parameters")
    assert found["skip"].startswith("SettingsError: load_best_model_at_end")
