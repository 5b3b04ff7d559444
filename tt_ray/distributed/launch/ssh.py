"""Hosts over ssh: commands, files, and tunnels that listen on this machine's loopback alone."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]

from tt_ray.errors import UserError

CONNECT = 15.0  # seconds for a connection
UNREACHABLE = 255  # what ssh exits with where it is itself at fault
NOT_SET_UP = 91  # what `module` exits with where the host is in no cluster
_ENVIRONMENT = "~/.tt-ray/environment.sh"


def call(
    command: list[str],
    *,
    input: str | None = None,
    timeout: float | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program of this machine to its end; `UserError` where it is not installed or takes too long."""
    try:
        return subprocess.run(
            command,
            input="" if input is None else input,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            cwd=cwd,
            env=None if environment is None else dict(environment),
        )
    except FileNotFoundError:
        raise missing(command[0]) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{Path(command[0]).name} has not ended after {timeout:.0f} s") from None


def missing(program: str) -> UserError:
    """That a program is not on this machine."""
    return UserError(f"{Path(program).name} is not installed on this machine; clusters need it")


def need(*programs: str) -> None:
    """`UserError` for the first of `programs` that this machine lacks."""
    for program in programs:
        if shutil.which(program) is None:
            raise missing(program)


@dataclass(frozen=True)
class Host:
    """A host, and how to log in there."""

    address: str
    user: str
    key: Path
    known: Path
    """File of the cluster's host keys: a new host's is taken, another one for a known address refused."""
    proxy: str | None = None

    @property
    def options(self) -> list[str]:
        """Of ssh."""
        options = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "ConnectTimeout": f"{CONNECT:.0f}",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "3",
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": str(self.known),
            "LogLevel": "ERROR",
        }
        if self.proxy:
            options["ProxyCommand"] = self.proxy
        return ["-i", str(self.key), *(f"-o{key}={value}" for key, value in options.items())]

    @property
    def login(self) -> str:
        """As ssh names it."""
        return f"{self.user}@{self.address}"

    def run(self, command: str, *, timeout: float = 120.0, input: str | None = None) -> str:
        """What a shell command prints there; `UserError` where it fails, with the last that it said."""
        self.known.parent.mkdir(parents=True, exist_ok=True)
        done = call(["ssh", *self.options, self.login, command], timeout=timeout, input=input)
        if done.returncode == 0:
            return done.stdout
        raise self._fault(done.returncode, done.stderr or done.stdout)

    def module(self, name: str, *arguments: str, timeout: float = 120.0, input: str | None = None) -> str:
        """What a module of `tt_ray.distributed.launch` prints there, in the cluster's environment."""
        return self.run(module_command(name, *arguments), timeout=timeout, input=input)

    def lines(self, name: str, *arguments: str) -> Iterator[str]:
        """The lines that such a module prints, as they come."""
        self.known.parent.mkdir(parents=True, exist_ok=True)
        command = ["ssh", *self.options, self.login, module_command(name, *arguments)]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                yield from process.stdout
                said = process.stderr.read()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise self._fault(process.returncode, said)

    def send(self, source: Path, folder: str) -> None:
        """Make `folder` there like the folder `source` here; what is there already is not sent again."""
        need("rsync")
        self.known.parent.mkdir(parents=True, exist_ok=True)
        shell = shlex.join(["ssh", *self.options])
        target = f"{self.login}:{folder}/"
        done = call(["rsync", "-aL", "--delete", "--protect-args", "-e", shell, f"{source}/", target])
        if done.returncode:
            raise self._fault(done.returncode, done.stderr)

    def copy(self, source: Path, target: str) -> None:
        """Copy a file or a folder to `target` there, beside what that holds already; not compiled Python."""
        need("rsync")
        self.run(f"mkdir -p {_quoted(str(PurePosixPath(target).parent))}")
        shell, what = shlex.join(["ssh", *self.options]), f"{source}/" if source.is_dir() else str(source)
        exclude = "--exclude=__pycache__"
        done = call(["rsync", "-a", exclude, "-e", shell, what, f"{self.login}:{target.removeprefix('~/')}"])
        if done.returncode:
            raise self._fault(done.returncode, done.stderr)

    @contextmanager
    def tunnel(self, target: str) -> Iterator[int]:
        """A port of this machine's loopback that leads to `target` (host:port, as seen there) for a block."""
        self.known.parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        command = ["ssh", *self.options, "-o", "ExitOnForwardFailure=yes", "-N"]
        process = subprocess.Popen(
            [*command, "-L", f"127.0.0.1:{port}:{target}", self.login],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who then still need it
        )
        try:
            self._await(process, port)
            yield port
        finally:
            process.terminate()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def _await(self, process: subprocess.Popen[str], port: int) -> None:
        deadline = time.monotonic() + 2 * CONNECT
        while process.poll() is None and time.monotonic() < deadline:
            if _listens(process.pid, port):
                return
            time.sleep(0.1)
        said = process.stderr.read() if process.poll() is not None and process.stderr else "no answer"
        raise self._fault(UNREACHABLE, said)

    def _fault(self, code: int, said: str) -> UserError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1].removeprefix("tt-ray: ") if lines else f"exit code {code}"
        if code == NOT_SET_UP:
            return UserError(f"{self.address} is in no cluster: `tt-ray cluster up` sets one up")
        if code == UNREACHABLE:
            if any("HOST IDENTIFICATION HAS CHANGED" in line for line in lines):
                last = f"it has another host key than before; if that is right, remove {self.known}"
            return UserError(f"{self.login} cannot be reached by ssh: {last}")
        return UserError(f"{self.address}: {last}")


def module_command(name: str, *arguments: str) -> str:
    """A shell command for a host of a cluster."""
    run = shlex.join(["python", "-m", f"tt_ray.distributed.launch.{name}", *arguments])
    return f"[ -r {_ENVIRONMENT} ] || exit {NOT_SET_UP}; . {_ENVIRONMENT} && cd ~/tt-ray && {run}"


def _quoted(path: str) -> str:
    """A path for a host's shell, which is to read its tilde."""
    return (
        "~/" + shlex.quote(path[2:]) if path.startswith("~/") else path if path == "~" else shlex.quote(path)
    )


def _listens(pid: int, port: int) -> bool:
    """Whether that process itself does: another's listener on the port would be taken for the tunnel."""
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp4")
        return any(one.status == psutil.CONN_LISTEN and one.laddr[1] == port for one in connections)
    return False


def free_port() -> int:
    """A port of the loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
