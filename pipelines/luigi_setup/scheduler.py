"""Which scheduler a command uses: one in its own process, unless luigid is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import luigi
from luigi import interface
from luigi.cmdline_parser import CmdlineParser
from luigi.rpc import RemoteScheduler, RPCError

from pipelines.luigi_setup.worker import StageWorker
from spctrl.errors import ExpectedError
from spctrl.output.secrets import masked, remember

LOCAL = "local_scheduler"
LUIGID = ("scheduler_host", "scheduler_port", "scheduler_url")
DEPRECATED = "default_"
"""What the names of ``LUIGID`` started with in older settings files; Luigi still reads those."""
ANSWER_TIMEOUT_S = 3.0


def is_given(name: str) -> bool:
    """Whether a settings file or the command line has a setting of [core]."""
    parser = CmdlineParser.get_instance()
    config = luigi.configuration.get_config()
    return bool(parser and getattr(parser.known_args, f"core_{name}", None)) or any(
        config.has_option("core", each) for each in (name, DEPRECATED + name)
    )


def fault_at(url: str) -> str | None:
    """Why luigid does not answer at a web address, where it does not.

    It is asked once, as Luigi asks (through the same proxies), with little patience.
    """
    remember(url)
    scheduler: Any = RemoteScheduler(url, connect_timeout=ANSWER_TIMEOUT_S)
    # Luigi has no parameters for these: it would ask three times, half a minute apart, and log each traceback.
    scheduler._rpc_retry_attempts, scheduler._rpc_log_retries = 1, False
    try:
        scheduler.is_paused()
    except RPCError as error:
        return _reason(error.sub_exception or error)
    except (ValueError, KeyError, TypeError):
        return "something answers there that is not luigid"
    finally:
        scheduler.close()
    return None


def _reason(error: BaseException) -> str:
    """What the operating system said, where it said something; libraries wrap that several times."""
    found = list(_chain(error))
    system = [each.strerror for each in found if isinstance(each, OSError) and each.strerror]
    if system:
        return system[-1]
    if any(isinstance(each, TimeoutError) for each in found):
        return f"no answer within {ANSWER_TIMEOUT_S:g} s"
    return str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _Factory(interface._WorkerSchedulerFactory):
    """Luigi's own, but a luigid that does not answer at the start ends the command at once.

    Later Luigi asks it again and again, so that workers outlive a restart of luigid.
    """

    def create_remote_scheduler(self, url: str) -> Any:
        if (fault := fault_at(url)) is not None:
            raise ExpectedError(
                f"expected luigid at {masked(url)}, found none: {masked(fault)}. Start it there, or remove "
                f"{', '.join(LUIGID)} and {LOCAL} = false from [core] of the settings and from the command line to "
                "build on this machine alone"
            )
        return super().create_remote_scheduler(url)

    def create_worker(self, scheduler: Any, worker_processes: int, assistant: bool = False) -> StageWorker:
        return StageWorker(scheduler, worker_processes=worker_processes, assistant=assistant)


def _core_values(cls: type[interface.core], params: Any, args: Any, kwargs: Any) -> Any:
    """The settings of [core], with the scheduler of a command where nothing chooses one."""
    is_command = CmdlineParser.get_instance() is not None  # not luigi.build() of a notebook or a script
    if is_command and LOCAL not in kwargs and not any(map(is_given, (LOCAL, *LUIGID))):
        kwargs = {**kwargs, LOCAL: True}
    return super(interface.core, cls).get_param_values(params, args, kwargs)


def install() -> None:
    """Make this the way that the ``luigi`` command chooses its scheduler.

    The command has no hook for either. A default in the settings cannot do it: Luigi could then not tell it from a
    user's own ``local_scheduler = true``, which counts although a host is given, and a host on the command line or in
    an old copy of configs/cluster.cfg would be passed over.
    """
    interface.core.get_param_values = classmethod(_core_values)  # type: ignore[method-assign, assignment]
    interface._WorkerSchedulerFactory = _Factory  # type: ignore[misc]
