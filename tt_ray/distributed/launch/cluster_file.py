"""What a user's own machine has to know of a cluster: its file, as `ray up` reads it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tt_ray.distributed.launch.ssh import Host, call
from tt_ray.errors import UserError

PROVIDERS = ("local", "aws")
UNSET = "CHANGE-ME"
_SETTING = re.compile(r"^\s*export (\w+)=(.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """A cluster file whose own settings have been found to be complete."""

    path: Path
    name: str
    provider: str
    """One of PROVIDERS."""
    head: str | None
    """None where the cloud gives it its address."""
    workers: tuple[str, ...]
    """Addresses of all workers; empty in a cloud."""
    user: str
    key: Path
    proxy: str | None
    """An ssh ProxyCommand."""
    mounts: Mapping[str, Path]
    """What is copied to the hosts, by its place there."""
    worker_setup: tuple[str, ...]
    """Commands that prepare a worker; they are told RAY_HEAD_IP."""
    worker_start: tuple[str, ...]
    """Commands that then start Ray there."""
    settings: Mapping[str, str]
    """The exports of its settings, as they stand there."""

    @property
    def storage(self) -> str:
        """Folder of the shared storage, on every host."""
        return self.settings["TT_RAY_STORAGE"]

    def host(self, address: str) -> Host:
        """A host of the cluster."""
        return Host(address, self.user, self.key, own_folder() / "known_hosts" / self.name, self.proxy)

    def head_host(self) -> Host:
        """The head; `UserError` where the cluster does not run."""
        return self.host(self.head or _head_in_cloud(self.path))


def own_folder() -> Path:
    """Where this user's token and the keys of known hosts are kept."""
    return Path.home() / ".tt-ray"


def token_file() -> Path:
    """This user's token for all of their clusters; it need not exist."""
    return own_folder() / "auth_token"


def load_cluster(path: Path) -> ClusterFile:
    """Read a cluster file; `UserError` where it is none, or is not filled in."""
    data = _read(path)
    provider, auth = _section(path, data, "provider"), _section(path, data, "auth")
    kind = provider.get("type")
    if kind not in PROVIDERS:
        said = repr(kind) if isinstance(kind, str) else "no text"  # aliases in YAML can make a value endless
        raise UserError(f"{path}: provider.type is {said}, and tt-ray knows {' and '.join(PROVIDERS)}")
    head = _text(path, provider, "provider", "head_ip") if kind == "local" else None
    workers = provider.get("worker_ips", []) if kind == "local" else []
    if not isinstance(workers, list) or not all(isinstance(worker, str) for worker in workers):
        raise UserError(f"{path}: provider.worker_ips: write a list of addresses, [192.0.2.11, 192.0.2.12]")
    proxy = auth.get("ssh_proxy_command")
    return ClusterFile(
        path=path,
        name=_name(path, _text(path, data, "", "cluster_name")),
        provider=kind,
        head=head,
        workers=tuple(workers),
        user=_text(path, auth, "auth", "ssh_user"),
        key=_key(path, _text(path, auth, "auth", "ssh_private_key")),
        proxy=proxy if isinstance(proxy, str) else None,
        mounts={name: _mount(path, source) for name, source in _section(path, data, "file_mounts").items()},
        worker_setup=_commands(path, data, "setup_commands") + _commands(path, data, "worker_setup_commands"),
        worker_start=_commands(path, data, "worker_start_ray_commands"),
        settings=_settings(path, data),
    )


def _name(path: Path, name: str) -> str:
    """It becomes a file's name, here and on the hosts."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{path}: cluster_name {name!r}: use letters, digits, dots, dashes and underscores")
    return name


def check_schema(path: Path) -> None:
    """`UserError` where Ray would not take the file."""
    import logging

    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)  # else it warns of each file that is copied
    try:
        validate_config(prepare_config(yaml.safe_load(path.read_text())))
    except SystemExit:
        raise UserError(f"{path}: Ray does not take this file; what it said stands above") from None
    except Exception as error:  # of jsonschema, or whatever Ray stumbles over
        place = ".".join(map(str, getattr(error, "absolute_path", ())))
        reason = str(getattr(error, "message", error)).splitlines()[0]
        raise UserError(f"{path}: {place + ': ' if place else ''}{reason}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        data = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the cluster's file") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(data, dict) or not {"cluster_name", "provider"} <= data.keys():
        raise UserError(f"{path}: this is no cluster file: it has no cluster_name and provider")
    code = "\n".join(line.partition("#")[0] for line in text.splitlines())
    if UNSET in code:
        line = code[: code.index(UNSET)].count("\n") + 1
        raise UserError(f"{path}:{line}: {UNSET} is still to be replaced by a value of yours")
    return data


def _section(path: Path, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name}: this is no section with keys")
    return section


def _text(path: Path, section: Mapping[str, Any], name: str, key: str) -> str:
    value = section.get(key)
    if not isinstance(value, str) or not value or value.startswith("-"):
        raise UserError(f"{path}: {name + '.' if name else ''}{key} is missing, or is no text")
    return value


def _key(path: Path, name: str) -> Path:
    key = _expanded(path, name)
    if not key.is_file():
        raise UserError(f"{path}: auth.ssh_private_key: there is no file {key}")
    return key


def _mount(path: Path, source: Any) -> Path:
    if not isinstance(source, str):
        raise UserError(f"{path}: file_mounts: a path of this machine is no text")
    return path.parent / _expanded(path, source)


def _expanded(path: Path, name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: {name}: there is no such user on this machine") from None


def _commands(path: Path, data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    commands = data.get(key, [])
    if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
        raise UserError(f"{path}: {key}: write a list of shell commands")
    return tuple(commands)


def _settings(path: Path, data: Mapping[str, Any]) -> dict[str, str]:
    """The exports in the command that writes them on every host."""
    texts = _commands(path, data, "setup_commands")
    found = {}
    for name, value in _SETTING.findall("\n".join(text for text in texts if "settings.sh" in text)):
        try:
            found[name] = "".join(shlex.split(value, comments=True)[:1])
        except ValueError as error:
            raise UserError(f"{path}: setup_commands: {name}: {error}") from None
    if not found.get("TT_RAY_STORAGE", "").startswith("/"):
        raise UserError(f"{path}: setup_commands: TT_RAY_STORAGE is not set there to an absolute path")
    return found


def _head_in_cloud(path: Path) -> str:
    """The head's public address, asked of the cloud."""
    command = [str(Path(sys.executable).parent / "ray"), "get-head-ip", path.name]
    done = call(command, cwd=path.parent, environment={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        reason = lines[-1] if lines else "ray get-head-ip says nothing"
        raise UserError(f"{path}: no head was found: {reason}; start one with `tt-ray cluster up {path}`")
    return lines[-1].strip()
