"""The connection to Ray: a cluster of our own that leaves nothing behind, or one that is there already.

A local Ray listens on all interfaces unless the node's address is 127.0.0.1, and it only believes in that address
where clusters are switched off (`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`; read in Ray 2.60's services.py and checked by a test
that lists the listening sockets). Token authentication is on by default, with a token file that everybody can
read; we give Ray a token of this session through the environment instead, unless the user has made a choice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rolecall.placement.watch import Watch
from rolecall.protocols.errors import ConfigError, MemberLost, UserError

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ATTEMPTS = 3  # to start a local Ray on a machine that is too busy
PROBE = 2.0  # seconds that the head may take to accept a connection


@dataclass(frozen=True)
class Connection:
    """A Ray cluster that this process is connected to.

    Args:
        address: "host:port" of its head.
        started: whether it is ours, and goes when the connection is closed.
        folder: Ray's files, when it is ours. watch: over what it leaves behind, when it is ours.
    """

    address: str
    started: bool
    folder: Path | None = None
    watch: Watch | None = field(default=None, repr=False, compare=False)

    def check(self, waiting_for: str = "") -> None:
        """Raise MemberLost unless the cluster's head still accepts connections.

        Ray's own calls would wait for a head that is gone for a minute or more, and then end the process.
        """
        if not answers(self.address):
            doing = f" while waiting for {waiting_for}" if waiting_for else ""
            raise MemberLost(
                f"The Ray cluster at {self.address} does not answer any more{doing}. "
                "Do: start it again (or give another address), then the run.",
                role="cluster",
                rank=-1,
                node=self.address,
                verb="connect",
                remote="",
            )


@contextlib.contextmanager
def connect(address: str | None = None) -> Iterator[Connection]:
    """A connection to Ray for the time of the block.

    Args:
        address: None starts a local Ray, which is stopped at the end, also after an exception or a signal, and by a watcher
            process even after SIGKILL of this one. "host:port" or "auto" joins a cluster. Where this process is
            connected already, that connection is used and left open.

    Raises:
        ConfigError: an address that can't be used. UserError: nobody answers there.
    """
    import ray

    if ray.is_initialized():
        yield Connection(ray.get_runtime_context().gcs_address, started=False)
    elif address is None or address == "local":
        with _local() as connection:
            yield connection
    else:
        with _join(address) as connection:
            yield connection


def answers(address: str, deadline: float = PROBE) -> bool:
    """Whether something accepts connections at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=deadline):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _join(address: str) -> Iterator[Connection]:
    import ray

    if "://" in address:
        remedy = "run the controller on a node of the cluster and give host:port"
        raise ConfigError("A controller can't run through a Ray client.", ask=address, remedy=remedy)
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            remedy = "give host:port of the cluster's head, such as 10.0.0.5:6379, or auto"
            raise ConfigError("That is no address.", ask=address, remedy=remedy)
        if not answers(address):
            remedy = "start one (ray start --head), correct the address, or leave it out to run locally"
            raise UserError("No Ray cluster answers.", ask=address, remedy=remedy)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        remedy = "check the address, Ray's version and its token"
        raise UserError(f"The Ray cluster can't be joined: {error}.", ask=address, remedy=remedy) from error
    connection = Connection(ray.get_runtime_context().gcs_address, started=False)
    try:
        yield connection
    finally:
        with unhurried():
            if answers(connection.address):
                ray.shutdown()


@contextlib.contextmanager
def _local() -> Iterator[Connection]:
    for attempt in range(ATTEMPTS):
        with contextlib.ExitStack() as stack:
            folder, watch = stack.enter_context(_folder())
            stack.enter_context(_environment(folder))
            if not _start(folder, last=attempt == ATTEMPTS - 1):
                continue  # what did start is swept up on the way
            stack.callback(_stop)
            import ray

            yield Connection(ray.get_runtime_context().gcs_address, started=True, folder=folder, watch=watch)
            return


def _start(folder: Path, *, last: bool) -> bool:
    """Start Ray; False where it gave up because the machine is too busy (its limit of 30 s is fixed in its code)."""
    import ray

    try:
        # Ray opens its folder to everybody (mode 0777); the folder around it stays ours alone (0700).
        ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False, _temp_dir=str(folder / "ray"))
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        if last:
            have = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
            remedy = "end other work on this machine, or give the address of a cluster that runs"
            raise UserError(f"Ray did not start in {ATTEMPTS} attempts of 30 s.", have=have, remedy=remedy) from error
        return False
    return True


def _stop() -> None:
    import ray

    with unhurried():
        ray.shutdown()


@contextlib.contextmanager
def _folder() -> Iterator[tuple[Path, Watch]]:
    """A folder for a local cluster, watched from before the cluster is started until nothing of it is left."""
    parent = None if len(tempfile.gettempdir()) <= 24 else "/tmp"  # noqa: S108 (the paths of Ray's sockets must stay below 107 characters)
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir=parent))
    watch = Watch(folder)
    try:
        yield folder, watch
    finally:
        with unhurried():
            watch.close()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What the processes of a local cluster inherit: the mark by which the watcher knows them, loopback, a token."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] # its stub leaves them out

    wanted = {"ROLECALL_CLUSTER": str(folder), LOOPBACK: "0"}
    ours = not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if ours:
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in wanted}
    clusters = ray_constants.ENABLE_RAY_CLUSTER

    def refresh() -> None:
        if ours:
            Config.initialize("")  # Ray caches both
            AuthenticationTokenLoader.instance().reset_cache()

    os.environ.update(wanted)
    ray_constants.ENABLE_RAY_CLUSTER = False
    refresh()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        refresh()


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM during the block, which is bounded in time: it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
