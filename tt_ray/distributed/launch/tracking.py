"""`python -m tt_ray.distributed.launch.tracking start | stop | status | run`: MLflow as the head's service.

`start` makes it a unit of systemd where that runs, and a process of its own elsewhere; both run `run`, which
supervises. All of them read the settings in ~/.tt-ray/environment.sh.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tt_ray.distributed.launch.dumps import finished
from tt_ray.distributed.launch.supervisor import GRACE, STARTUP, UNSAVED, Service, end_leftover, supervise
from tt_ray.errors import UserError
from tt_ray.locks import is_held

UNIT = "tt-ray-mlflow.service"
STOPPING = 300.0  # seconds for the last dump


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 and one line where it cannot be done; 3 for the status of a service that does not run."""
    parser = argparse.ArgumentParser(prog="python -m tt_ray.distributed.launch.tracking")
    parser.add_argument("action", choices=("start", "stop", "status", "run"))
    action = parser.parse_args(arguments).action
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    try:
        service = Service.from_environment(os.environ)
        if action == "run":
            supervise(service)
        elif action == "start":
            print(start(service))
        elif action == "stop":
            print(stop(service))
        else:
            up = is_held(Path(service.state)) and service.answers()
            print(f"MLflow at {service.uri} {'answers' if up else 'does not run'}")
            sys.exit(0 if up else 3)
    except (UserError, OSError, sqlite3.Error, subprocess.SubprocessError) as error:
        sys.exit(f"tt-ray: {error}")


def start(service: Service) -> str:
    """Start the service, or leave it alone where it runs with the same settings; returns once it answers."""
    state = Path(service.state)
    if is_held(state) and service.running() != service:
        stop(service)
    process = None
    if not is_held(state):
        state.mkdir(parents=True, exist_ok=True)
        end_leftover(state)  # whose answers would be taken for the new one's
        if has_systemd():
            _start_unit(service)
        else:
            process = _start_process(state)
    _await_answer(service, process)
    return f"MLflow at {service.uri}, dumps in {service.dumps}"


def stop(service: Service) -> str:
    """Stop the service, which dumps its database first; says where to. `UserError` where it did not."""
    state = Path(service.state)
    if not is_held(state):
        _require_saved(service)
        return "MLflow does not run"
    if has_systemd() and _unit_path().exists():
        _systemctl("disable", "--now", UNIT)
    else:
        with suppress(ProcessLookupError):
            os.kill(_supervisor(state), signal.SIGTERM)
    deadline = time.monotonic() + STOPPING
    while is_held(state):
        if time.monotonic() > deadline:
            raise UserError(f"MLflow's service does not end; see {state / 'service.log'}")
        time.sleep(0.2)
    _require_saved(service)
    dumps = finished(service.dumps)
    return f"MLflow has been stopped, its database is in {dumps[0].path if dumps else 'no dump'}"


def _require_saved(service: Service) -> None:
    if (Path(service.state) / UNSAVED).exists():
        dumps = finished(service.dumps)
        last = f"the last dump is {dumps[0].path.name}" if dumps else f"there is no dump in {service.dumps}"
        raise UserError(
            f"MLflow has ended without dumping its database, {last}; {service.state}/service.log says why: "
            "mend that, start it with `tt-ray cluster up`, and stop it again"
        )


def has_systemd() -> bool:
    """Whether systemd runs this host, and lets us make units."""
    if not Path("/run/systemd/system").is_dir():
        return False
    allowed = subprocess.run([*_root(), "true"], capture_output=True, check=False) if _root() else None
    return allowed is None or allowed.returncode == 0


def unit(service: Service, home: Path, user: str) -> str:
    """The unit's text; a setting of the environment file that changes needs a restart, not a new unit."""
    environment, tree = home / ".tt-ray" / "environment.sh", home / "tt-ray"
    run = "exec python -m tt_ray.distributed.launch.tracking run"
    return f"""[Unit]
Description=MLflow of tt-ray's Ray cluster
After=network-online.target remote-fs.target
Wants=network-online.target
RequiresMountsFor={service.storage}
StartLimitIntervalSec=0

[Service]
User={user}
Environment=HOME={home}
ExecStart=/bin/bash -c '. {environment} && cd {tree} && {run}'
Restart=always
RestartSec=5
KillMode=mixed
TimeoutStopSec={STOPPING:.0f}

[Install]
WantedBy=multi-user.target
"""


def _start_unit(service: Service) -> None:
    import getpass

    text = unit(service, Path.home(), getpass.getuser())
    command = [*_root(), "tee", str(_unit_path())]
    subprocess.run(command, input=text.encode(), stdout=subprocess.DEVNULL, check=True)
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", UNIT)


def _systemctl(*arguments: str) -> None:
    done = subprocess.run([*_root(), "systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"systemctl {' '.join(arguments)}: {done.stderr.strip()}")


def _root() -> list[str]:
    """What to put before a command that needs to be root."""
    if os.geteuid() == 0:
        return []
    return [shutil.which("sudo") or "/usr/bin/sudo", "-n"] if shutil.which("sudo") else ["false"]


def _unit_path() -> Path:
    return Path("/etc/systemd/system") / UNIT


def _start_process(state: Path) -> subprocess.Popen[bytes]:
    """The supervisor in a session of its own, which the end of an ssh session does not touch."""
    with (state / "service.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tt_ray.distributed.launch.tracking", "run"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _supervisor(state: Path) -> int:
    """Process id of the supervisor; the file may be of an earlier one, whose id is another's by now."""
    with suppress(OSError, ValueError, psutil.Error):
        pid = int((state / "service.pid").read_text())
        if "tt_ray.distributed.launch.tracking" in psutil.Process(pid).cmdline():
            return pid
    raise UserError(f"MLflow's service runs, and {state / 'service.pid'} does not say as which process")


def _await_answer(service: Service, process: subprocess.Popen[bytes] | None) -> None:
    """Return once MLflow answers; `UserError` where it does not in time, or its supervisor has ended."""
    deadline = time.monotonic() + STARTUP + GRACE
    while not service.answers():
        if process is not None and process.poll() is not None:
            said = (Path(service.state) / "service.log").read_text(errors="replace").strip().splitlines()
            raise UserError(f"MLflow's service has ended: {said[-1] if said else 'it said nothing'}")
        if time.monotonic() > deadline:
            log = f"`journalctl -u {UNIT}`" if has_systemd() else f"{service.state}/service.log"
            raise UserError(f"MLflow at {service.uri} does not answer; see {log} and mlflow.log beside it")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
