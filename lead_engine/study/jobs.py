"""Several tasks at a time, each a series of child processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lead_engine.base import console
from lead_engine.base.errors import UserError
from lead_engine.study.launch import Child, end

POLL_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class Task:
    """A named series of child processes."""

    name: str
    steps: Iterator[Child]
    """Starts a child and yields it; the next one is asked for when that child has ended without an error."""
    after: str | None = None
    """The task that has to be complete before this one starts."""


def run_tasks(tasks: Sequence[Task], jobs: int, completed: Callable[[Task], None]) -> None:
    """Run the tasks, `jobs` at a time, in their order as far as `after` allows; call `completed` after each.

    When a task fails, no other is started, but those under way may finish, because they would lose what they have done;
    then the first failure's UserError is raised. An interrupt ends all children first.
    """
    queue = _Queue(list(tasks), jobs, completed)
    try:
        while queue.busy:
            if not (queue.start_next() or queue.advance_ended()):
                time.sleep(POLL_SECONDS)
    except BaseException:
        end(queue.running.values())
        raise
    if queue.failure is not None:
        raise queue.failure


class _Queue:
    """Tasks that wait, run and are complete, and the first failure."""

    def __init__(self, waiting: list[Task], jobs: int, completed: Callable[[Task], None]):
        self.waiting, self.jobs, self.completed = waiting, jobs, completed
        self.running: dict[Task, Child] = {}
        self.complete: set[str] = set()
        self.failure: UserError | None = None

    @property
    def busy(self) -> bool:
        return bool(self.running or (self.waiting and self.failure is None))

    def start_next(self) -> bool:
        """Start the first task that may start now. Returns whether there was one."""
        if self.failure is not None or len(self.running) >= self.jobs:
            return False
        ready = next((task for task in self.waiting if task.after is None or task.after in self.complete), None)
        if ready is None:
            if self.waiting and not self.running:
                raise RuntimeError(
                    f"{self.waiting[0].name} waits for {self.waiting[0].after}, which will never be complete"
                )
            return False
        self.waiting.remove(ready)
        self._next_step(ready)
        return True

    def advance_ended(self) -> bool:
        """Start the next step of every task whose child has ended. Returns whether there was one."""
        ended = False
        for task, child in list(self.running.items()):
            try:
                if not child.finished():
                    continue
            except UserError as error:
                del self.running[task]
                self._fail(error)
            else:
                del self.running[task]
                self._next_step(task)
            ended = True
        return ended

    def _next_step(self, task: Task) -> None:
        try:
            child = next(task.steps, None)
        except UserError as error:
            self._fail(error)
            return
        if child is not None:
            self.running[task] = child
            return
        self.complete.add(task.name)
        self.completed(task)

    def _fail(self, error: UserError) -> None:
        if self.running:
            console.warn(
                f"{error}\nno other run is started; waiting for {', '.join(task.name for task in self.running)}"
            )
        self.failure = self.failure or error
