"""Whether a Ray cluster lets this build in, found out in a process that can be killed.

Ray itself asks again for a long time where nothing answers or the token is wrong, and fills the terminal meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from tempfile import TemporaryFile

ANSWER_TIMEOUT_S = 10.0
IMPORT_TIMEOUT_S = 60.0
"""For loading Ray, which is slow on network disks."""
POLL_S = 0.05
MAX_OUTPUT_BYTES = 2**16
READY = "spctrl: Ray is loaded"
WRONG_TOKEN, NO_TOKEN = "InvalidAuthToken", "AuthenticationError"
"""What the output of Ray says of a token that the cluster, or this machine, does not take."""
MODE = "RAY_AUTH_MODE"
START_HINT = (
    "Start one with `ray start --head`, or join this machine to one with `ray start --address host:port`; or set "
    "kind = local"
)
TOKEN_HINT = "RAY_AUTH_TOKEN (or in a file that RAY_AUTH_TOKEN_PATH names)"


def fault_at(address: str) -> str | None:
    """Why no Ray cluster can be joined at an address, where that is so.

    Args:
        address: ``host:port`` of the cluster's head, or ``auto``.

    Returns:
        what was found and what to do; None where the cluster answers, or where only Ray itself can tell.
    """
    command = [sys.executable, "-P", __file__, address]
    with (
        TemporaryFile() as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            return _watch(process, output.fileno())
        finally:
            process.kill()


def _watch(process: subprocess.Popen[bytes], output: int) -> str | None:
    """Wait until the process ends, says that it was refused, or has had its time."""
    deadline, is_ready = time.monotonic() + IMPORT_TIMEOUT_S, False
    while True:
        code = process.poll()
        text = os.pread(output, MAX_OUTPUT_BYTES, 0).decode(errors="replace")
        if WRONG_TOKEN in text or NO_TOKEN in text:
            return _token_fault(os.environ, is_missing=WRONG_TOKEN not in text)
        if code is not None:
            return None if code == 0 else f"no Ray head answers there ({_last_line(text)}). {START_HINT}"
        if not is_ready and READY in text:
            deadline, is_ready = time.monotonic() + ANSWER_TIMEOUT_S, True
        if time.monotonic() > deadline:
            return f"no Ray head answers there within {ANSWER_TIMEOUT_S:g} s. {START_HINT}"
        time.sleep(POLL_S)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _token_fault(environment: Mapping[str, str], *, is_missing: bool) -> str:
    mode = environment.get(MODE)
    if mode is not None and mode.lower() == "token":
        found = "none that can be read" if is_missing else "another token"
    else:
        found = f"{MODE} = {mode}" if mode else f"no {MODE} and no token"
    return (
        f"it asks for a token: expected {MODE} = token and the cluster's token in {TOKEN_HINT}, found {found}"
    )


def _ask(address: str) -> None:
    """What the process does. The names are Ray's own; a version without them leaves the answer to ``ray.init``."""
    try:
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
    except ImportError:
        return
    try:
        from ray._private.authentication import authentication_token_setup as setup

        # As ray.init does; the client below would abort without a token.
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        setup.ensure_token_if_auth_enabled(create_token_if_missing=False)
    except (ImportError, AttributeError, TypeError):
        pass  # of a version without tokens
    print(READY, flush=True)  # noqa: T201 - for the parent
    if (head := canonicalize_bootstrap_address(address)) is not None:
        GcsClient(address=head)


if __name__ == "__main__":
    _ask(*sys.argv[1:])
