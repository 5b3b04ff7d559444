"""`ray up` and `ray down`, with what they leave undone.

Ray 2.60 does three things wrong with hosts of one's own. Its second autoscaler leaves one worker out, so
that the first is asked for. That one gives a worker up whose start has failed once (joining.py). And
`ray down` ends Ray on the head alone; the workers are ended here.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tt_ray.distributed.launch.cluster_file import ClusterFile, check_schema, own_folder, token_file
from tt_ray.distributed.launch.joining import await_workers
from tt_ray.distributed.launch.report import Report
from tt_ray.distributed.launch.ssh import Host, need
from tt_ray.errors import UserError

LAST_DUMP = 330.0  # seconds for MLflow to end, its last dump included

Say = Callable[[str], None]


def up(cluster: ClusterFile, *, yes: bool, say: Say) -> Report:
    """Start the cluster, or bring a running one to what its file says; what it then consists of.

    Hosts of one's own have all joined when this returns; in a cloud the autoscaler starts workers as they are
    needed. `UserError` where anything is missing, before anything is changed if that can be known.
    """
    need("ssh", "rsync")
    check_schema(cluster.path)
    make_token()
    for source in cluster.mounts.values():
        if not source.exists():
            raise UserError(
                f"{cluster.path}: file_mounts: there is no {source}: keep the file in tt-ray's folder"
            )
    if cluster.provider == "aws":
        _need_aws()
    else:
        _on_all([cluster.host(address) for address in _addresses(cluster)], lambda host: host.run("true"))
    _ray(cluster, ["up", "--no-config-cache"], yes)
    return await_workers(cluster, say)


def down(cluster: ClusterFile, *, yes: bool, force: bool, say: Say) -> str:
    """End the cluster; what became of the tracking database, in a line.

    The database is dumped to the shared storage first. `UserError` where that fails, and nothing has been
    ended then (unless `force`); or where Ray still runs somewhere at the end.
    """
    need("ssh")
    dumped = _dump(cluster, force)
    say(dumped)
    _ray(cluster, ["down"], yes)
    if cluster.provider == "local":
        _halt(cluster)
    (own_folder() / "known_hosts" / cluster.name).unlink(missing_ok=True)
    return dumped


def make_token() -> Path:
    """This user's token, made if it is missing; only the user may read it."""
    path = token_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    if not path.exists():
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)  # unless another command was faster
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    path.chmod(0o600)
    return path


@contextmanager
def as_client() -> Iterator[None]:
    """Let this process's Ray clients show the user's token; `UserError` where there is none."""
    if not token_file().exists():
        raise UserError(f"there is no {token_file()}: only the user who started the cluster can talk to it")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file())
    yield


def _dump(cluster: ClusterFile, force: bool) -> str:
    """Stop MLflow, which dumps its database."""
    try:
        head = cluster.head_host()
        set_up = head.run("[ -r ~/.tt-ray/environment.sh ] && echo yes || echo no")
        if set_up.strip() != "yes":
            return "MLflow was never set up on the head"
        return head.module("tracking", "stop", timeout=LAST_DUMP).strip()
    except UserError as error:
        if force:
            return f"MLflow's database was not dumped: {error}"
        raise UserError(
            f"{error}; nothing was ended. With --force it is, and MLflow's last minutes are lost"
        ) from None


def _halt(cluster: ClusterFile) -> None:
    """End Ray on every host; `UserError` names those where it runs on, or nobody knows."""
    problems = []
    hosts = [cluster.host(address) for address in _addresses(cluster)]
    with ThreadPoolExecutor(len(hosts)) as pool:
        for future in [pool.submit(host.module, "halt") for host in hosts]:
            try:
                future.result()
            except UserError as error:
                if "is in no cluster" not in str(error):
                    problems.append(str(error))
    if problems:
        raise UserError(f"not everything has ended: {'; '.join(problems)}")


def _ray(cluster: ClusterFile, command: Sequence[str], yes: bool) -> None:
    """Run `ray ...`, which speaks to the user itself; `UserError` where it fails."""
    environment = {
        **os.environ,
        "RAY_UP_enable_autoscaler_v2": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file()),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ray = str(Path(sys.executable).parent / "ray")
    style = ["--log-style=pretty", f"--log-color={'auto' if sys.stdout.isatty() else 'false'}"]
    arguments = [ray, *command, *style, *(["--yes"] if yes else []), cluster.path.name]
    done = subprocess.run(arguments, cwd=cluster.path.parent, env=environment, check=False)
    if done.returncode:
        raise UserError(f"`ray {command[0]}` failed with code {done.returncode}; what it said stands above")


def _addresses(cluster: ClusterFile) -> list[str]:
    return [*([cluster.head] if cluster.head else []), *cluster.workers]


def _on_all(hosts: Sequence[Host], action: Callable[[Host], object]) -> None:
    """Do something on all hosts at once; the first `UserError` of any."""
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        list(pool.map(action, hosts))


def _need_aws() -> None:
    import importlib.util

    if importlib.util.find_spec("boto3") is None:
        raise UserError("AWS needs a further package: pip install 'tt-ray[aws]'")
