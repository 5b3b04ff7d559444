"""An update's parts: chunks of the batch, the compiled step, and its fallback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_training import LAYOUT, Curve, toy_job

from tt_ray.model.loss import LossSums
from tt_ray.training.loop import Trainer, Workers

CPU = torch.device("cpu")


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    job = toy_job(**{"dropout": 0.0, "batch_size": 13, **settings})
    return Trainer(job, folder, Curve(), Workers(), CPU)


def gradients_of(trainer: Trainer) -> list[Tensor]:
    """Gradients of a step, before anything is clipped, and its loss by kind."""
    sums, norm = trainer.update(0)
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [sums.weighted, sums.by_kind, sums.counts, norm, *(g for g in gradients if g is not None)]


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for result, expected in zip(one, other, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_chunks_add_up_to_the_batch(tmp_path: Path, chunk: int) -> None:
    whole, parts = make_trainer(tmp_path), make_trainer(tmp_path)
    whole.chunk, parts.chunk = 13, chunk
    assert_close(gradients_of(parts), gradients_of(whole))


def test_the_rehearsal_of_a_compiled_step_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that a random stream moved on would show; a backward pass that fails is caught too."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("no backward pass")

    def uncompiled(run: Callable[..., LossSums], **_: Any) -> Callable[..., LossSums]:
        return run

    def broken(run: Callable[..., LossSums], **_: Any) -> Callable[..., LossSums]:
        def call(*arguments: Any) -> LossSums:
            return replace(sums := run(*arguments), weighted=Failing.apply(sums.weighted))

        return call

    expected = gradients_of(make_trainer(tmp_path, dropout=0.3))
    for compiler in (uncompiled, broken):
        monkeypatch.setattr(torch, "compile", compiler)
        trainer = make_trainer(tmp_path, dropout=0.3)
        trainer._training_sums = trainer._compiled_sums()
        assert all(map(torch.equal, gradients_of(trainer), expected))


@pytest.mark.slow
@pytest.mark.parametrize("goal_slots", [(), (0,)], ids=["plain", "goal"])
def test_a_compiled_step_is_the_eager_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, goal_slots: tuple[int, ...]
) -> None:
    """What a GPU runs, compiled for the CPU."""
    layout = replace(LAYOUT, goal_slots=goal_slots)
    compiled, eager = (make_trainer(tmp_path, layout=layout) for _ in range(2))
    compiled.on_cpu, compiled.chunk = False, 13
    compiled._training_sums = compiled._compiled_sums()
    assert_close(gradients_of(compiled), gradients_of(eager))
    assert not [record for record in caplog.records if record.name.startswith("tt_ray")]
    assert compiled._training_sums != compiled._eager_sums


def test_without_a_compiler_steps_are_eager_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_nothing(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no compiler\nand more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    trainer, eager = make_trainer(tmp_path), make_trainer(tmp_path)
    trainer.chunk = 4
    trainer._training_sums = trainer._compiled_sums()
    with caplog.at_level(logging.WARNING):
        assert_close(gradients_of(trainer), gradients_of(eager))
    assert [record.message for record in caplog.records] == [
        "training steps are not compiled: RuntimeError: no compiler"
    ]
