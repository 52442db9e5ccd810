"""Both versions against a directory tree that answers like the kernel's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from godwit.host.cgroup import checked_name, detect, open_cgroup, quota_and_period_us
from godwit.host.cgroup_v1 import CgroupV1
from godwit.host.cgroup_v2 import CgroupV2
from godwit.host.errors import CgroupError


def v1_tree(root: Path) -> Path:
    for controller in ("cpu,cpuacct", "freezer", "memory"):
        (root / controller).mkdir(parents=True)
        for name in ("cgroup.procs", "tasks"):
            (root / controller / name).touch()
    for name in ("cpu", "cpuacct"):
        (root / name).symlink_to("cpu,cpuacct")
    (root / "unified").mkdir()
    (root / "unified" / "cgroup.controllers").touch()
    return root


def v2_group(path: Path, controllers: str = "cpu memory pids") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "cgroup.controllers": controllers,
        "cgroup.subtree_control": "",
        "cgroup.type": "domain\n",
        "cgroup.procs": "",
        "cgroup.threads": "",
        "cgroup.freeze": "0\n",
        "cgroup.kill": "",
        "cgroup.events": "populated 0\nfrozen 0\n",
        "cpu.max": "max 100000\n",
        "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
    }.items():
        (path / name).write_text(text)
    return path


@pytest.fixture
def v2(tmp_path: Path) -> CgroupV2:
    for name in ("", "godwit", "godwit/h1", "godwit/h1/web", "godwit/h1/web/vcpu"):
        v2_group(tmp_path / name)
    return CgroupV2("godwit/h1/web", tmp_path)


def test_detects_hybrid_as_version_1(tmp_path: Path) -> None:
    found = detect(v1_tree(tmp_path))
    assert found.version == 1
    assert found.controllers == ("cpu", "cpuacct", "freezer", "memory")
    assert isinstance(open_cgroup("a/b", facts=found), CgroupV1)


def test_detects_version_2(tmp_path: Path) -> None:
    v2_group(tmp_path, "cpu io memory")
    found = detect(tmp_path)
    assert (found.version, found.controllers) == (2, ("cpu", "io", "memory"))
    assert isinstance(open_cgroup("a/b", facts=found), CgroupV2)


def test_detects_version_2_in_its_corner(tmp_path: Path) -> None:
    v2_group(tmp_path / "unified", "cpu")
    assert detect(tmp_path).root == tmp_path / "unified"


def test_no_cgroups_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(CgroupError) as caught:
        detect(tmp_path)
    assert "mount" in caught.value.hint


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/..", "a/./b", "a b", "a\n"])
def test_names_cannot_leave_the_tree(name: str) -> None:
    with pytest.raises(CgroupError):
        checked_name(name)


@pytest.mark.parametrize(
    ("cores", "quota", "period"),
    [
        (1.0, 10_000, 10_000),
        (0.5, 5_000, 10_000),
        (2.5, 25_000, 10_000),
        (0.1, 1_000, 10_000),
        (0.05, 1_000, 20_000),
        (0.001, 1_000, 1_000_000),
    ],
)
def test_quota_keeps_the_kernels_bounds(cores: float, quota: int, period: int) -> None:
    assert quota_and_period_us(cores) == (quota, period)


@pytest.mark.parametrize("cores", [0.0, -1.0, 0.0009, float("inf"), float("nan")])
def test_impossible_quota(cores: float) -> None:
    with pytest.raises(CgroupError):
        quota_and_period_us(cores)


def test_v1_joined_controllers_are_one_group(tmp_path: Path) -> None:
    group = CgroupV1("godwit/h1/web", v1_tree(tmp_path))
    group.create()
    made = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("web"))
    assert made == [f"{c}/godwit/h1/web" for c in ("cpu,cpuacct", "freezer", "memory")]
    assert (tmp_path / "cpu/godwit/h1/web/vcpu").is_dir()
    group.remove()
    assert not list(tmp_path.rglob("web"))


def test_v2_hands_controllers_down_and_makes_vcpu_threaded(tmp_path: Path, v2: CgroupV2) -> None:
    v2.create()
    # A plain file keeps the last write; the kernel adds both up.
    for name in ("", "godwit", "godwit/h1"):
        assert (tmp_path / name / "cgroup.subtree_control").read_text() == "+memory"
    assert (tmp_path / "godwit/h1/web/cgroup.subtree_control").read_text() == "+cpu"
    assert (tmp_path / "godwit/h1/web/vcpu/cgroup.type").read_text() == "threaded"


def test_v2_members(tmp_path: Path, v2: CgroupV2) -> None:
    v2.add_process(41)
    v2.add_vcpu_threads([42])
    assert (tmp_path / "godwit/h1/web/cgroup.procs").read_text() == "41"
    assert (tmp_path / "godwit/h1/web/vcpu/cgroup.threads").read_text() == "42"
    (tmp_path / "godwit/h1/web/cgroup.procs").write_text("0\n41\n43\n")
    assert v2.pids() == (41, 43)


def test_v2_quota(tmp_path: Path, v2: CgroupV2) -> None:
    assert v2.quota() is None
    v2.set_quota(0.4)
    assert (tmp_path / "godwit/h1/web/vcpu/cpu.max").read_text() == "4000 10000"
    assert v2.quota() == pytest.approx(0.4)
    v2.clear_quota()
    assert (tmp_path / "godwit/h1/web/vcpu/cpu.max").read_text() == "max"


def test_v2_without_processor_controller_says_so(tmp_path: Path, v2: CgroupV2) -> None:
    (tmp_path / "godwit/h1/web/vcpu/cpu.max").unlink()
    with pytest.raises(CgroupError) as caught:
        v2.set_quota(0.5)
    assert "subtree_control" in caught.value.hint


async def test_v2_freeze_wakes_by_event(tmp_path: Path, v2: CgroupV2) -> None:
    events = tmp_path / "godwit/h1/web/cgroup.events"
    waiting = asyncio.ensure_future(v2.freeze(5))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    assert (tmp_path / "godwit/h1/web/cgroup.freeze").read_text() == "1"
    events.write_text("populated 1\nfrozen 1\n")
    async with asyncio.timeout(1):
        await waiting


async def test_v2_freeze_that_never_holds_is_undone(tmp_path: Path, v2: CgroupV2) -> None:
    with pytest.raises(CgroupError):
        await v2.freeze(0.05)
    assert (tmp_path / "godwit/h1/web/cgroup.freeze").read_text() == "0"
    with pytest.raises(CgroupError):
        v2.freeze_now(0.05)
    assert (tmp_path / "godwit/h1/web/cgroup.freeze").read_text() == "0"


def test_v2_usage(v2: CgroupV2) -> None:
    assert v2.cpu_seconds() == pytest.approx(1.5)


def test_failed_create_leaves_nothing(tmp_path: Path) -> None:
    v2_group(tmp_path)
    with pytest.raises(CgroupError):  # a new directory has no control files here
        CgroupV2("web", tmp_path).create()
    assert not (tmp_path / "web").exists()
