"""The metric in CONTRIBUTING.md is short and runs as written."""

import re
from pathlib import Path

import torch

import fastfg

PAGE = Path(fastfg.__file__).parents[1] / "CONTRIBUTING.md"


def test_the_metric_in_contributing(model, images):
    (block,) = re.findall(r"```python\n(# my_metric\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) < 25
    namespace: dict = {}
    exec(block, namespace)
    metric, maps = namespace["KeepTop"](), torch.rand(2, 3, 4, 6)
    scores = fastfg.evaluate(model, images, maps, target=1, metrics=["saco", metric])
    assert list(scores) == ["saco", "keep_top"]
    for c in range(2):
        for i in range(3):
            kept = maps[c, i].flatten().argsort(descending=True, stable=True)[:6]
            image = torch.full_like(images[i], float(images[i].mean()))
            for patch in kept.tolist():
                rows, columns = slice(patch // 6 * 8, patch // 6 * 8 + 8), slice(patch % 6 * 8, patch % 6 * 8 + 8)
                image[:, rows, columns] = images[i][:, rows, columns]
            whole, left = (model(x[None]).softmax(1)[0, 1].item() for x in (images[i], image))
            torch.testing.assert_close(float(scores["keep_top"][c, i]), left / whole, rtol=1e-9, atol=0)
    table = fastfg.compare(model, images, gates={"vanilla": None}, metrics=["saco", metric])
    summary = fastfg.study.summarize(table)
    assert list(summary["metric"]) == ["saco", "keep_top"]
    assert "keep_top |" in fastfg.report.markdown_table(summary)
