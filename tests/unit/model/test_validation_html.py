"""The report as a page: whole, escaped, readable without colour, and without anything from afar."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from godwit.model.validation import (
    Canary,
    CanaryStep,
    HostRow,
    LinkRow,
    ValidationCheck,
    ValidationReport,
    worst,
)
from godwit.model.validation_html import render_html

EVIL = "<script>alert('x')</script>&\"'"
VOID = {"meta"}


def report(**changes: object) -> ValidationReport:
    checks = (
        ValidationCheck(category="inventory", name="hosts", result="pass", message="all answered"),
        ValidationCheck(
            category="network",
            name="mtu",
            result="fail",
            message=f"MTUs differ {EVIL}",
            hint=f"set them {EVIL}",
            hosts=("host2",),
        ),
        ValidationCheck(
            category="system", name="slat", result="warn", message="no EPT", hint="switch it on"
        ),
    )
    made = ValidationReport(
        task="t-1",
        by=EVIL,
        version="0.1.0",
        started_at=1_700_000_000.0,
        ended_at=1_700_000_012.5,
        result="fail",
        checks=checks,
        hosts=(
            HostRow(
                name="host1", state="up", cpu=EVIL, cpus=8, qemu="10.0.2", accelerator="kvm",
                kernel="6.12", system=EVIL, godwit="0.1.0", migration_address="10.92.0.11",
                mtu=1500, memory_bytes=1 << 33,
            ),
        ),
        links=(
            LinkRow(
                source="host1", destination="host2", largest_bytes=1400, bits_per_s=9.4e8,
                clock_offset_s=0.0021, clock_error_s=0.0004,
            ),
            LinkRow(source="host2", destination="host1"),
        ),
    )  # fmt: skip
    return made.but(**changes)


class Page(HTMLParser):
    """Keeps what a reader of the page meets; an element that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_everything_is_on_the_page() -> None:
    page = Page(render_html(report()))
    for said in (
        *("all answered", "no EPT", "switch it on", "1400 bytes", "940 Mbit/s", "+2.1 ± 0.4 ms"),
        *("10.0.2 (kvm)", "MTU 1500", "2023-11-14 22:13:20 UTC", "took 12.5 s", "none arrived"),
        *("Failed", "Warning", "Pass", "8 GiB", "not measured", "Godwit 0.1.0"),
    ):
        assert said in page.text, said
    assert EVIL in page.text


def test_nothing_of_a_cluster_becomes_markup() -> None:
    text = render_html(report())
    page = Page(text)
    assert page.all("script") == []
    assert "<script" not in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "link", "iframe", "object"})
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_it_needs_nothing_from_afar() -> None:
    text = render_html(report())
    assert "default-src 'none'" in text
    assert not any(word in text for word in ("http://", "https://", "src=", "url(", "@import"))


def test_it_can_be_read_without_seeing_colours() -> None:
    page = Page(render_html(report()))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table")) >= 5
    assert all(head.get("scope") == "col" for head in page.all("th"))
    targets = {attrs["id"] for _, attrs in page.tags if attrs.get("id")}
    links = {str(link["href"]).removeprefix("#") for link in page.all("a")}
    assert links == {"inventory", "network", "system"}
    assert links <= targets


def test_what_is_wrong_comes_first() -> None:
    text = render_html(report())
    assert text.index("MTUs differ") < text.index("no EPT") < text.index("all answered")


def test_a_live_one_shows_its_canary() -> None:
    canary = Canary(
        vm="canary-1",
        source="host1",
        destination="host2",
        blackout_ms=61.4,
        total_ms=1450.0,
        steps=(CanaryStep(name="moving it live", seconds=1.61, message=EVIL),),
        not_done=("a drain was not tried",),
    )
    page = Page(render_html(report(live=True, canary=canary)))
    for said in ("61 ms", "1450 ms", "1.6 s", "a drain was not tried", "Live validation", EVIL):
        assert said in page.text, said


@pytest.mark.parametrize(
    ("results", "expected"),
    [((), "pass"), (("pass", "warn"), "warn"), (("fail", "warn", "pass"), "fail")],
)
def test_the_worst_check_is_the_result(results: tuple[str, ...], expected: str) -> None:
    checks = tuple(
        ValidationCheck(category="system", name="x", result=result, message="")  # type: ignore[arg-type]
        for result in results
    )
    assert worst(checks) == expected
