"""Prepare a host, before Ray starts on it: the shared storage is there, and every shell knows the cluster.

`python -m tt_ray.distributed.launch.host` reads the settings of the cluster file from the environment and
writes ~/.tt-ray/environment.sh, which the start commands, Ray's own `ray stop` and the user's logins read.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tt_ray.errors import UserError
from tt_ray.files import whole_file

MLFLOW_PORT = 5000
BOOTSTRAP = "ray_bootstrap_config.yaml"  # what `ray up` leaves in the head's home, and on no worker
MARKER = ".tt-ray-head"
_SOURCE = '[ -r "$HOME/.tt-ray/environment.sh" ] && . "$HOME/.tt-ray/environment.sh"  # tt-ray'
_TRY = """\
tt_ray_try() {  # Ray gives a host up whose start has failed once
    "$@" || { ray stop; "$@"; } || { ray stop; "$@"; }
}"""
_SEEN_WITHIN = 15.0  # seconds until a file of the head is seen through a network disk


def main() -> None:
    """Exit code 1 and one line where the host cannot serve."""
    try:
        print(prepare(Path.home(), os.environ))
    except (UserError, OSError) as error:
        sys.exit(f"tt-ray: {socket.gethostname()}: {error}")


def prepare(home: Path, settings: Mapping[str, str]) -> str:
    """Check the storage and write the environment file; what has been found, in a line."""
    given = settings.get("RAY_HEAD_IP", "")  # Ray tells its workers, not the head
    head = given or head_address(home)
    storage = Path(settings["TT_RAY_STORAGE"])
    check_storage(storage, head, is_head=not given)
    folder = home / ".tt-ray"
    folder.mkdir(exist_ok=True)
    with whole_file(folder / "environment.sh") as path:
        path.write_text(environment(head, storage, Path(settings["TT_RAY_VENV"])))
    _greet(home / ".bashrc")
    return f"{'worker' if given else 'head'} of the cluster at {head}, storage {storage}"


def environment(head: str, storage: Path, venv: Path) -> str:
    """The shell file: the settings, and what follows from them."""
    variables = {
        "TT_RAY_HEAD_ADDRESS": head,
        "MLFLOW_TRACKING_URI": f"http://{head}:{MLFLOW_PORT}",
        "MINARI_DATASETS_PATH": str(storage / "datasets"),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_autoscaler_v2": "0",  # v2 leaves one worker of a local cluster out
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    programs = shlex.quote(str(venv / "bin"))
    path = f'case ":$PATH:" in *:{programs}:*) ;; *) export PATH={programs}:"$PATH" ;; esac'
    own = 'export RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token" PYTHONPATH="$HOME/tt-ray"'
    return "\n".join(['. "$HOME/.tt-ray/settings.sh"', *lines, own, path, _TRY, ""])


def head_address(home: Path) -> str:
    """This host's own address in the cluster, where it is the head."""
    import yaml

    try:
        provider = yaml.safe_load((home / BOOTSTRAP).read_text())["provider"]
    except FileNotFoundError:
        raise UserError(f"~/{BOOTSTRAP} is missing: run `tt-ray cluster up` on your own machine") from None
    if "head_ip" in provider:
        return socket.gethostbyname(provider["head_ip"])
    import ray

    return str(ray.util.get_node_ip_address())


def check_storage(storage: Path, head: str, *, is_head: bool) -> None:
    """Make the folders on the shared storage; a worker checks that it is the head's own.

    `UserError` where it cannot be written, or is another folder than the head's.
    """
    marker = storage / MARKER
    try:
        if is_head:
            for name in ("datasets", "runs", "mlflow"):
                (storage / name).mkdir(parents=True, exist_ok=True)
            with whole_file(marker) as path:
                path.write_text(head)
            return
        with whole_file(storage / f".tt-ray-{socket.gethostname()}") as path:
            path.touch()
        (storage / f".tt-ray-{socket.gethostname()}").unlink()
    except OSError as error:
        raise UserError(f"TT_RAY_STORAGE={storage} cannot be written: {error.strerror}") from None
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (marker.exists() and marker.read_text() == head):
        if time.monotonic() > deadline:
            raise UserError(f"TT_RAY_STORAGE={storage} is not the folder that the head at {head} has there")
        time.sleep(0.5)


def _greet(bashrc: Path) -> None:
    """Let shells read the environment: from the first line on, since many files end early for scripts."""
    before = bashrc.read_text() if bashrc.exists() else ""
    if _SOURCE not in before:
        mode = bashrc.stat().st_mode & 0o777 if bashrc.exists() else 0o644
        with whole_file(bashrc) as path:
            path.write_text(f"{_SOURCE}\n{before}")
            path.chmod(mode)


if __name__ == "__main__":
    main()
