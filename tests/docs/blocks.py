"""Code blocks of a Markdown page."""

import re


def python_blocks(page):
    """The text of each ```python block of the file ``page``, in order."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_blocks(page, replace=()):
    """Run the page's blocks one after another in one namespace, which is returned.

    ``replace``: pairs (text, substitute); each text must occur in the page's blocks.
    """
    namespace, code = {"__name__": "__page__"}, "\n".join(python_blocks(page))
    for text, substitute in replace:
        assert text in code, f"{page} has no {text!r}"
        code = code.replace(text, substitute)
    exec(compile(code, str(page), "exec"), namespace)
    return namespace
