"""Read a page: its tables, its headings, its text, and the data of its script."""

import base64
import json
from html.parser import HTMLParser

import numpy as np

VOID = {"meta", "img", "source", "br", "input", "link"}


class Page(HTMLParser):
    """The tables {caption: rows}, the ids of headings, the elements that are open at the end, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.open, self.texts, self.tags = {}, [], [], [], []
        self.data, self._rows, self._caption = None, None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append((tag, given))
        if tag in ("h1", "h2") and "id" in given:
            self.headings.append(given["id"])
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr" and self._rows is not None:
            self._rows.append([])
        if tag in ("th", "td") and self._rows:
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        name = self.open.pop()[0]
        assert name == tag, f"<{name}> is closed by </{tag}>"
        if tag == "table":
            self.tables.setdefault(self._caption, self._rows)
            self._rows = None

    def handle_data(self, text):
        names = [name for name, _ in self.open]
        if names and names[-1] == "script":
            if self.open[-1][1].get("id") == "data":
                self.data = json.loads(text)
        elif "style" not in names:
            self.texts.append(text)
            if "caption" in names:
                self._caption += text
            elif self._rows and self._rows[-1] and ("td" in names or "th" in names):
                self._rows[-1][-1] += text


def numbers(text, dtype):
    """The numbers that the page holds in base64."""
    return np.frombuffer(base64.b64decode(text), dtype)
