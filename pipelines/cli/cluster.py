"""Workers on several machines that build one target, each of which stays until the target is there."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import timedelta
from typing import Annotated, Any

import luigi
import typer
from luigi.cmdline_parser import CmdlineParser
from luigi.parameter import ParameterException
from luigi.retcodes import retcode
from luigi.rpc import RemoteScheduler, RPCError
from luigi.task_register import Register, TaskClassException
from luigi.task_status import DISABLED
from luigi.worker import worker as worker_settings

from pipelines import luigi_setup
from pipelines.luigi_setup.messages import option_at_fault
from pipelines.luigi_setup.scheduler import LOCAL, fault_at, is_given
from pipelines.luigi_setup.worker import INTERRUPTED, StageWorker
from spctrl.errors import ExpectedError
from spctrl.output.terminal import say_message
from spctrl.store.store import forget_what_was_found
from tasks.execution import logs

AWAY_TIMES = 10
"""How often in a row luigid may not answer. Each time Luigi asks three times, with half a minute in between."""
IDLE = timedelta(minutes=5)
"""How long a worker goes without work before it looks at the store again, whatever luigid believes."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("join", context_settings={"ignore_unknown_options": True})(join)


def join(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="TARGET", help="and options, as for luigi: BuildDataset --dataset ap10k"),
    ],
) -> None:
    """Build a target together with workers on other machines, and stay until it is there, whoever made it.

    luigid hands out the stages. The settings say where it runs, and how long it waits for a worker that is silent: see
    configs/cluster.cfg. SIGUSR1 has a worker leave after its present stage. Exits with 0 when the target is there.
    """
    luigi_setup.hold_sigusr1()
    try:
        with CmdlineParser.global_instance(arguments) as parser:
            parser.get_task_obj()
    except (ExpectedError, ValueError, ParameterException, TaskClassException) as error:
        option = option_at_fault(error)
        raise typer.BadParameter(f"{option}: {error}" if option else str(error)) from error
    logs.LOGGER.addFilter(_is_worth_reading)
    with CmdlineParser.global_instance(arguments) as parser:
        try:
            sys.exit(_stay(parser))
        except KeyboardInterrupt:  # of which typer says nothing
            _say(luigi_setup.STOPPED)
            sys.exit(INTERRUPTED)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Not Luigi's summary, which takes what other workers made for left undone; nor an error that is none."""
    if record.exc_info == (None, None, None):
        record.exc_info = None
    return "Luigi Execution Summary" not in record.getMessage()


class _Helper(StageWorker):
    """A worker that leaves at once when it cannot look at all stages: it would keep the others from those."""

    def add(self, *args: Any, **kwargs: Any) -> bool:
        if not super().add(*args, **kwargs):
            raise ExpectedError("this machine cannot join: the messages above say at which stage, and why")
        return True

    def _keep_alive(self, get_work_response: Any) -> bool:
        """Also while there is nothing but the target to make, and another makes it: that one may die."""
        return bool(super()._keep_alive(get_work_response) or get_work_response.running_tasks)

    @property
    def was_sent_away(self) -> bool:
        """By SIGUSR1, or by somebody in the visualiser."""
        return bool(self._stop_requesting_work)


class _Crew:
    """What Luigi asks for a scheduler and a worker."""

    scheduler: Any
    worker: _Helper | None = None

    def create_local_scheduler(self) -> None:
        raise ExpectedError("expected luigid to hand out the stages, found --local-scheduler: leave it out")

    def create_remote_scheduler(self, url: str) -> RemoteScheduler:
        self.scheduler = scheduler = RemoteScheduler(url)
        if (fault := fault_at(url)) is not None:
            _say(f"luigid does not answer at {url}: {fault}. Asking again for some minutes.")
        self.scheduler.is_paused()  # does it answer? Luigi's worker would complain at length
        return scheduler

    def create_worker(
        self, scheduler: RemoteScheduler, worker_processes: int, assistant: bool = False
    ) -> _Helper:
        self.worker = _Helper(
            scheduler,
            worker_processes=worker_processes,
            assistant=assistant,
            keep_alive=True,
            max_keep_alive_idle_duration=IDLE,
            retry_external_tasks=True,  # else all would wait for ever for a missing file
        )
        return self.worker


def _stay(parser: CmdlineParser) -> int:
    """Work until the target is there, cannot be had, or this worker is sent away; gives the exit code."""
    codes = retcode()
    away = 0
    # The luigi command defaults to a scheduler of its own; here luigid is the default, at Luigi's default address.
    scheduler_choice = {} if is_given(LOCAL) else {LOCAL: False}
    while True:
        # Tasks and stores remember what they found, and Luigi remembers tasks.
        forget_what_was_found()
        Register.clear_instance_cache()
        task, crew = parser.get_task_obj(), _Crew()
        failures: list[str] = []
        try:
            luigi.build([task], worker_scheduler_factory=crew, **scheduler_choice)
            failures = _failures(crew.scheduler, task)
            away = 0
        except RPCError:
            away += 1
        except ExpectedError as error:
            _say(str(error))
            return int(codes.scheduling_error)
        if task.complete():
            _say(f"{task.task_family} is complete.")
            return 0
        if failures:
            _say("\n".join([f"{task.task_family} cannot be built:", *failures]))
            return int(codes.task_failed)
        if away == AWAY_TIMES:
            _say(
                "luigid does not answer: is it there, and where [core] scheduler_host and scheduler_port say?"
            )
            return int(codes.unhandled_exception)
        if crew.worker is not None and crew.worker.was_sent_away:
            _say(f"This worker was sent away before {task.task_family} was complete.")
            return int(codes.not_run)
        _say(f"{'luigid does not answer' if away else 'luigid has no work here'}: joining again.")
        time.sleep(worker_settings().wait_interval)


def _failures(scheduler: Any, task: luigi.Task) -> list[str]:
    """Which stages luigid has given up, and why, on whatever machine they ran."""
    found = []
    for task_id, node in scheduler.dep_graph(task.task_id, include_done=False).items():
        if node["status"] == DISABLED:
            fault = scheduler.fetch_error(task_id)
            why = json.loads(fault["error"]) if fault["error"] else "its workers died"
            if "Traceback" in why:  # whole where it happened
                why = why.strip().splitlines()[-1]
            found.append(f"{fault['displayName']}: {why}")
    return found


def _say(message: str) -> None:
    if logs.are_json():
        logs.event(message)
    else:
        say_message(message)
