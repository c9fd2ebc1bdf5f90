"""The benchmark of the inverse application runs and leaves what it says; nothing here is timed."""

import pandas as pd

from studies import application


def test_every_way_size_and_round_is_in_the_table(tmp_path):
    out = tmp_path / "out"
    options = ["--d", "24", "48", "--batch", "6", "--rank", "5", "--rounds", "2", "--dense-up-to", "24"]
    assert application.main([*options, "--out", str(out)]) == 0
    rows = pd.read_csv(out / "application.csv")
    sizes = rows.groupby("way").d.unique().map(set).to_dict()
    assert sizes == {way: {24} if way == application.DENSE else {24, 48} for way in application.WAYS}
    assert (rows.groupby(["d", "way", "part"]).size() == 2).all()
    assert (rows.seconds > 0).all()
    names = {path.name for path in out.iterdir()}
    assert names >= {"ratios.csv", "ratios.md", "application.pdf", "application.png", "environment.json"}


def test_a_bad_option_is_one_line_and_status_2(tmp_path, capsys):
    assert application.main(["--d", "0", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
