"""The harness of kills, with few of them; ``python -m bench.kills`` does a hundred."""

import pytest

from bench import kills


@pytest.mark.slow
def test_ten_kills(tmp_path):
    found = kills.run(tmp_path, kills=10, images=16)
    assert found["kills"] == 10


def test_a_table_with_a_row_too_few_is_noticed(tmp_path):
    import pandas as pd

    for name in ("one", "four"):
        (tmp_path / name).mkdir()
        rows = [{"path": f"{n}.png", "variant": variant} for n in range(3) for variant in ("vanilla", "random")]
        pd.DataFrame(rows[: 6 if name == "one" else 5]).to_parquet(tmp_path / name / "scores.parquet")
        for other in ("errors.parquet", "errors.csv", "table.md"):
            (tmp_path / name / other).write_text("")
    kills.check(tmp_path / "one", tmp_path / "one", images=4)
    with pytest.raises(kills.WrongTableError):
        kills.check(tmp_path / "four", tmp_path / "one", images=4)
    with pytest.raises(kills.WrongTableError, match="3 images, of 4"):
        kills.check(tmp_path / "one", tmp_path / "one", images=5)
