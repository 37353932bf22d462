from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from lead_engine.base.errors import UserError
from lead_engine.study import jobs
from lead_engine.study.jobs import Task, run_tasks


@dataclass
class World:
    """Children that end after some looks at them; keeps what happened and how many ran at once."""

    events: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most: int = 0

    def task(self, name: str, *looks: int | str, after: str | None = None) -> Task:
        """A task with a child for each of `looks`: the looks until it ends, or the message with which it fails."""
        return Task(name, self._steps(name, looks), after)

    def _steps(self, name: str, looks: tuple[int | str, ...]) -> Iterator[FakeChild]:
        for i, number in enumerate(looks):
            self.events.append(f"{name}{i}")
            self.running.add(name)
            self.most = max(self.most, len(self.running))
            yield FakeChild(self, name, number)

    def completed(self, task: Task) -> None:
        self.events.append(f"{task.name} complete")


@dataclass
class FakeChild:
    world: World
    name: str
    looks: int | str

    def finished(self) -> bool:
        if isinstance(self.looks, str):
            self.world.running.discard(self.name)
            raise UserError(self.looks)
        self.looks -= 1
        if self.looks <= 0:
            self.world.running.discard(self.name)
        return self.looks <= 0


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)


def test_one_at_a_time_in_order() -> None:
    world = World()
    run_tasks([world.task("a", 3, 1), world.task("b"), world.task("c", 2)], 1, world.completed)
    assert world.events == ["a0", "a1", "a complete", "b complete", "c0", "c complete"]


def test_never_more_than_jobs_and_never_fewer_without_need() -> None:
    world = World()
    run_tasks([world.task(name, 3, 2) for name in "abcdefg"], 3, world.completed)
    assert world.most == 3
    assert sum(event.endswith("complete") for event in world.events) == 7
    assert world.events[:3] == ["a0", "b0", "c0"]


def test_what_waits_for_another_lets_later_ones_past_and_starts_when_it_is_complete() -> None:
    world = World()
    tasks = [world.task("a", 9, 2), world.task("b", 1, after="a"), world.task("c", 2), world.task("d", 50)]
    run_tasks(tasks, 2, world.completed)
    events = world.events
    assert events.index("c0") < events.index("a complete") < events.index("b0") < events.index("d complete")
    with pytest.raises(RuntimeError, match="b waits for x"):
        run_tasks([world.task("b", 1, after="x")], 2, world.completed)


def test_after_a_failure_nothing_starts_and_what_runs_is_let_finish(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    tasks = [world.task("a", "a broke"), world.task("b", 4, 4), world.task("c", 1)]
    with pytest.raises(UserError, match="a broke"):
        run_tasks(tasks, 2, world.completed)
    assert world.events == ["a0", "b0", "b1", "b complete"]
    assert "a broke" in capsys.readouterr().err


def test_an_interrupt_ends_all_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    world, ended = World(), []
    monkeypatch.setattr(jobs, "end", lambda children: ended.extend(child.name for child in children))

    def interrupted(task: Task) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks([world.task("a", 9), world.task("b", 3), world.task("c", 9)], 3, interrupted)
    assert ended == ["a", "c"]
