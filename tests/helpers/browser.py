"""Pages in headless Chromium, where it is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

WIDTHS = (390, 1280)  # CSS pixels: a phone and a laptop
# Frames have the wanted width exactly; a window of Chromium is at least 500 pixels wide.
FRAMES = """<!doctype html><body>{frames}<script>
function measure(frame) {{
  const page = frame.contentDocument.documentElement, outside = [];
  for (const each of page.querySelectorAll("body *")) {{
    const box = each.getBoundingClientRect();
    const scrolls = each.parentElement.closest(".scroll, pre");
    if (box.right > page.clientWidth + 1 && !scrolls) outside.push(each.outerHTML.slice(0, 80));
  }}
  return {{width: page.clientWidth, needed: page.scrollWidth, outside: outside.slice(0, 5)}};
}}
onload = () => document.body.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
</script>"""


def layout(page: Path, folder: Path) -> list[dict]:
    """At each of :data:`WIDTHS`: the ``width``, the width ``needed``, and elements that reach ``outside``."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("Chromium is not installed")
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}" style="width: {width}px; height: 900px; border: 0"></iframe>'
        for width in WIDTHS
    )
    (folder / "frames.html").write_text(FRAMES.format(frames=frames))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--window-size=1800,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def assert_fits(page: Path, folder: Path) -> None:
    """Nothing of the page reaches outside a window of any of the widths, except inside boxes that scroll."""
    found = layout(page, folder)
    assert [each["width"] for each in found] == list(WIDTHS)
    for each in found:
        assert each["needed"] <= each["width"], each
        assert each["outside"] == [], each
