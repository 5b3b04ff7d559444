"""The shipped cluster files: Ray takes them, they are in step, and spot instances have their fall-back."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tt_ray.distributed.launch.spot import score

ROOT = Path(__file__).parents[3]
LOCAL, AWS = ROOT / "cluster.local.yaml", ROOT / "cluster.yaml"


def prepared(path: Path) -> dict[str, Any]:
    """As Ray completes and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return dict(config)


@pytest.mark.parametrize("path", [LOCAL, AWS], ids=lambda path: path.name)
def test_ray_takes_the_file(path: Path) -> None:
    config = prepared(path)
    assert config["cluster_name"] == "tt-ray"
    for source in config["file_mounts"].values():
        assert source.startswith("~") or (ROOT / source).exists()
    broken = yaml.safe_load(path.read_text()) | {"hed_start_ray_commands": []}
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="hed_start_ray_commands"):
        validate_config(prepare_config(broken))


def test_both_files_do_the_same_on_a_host() -> None:
    local, aws = (yaml.safe_load(path.read_text()) for path in (LOCAL, AWS))
    for key in ("file_mounts", "rsync_exclude", "head_start_ray_commands", "worker_start_ray_commands"):
        assert local[key] == aws[key], key
    install = local["head_setup_commands"]
    assert local["worker_setup_commands"] == install
    for key in ("head_setup_commands", "worker_setup_commands"):
        assert aws[key][-len(install) :] == install


def test_settings_are_the_same_but_for_what_a_cloud_adds() -> None:
    names = [set(re.findall(r"export (\w+)=", settings(path))) for path in (LOCAL, AWS)]
    assert names[1] - names[0] == {"TT_RAY_NFS", "RAY_AUTOSCALER_UTILIZATION_SCORER"}
    assert names[0] <= names[1]


@pytest.mark.parametrize("path", [LOCAL, AWS], ids=lambda path: path.name)
def test_what_a_user_changes_stands_above_the_line(path: Path) -> None:
    head, _, rest = path.read_text().partition("# " + "-" * 118 + "\n")
    assert rest
    for key in ("provider:", "auth:", "setup_commands:"):
        assert f"\n{key}" in head
        assert f"\n{key}" not in rest
    assert "CHANGE-ME" not in rest
    for line in head.splitlines():
        if re.match(r"\s+export TT_RAY_(NFS|STORAGE|PYTHON|DATABASE|HEAD_OPTIONS)=", line):
            assert "# " in line, line


@pytest.mark.parametrize("path", [LOCAL, AWS], ids=lambda path: path.name)
def test_nothing_listens_for_the_world(path: Path) -> None:
    code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
    assert "0.0.0.0" not in code
    assert "--dashboard-host=127.0.0.1" in code
    assert yaml.safe_load(path.read_text())["file_mounts"]["~/.ray/auth_token"] == "~/.tt-ray/auth_token"


def test_every_worker_of_the_cloud_is_tagged_and_has_an_on_demand_twin() -> None:
    config = prepared(AWS)
    kinds = config["available_node_types"]
    for name, kind in kinds.items():
        tags = {tag["Key"] for tag in kind["node_config"]["TagSpecifications"][0]["Tags"]}
        assert {"project", "owner"} <= tags
        if not name.endswith("_spot"):
            assert "InstanceMarketOptions" not in kind["node_config"]
            continue
        twin = kinds[name.removesuffix("_spot")]
        assert twin["resources"] == kind["resources"] | {"on_demand": 1}
        assert twin["node_config"]["InstanceType"] == kind["node_config"]["InstanceType"]
    assert sum(name.endswith("_spot") for name in kinds) == 3
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert config["idle_timeout_minutes"] <= 15


def launches(demands: list[dict[str, float]], *gone: str, scorer: Any = score) -> dict[str, int]:
    """What Ray's own scheduler starts for the demands on the cloud cluster, without some kinds."""
    from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
    from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    config, tracker = prepared(AWS), NodeProviderAvailabilityTracker(timer=lambda: 0.0)
    for kind in gone:
        refusal = NodeLaunchException("InsufficientInstanceCapacity", "none left", (None, None, None))
        tracker.update_node_availability(kind, 0, refusal)
    chooser = partial(scorer, node_availability_summary=tracker.summary())
    found, unmet = get_nodes_for(config["available_node_types"], {}, "head", 12, demands, chooser)
    assert not unmet
    return dict(found)


def test_spot_comes_first_and_gives_way_to_on_demand() -> None:
    gpu, cpus = [{"GPU": 1.0, "CPU": 1.0}] * 2, [{"CPU": 1.0}] * 16
    assert launches(gpu) == {"train_spot": 2}
    assert launches(cpus) == {"play_spot": 1}
    assert launches(gpu, "train_spot", "plan_spot") == {"train": 2}
    assert launches(cpus, "play_spot") == {"play": 1}
    assert launches(cpus, "play_spot", "play") == {
        "train_spot": 2
    }  # GPUs for CPU work, where nothing else is left


def test_ray_alone_would_ask_for_the_same_spot_kind_for_ever() -> None:
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    asked = launches([{"CPU": 1.0}] * 16, "play_spot", scorer=_default_utilization_scorer)
    assert asked == {"play_spot": 1}


def test_the_file_names_the_function_that_chooses() -> None:
    from ray.autoscaler._private.loader import load_function_or_class

    named = re.search(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", settings(AWS))
    assert named is not None
    assert load_function_or_class(named[1]) is score


def settings(path: Path) -> str:
    return str(yaml.safe_load(path.read_text())["setup_commands"][0])
