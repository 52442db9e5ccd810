"""The backports source comes from the sources already configured, in either form, or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[3] / "scripts/lib.sh"


def derive(etc: Path, *uris: str) -> tuple[int, str]:
    call = f'. "{LIBRARY}"; source_for_suite "$@"'
    argv = ["bash", "-c", call, "test", str(etc), "bookworm", "bookworm-backports", *uris]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822_keeps_address_keys_and_options(etc: Path) -> None:
    (etc / "sources.list.d/debian.sources").write_text(
        "# the archive\nTypes: deb deb-src\nURIs: http://mirror.test/debian/\n"
        "# a comment inside\nSuites: bookworm bookworm-updates\nComponents: main contrib\n"
        "Check-Valid-Until: no\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END\n"
        "\nTypes: deb\nURIs: http://mirror.test/security\nSuites: bookworm-security\n"
        "Components: main\n"
    )
    assert derive(etc) == (
        0,
        "sources\nTypes: deb\nSuites: bookworm-backports\nComponents: main\n"
        "URIs: http://mirror.test/debian/\nCheck-Valid-Until: no\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END\n",
    )


def test_suites_may_go_over_lines(etc: Path) -> None:
    (etc / "sources.list.d/debian.sources").write_text(
        "Types: deb\nURIs: http://mirror.test/debian\nSuites:\n bookworm\n bookworm-updates\n"
        "Components: main\n"
    )
    assert derive(etc)[1].endswith("Components: main\nURIs: http://mirror.test/debian\n")


def test_one_line_form_keeps_address_and_options(etc: Path) -> None:
    (etc / "sources.list").write_text(
        "# deb http://old.test/debian bookworm main\n"
        "deb-src http://mirror.test/debian bookworm main\n"
        "deb http://mirror.test/security bookworm-security main\n"
        "deb\t[ arch=amd64 signed-by=/k.gpg ]  http://mirror.test/debian  bookworm contrib main#x\n"
    )
    assert derive(etc) == (
        0,
        "list\ndeb [ arch=amd64 signed-by=/k.gpg ] http://mirror.test/debian "
        "bookworm-backports main\n",
    )


@pytest.mark.parametrize(
    "text",
    [
        "Types: deb-src\nURIs: http://m.test\nSuites: bookworm\nComponents: main\n",
        "Types: deb\nURIs: http://m.test\nSuites: bookworm\nComponents: stable\n",
        "Types: deb\nURIs: http://m.test\nSuites: trixie\nComponents: main\n",
        "Enabled: no\nTypes: deb\nURIs: http://m.test\nSuites: bookworm\nComponents: main\n",
    ],
)
def test_what_does_not_serve_the_suite_does_not_count(etc: Path, text: str) -> None:
    (etc / "sources.list.d/x.sources").write_text(text)
    assert derive(etc) == (1, "")


def test_other_archives_with_the_same_suite_are_told_apart_by_address(etc: Path) -> None:
    (etc / "sources.list.d/a-vendor.sources").write_text(
        "Types: deb\nURIs: http://vendor.test/apt\nSuites: bookworm\nComponents: main\n"
    )
    (etc / "sources.list.d/b-vendor.list").write_text("deb http://other.test bookworm main\n")
    (etc / "sources.list.d/debian.list").write_text("deb http://m.test/debian/ bookworm main\n")
    assert derive(etc, "http://m.test/debian")[1] == (
        "list\ndeb http://m.test/debian/ bookworm-backports main\n"
    )
    assert derive(etc, "http://elsewhere.test/debian") == (1, "")


def test_nothing_configured_is_a_refusal(etc: Path) -> None:
    assert derive(etc) == (1, "")
